"""Measures pulls as a user has them: each is a `stowray pull` of its own, start-up and all.

Invariant: the user's own store is never touched; cold stores are made beside it, on the same disk,
and removed whatever happens. A child that runs when the benchmark ends is ended with it.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Self

from stowray.pipeline.errors import NodeError, describe, escape
from stowray.pipeline.files import storage_error
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.run_record import Run, RunRecord, machine

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Mode = Literal["cold", "warm"]
END_SECONDS = 10.0
_ERROR_TAIL = 2000


class BenchRuns:
    """Runs pulls one after the other and keeps what each tells.

    ``options`` are command-line options for every pull (no ``--store``); ``disk`` is where cold
    stores go, by default the nearest existing folder above the user's store.
    """

    def __init__(
        self,
        store: Path,
        options: Sequence[str],
        *,
        disk: Path | None = None,
        tell: Callable[[Run], None] = lambda _run: None,
    ) -> None:
        self._options = tuple(options)
        self._tell = tell
        self._began = time.time()
        self._runs: list[Run] = []
        self._refused: set[str] = set()
        self._stores = 0
        place = disk or _existing(store.parent)
        try:
            self._folder = Path(tempfile.mkdtemp(prefix="stowray-bench-", dir=place))
        except OSError as error:
            raise storage_error(error, place, "make stores to measure with (--disk DIR)") from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        remove_tree(self._folder)

    def measure(self, references: Sequence[str], runs: int, modes: Sequence[Mode]) -> None:
        """Pull every reference ``runs`` times in each mode.

        References take turns, each round beginning with another one, so that a slow moment of
        machine or network hits all of them. One that fails is not tried again.
        """
        warm: dict[str, Path] = {}
        if "cold" not in modes:
            for reference in references:
                warm[reference] = self._new_store()
                prepared = self._pull(reference, warm[reference], "warm", 0)
                if prepared.error is not None:
                    self._keep(reference, prepared)
        for number in range(1, runs + 1):
            turn = (number - 1) % len(references)
            for reference in (*references[turn:], *references[:turn]):
                store = warm.get(reference) or self._new_store()
                for mode in modes:
                    if reference not in self._refused:
                        self._keep(reference, self._pull(reference, store, mode, number))
                if reference not in warm:
                    remove_tree(store)

    def record(self, options: dict[str, Any]) -> RunRecord:
        """Return all that was measured."""
        from stowray import __version__

        return RunRecord("bench", __version__, self._began, machine(), options, tuple(self._runs))

    def _new_store(self) -> Path:
        self._stores += 1
        return self._folder / f"store-{self._stores}"

    def _keep(self, reference: str, run: Run) -> None:
        self._runs.append(run)
        if run.error is not None:
            self._refused.add(reference)
        self._tell(run)

    def _pull(self, reference: str, store: Path, mode: Mode, number: int) -> Run:
        record = self._folder / "record"
        record.unlink(missing_ok=True)
        # -P: a folder named stowray in the working directory is not ours.
        command = [sys.executable, "-P", "-m", "stowray", "--progress", "none", "pull"]
        command += [*self._options, "--json", "--store", str(store), "--record", str(record)]
        # What is measured is the pull: figures and spans are made of all runs in the end.
        command += ["--no-metrics"]
        moment = time.time() - self._began
        begun = time.perf_counter()
        with tempfile.TemporaryFile(dir=self._folder) as errors:
            child = subprocess.Popen(
                [*command, "--", reference],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "OTEL_SDK_DISABLED": "true"},
            )
            answer, status, usage = _await(child)
            seconds = time.perf_counter() - begun
            errors.seek(0)
            said = errors.read().decode("utf-8", "replace")[-_ERROR_TAIL:]
        process = {
            "seconds": seconds,
            "cpu_seconds": usage.ru_utime + usage.ru_stime,
            "max_rss": float(usage.ru_maxrss * 1024),
        }
        run = Run(reference, mode, number, moment, seconds, process=process)
        if record.exists():
            kept = RunRecord.read(record)
            (told,) = kept.runs
            run = replace(
                run,
                reference=told.reference,
                # The spans' clock began with the record, not with the process.
                started=max(0.0, kept.started - self._began),
                result=told.result,
                spans=told.spans,
            )
        if run.result is None or status:
            return replace(run, result=None, error=_error(answer, status, said))
        return run


def _existing(path: Path) -> Path:
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _await(child: subprocess.Popen[bytes]) -> tuple[bytes, int, Any]:
    """Return a child's output, exit status and resource usage; it is ended if we are."""
    try:
        answer = child.stdout.read() if child.stdout is not None else b""
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return answer, child.returncode, usage
    finally:
        if child.returncode is None:
            child.send_signal(signal.SIGINT)
            try:
                child.wait(END_SECONDS)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        if child.stdout is not None:
            child.stdout.close()


def _error(answer: bytes, status: int, said: str) -> dict[str, Any]:
    """Return the error object of a pull that failed, with its exit status."""
    for line in answer.splitlines():
        try:
            error = json.loads(line).get("error")
        except ValueError:
            continue
        if isinstance(error, dict):
            return {**error, "exit_code": status}
    reason = escape(said.strip().rpartition("\n")[2]) or f"ended with status {status}"
    return {**describe(NodeError("stowray pull", reason)), "exit_code": status}
