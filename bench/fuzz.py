"""Fuzz the readers for as long as one likes: `python -m bench.fuzz --runs 1000000 [TARGET...]`.

Without more it makes inputs of the seeds by itself. With `--guided` it uses atheris (which must be
installed), which finds its way by the branches that the code takes, and keeps the inputs that found
new ones under `--corpus`. What is found is written to `--findings`, named by target and digest; put
it into `tests/fuzz/corpus/TARGET`, and the tests run it from then on.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import time
from pathlib import Path

if "--inside" in sys.argv:
    import atheris  # type: ignore[import-not-found, unused-ignore]

    # The branches of the project alone: those of other packages tell nothing.
    with atheris.instrument_imports(include=["stowray"]):
        from tests.fuzz.targets import targets
else:
    from tests.fuzz.targets import targets

from tests.fuzz.mutate import Finding, attempt, run


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("targets", nargs="*", metavar="TARGET")
    parser.add_argument("--runs", type=int, default=100_000, help="executions per target")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--guided", action="store_true", help="use atheris")
    parser.add_argument("--seconds", type=int, default=0, help="end each guided target then")
    parser.add_argument("--corpus", type=Path, default=Path("/tmp/stowray-corpus"))
    parser.add_argument("--findings", type=Path, default=Path("/tmp/stowray-findings"))
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set(options.targets) - targets().keys()
    if unknown:
        parser.error(f"no such target: {', '.join(sorted(unknown))}; known: {', '.join(targets())}")
    names = options.targets or list(targets())
    if options.inside:
        guide(names[0], options)
    total = found = 0
    for name in names:
        begun = time.perf_counter()
        runs, findings = guided(name, options) if options.guided else blind(name, options)
        seconds = time.perf_counter() - begun
        total += runs
        found += findings
        line = {"target": name, "executions": runs, "findings": findings}
        print(json.dumps({**line, "seconds": round(seconds, 1)}), flush=True)
    print(json.dumps({"executions": total, "findings": found}), flush=True)
    return 1 if found else 0


def blind(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Run a target over mutations of its seeds."""
    outcome = run(targets()[name], options.seed, options.runs)
    # Of each kind the shortest.
    kinds: dict[str, Finding] = {}
    for finding in sorted(outcome.findings, key=lambda finding: len(finding.data)):
        kinds.setdefault(finding.error.partition(":")[0], finding)
    for finding in kinds.values():
        keep(options.findings, name, finding.data, finding.error)
    return outcome.executions, len(kinds)


def keep(folder: Path, name: str, data: bytes, error: str) -> None:
    """Write a finding down."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-{hashlib.sha256(data).hexdigest()[:16]}"
    path.write_bytes(data)
    print(f"FINDING {name}: {error} -> {path}", flush=True)


def guided(name: str, options: argparse.Namespace) -> tuple[int, int]:
    """Run a target under atheris, which needs a process for itself."""
    arguments = [sys.executable, "-m", "bench.fuzz", "--inside", name, "--runs", str(options.runs)]
    arguments += ["--seconds", str(options.seconds), "--seed", str(options.seed)]
    arguments += ["--corpus", str(options.corpus), "--findings", str(options.findings)]
    answer = subprocess.run(arguments, capture_output=True, text=True, check=False)
    runs = 0
    for line in answer.stderr.splitlines():
        if line.startswith("stat::number_of_executed_units:"):
            runs = int(line.split()[-1])
    findings = [line for line in answer.stdout.splitlines() if line.startswith("FINDING")]
    for line in findings:
        print(line, flush=True)
    if answer.returncode and not findings:
        print(f"FINDING {name}: atheris ended with {answer.returncode}\n{answer.stderr[-3000:]}")
        return runs, 1
    return runs, len(findings)


def guide(name: str, options: argparse.Namespace) -> None:
    """Hand this process over to atheris; it does not return."""
    target = targets()[name]
    corpus = options.corpus / name
    corpus.mkdir(parents=True, exist_ok=True)
    for data in target.inputs():
        (corpus / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data[: target.longest])
    known: set[str] = set()

    def once(data: bytes) -> None:
        made = target.mend(data) if target.mend is not None else data
        error = attempt(target, made)
        if error and error.partition(":")[0] not in known:
            known.add(error.partition(":")[0])
            keep(options.findings, name, made, error)

    words = options.corpus / f"{name}.words"
    words.write_text(
        "".join(
            '"' + "".join(f"\\x{byte:02x}" for byte in word) + '"\n'
            for word in target.words
            if word
        )
    )
    arguments = [sys.argv[0], str(corpus), f"-runs={options.runs}", f"-max_len={target.longest}"]
    arguments += [f"-dict={words}", f"-seed={options.seed}", "-print_final_stats=1", "-timeout=60"]
    arguments += ["-rss_limit_mb=2048"]
    if options.seconds:
        arguments.append(f"-max_total_time={options.seconds}")
    atheris.Setup(arguments, once)
    atheris.Fuzz()


if __name__ == "__main__":
    sys.exit(main())
