"""Make and check everything that a release consists of, in ``dist/``: ``make dist``.

The wheel is built from the sdist, checked, and installed into a clean environment of each Python
that is here (on PATH, or pyenv's), where it has to run; so is the sdist, with this Python. Of one
of them come the bill of materials (CycloneDX) and the notices of third parties.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
# Well-kept tools for their purpose; they stay out of what they describe.
TOOLS = ("cyclonedx-bom>=7", "pip-licenses>=5")


def run(*command: str | Path, output: Path | None = None) -> str:
    """Run a command that has to succeed and return what it printed."""
    print("+", " ".join(map(str, command)), flush=True)
    done = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True)
    if output is not None:
        output.write_text(done.stdout, encoding="utf-8")
    return done.stdout


def environment(place: Path, python: str | Path, *requirements: str | Path) -> Path:
    """Make a clean environment with these requirements and return its programs' folder."""
    run(python, "-m", "venv", place)
    programs = place / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", *requirements)
    return programs


def pythons() -> dict[str, str]:
    """Return the Pythons here that stowray is for, ``3.11`` to program, each that starts."""
    found = {}
    for minor in range(11, 15):
        name = f"3.{minor}"
        kept = sorted(Path.home().glob(f".pyenv/versions/{name}.*/bin/python"))
        for program in (shutil.which(f"python{name}"), *map(str, kept)):
            if program is None:
                continue
            look = [program, "-c", "import ensurepip, sys; print(*sys.version_info[:2], sep='.')"]
            done = subprocess.run(look, stdout=subprocess.PIPE, text=True, check=False)
            if done.returncode == 0 and done.stdout.strip() == name:
                found[name] = program
                break
    return found


def tried(programs: Path, version: str) -> None:
    """See that an installed stowray runs, says its version, and has a manual."""
    said = run(programs / "stowray", "--version")
    if version not in said:
        raise SystemExit(f"{programs}: version {said.strip()}, not {version}")
    run(programs / "stowray", "demo", "--engine", "local", "--progress", "none")
    if not (programs.parent / "share" / "man" / "man1" / "stowray.1").is_file():
        raise SystemExit(f"{programs}: no man page")


def main() -> int:
    """Build, check, install, describe."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, ROOT / "docs" / "man.py", ROOT / "docs")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    print(run(sys.executable, ROOT / "release" / "check_wheel.py", wheel, sdist), end="")
    with tempfile.TemporaryDirectory(prefix="stowray-dist-") as folder:
        place, version = Path(folder), wheel.name.split("-")[1]
        for name, python in pythons().items():
            programs = environment(place / name, python, wheel)
            tried(programs, version)
            print(f"Python {name}: installed and run", flush=True)
        tried(environment(place / "sdist", sys.executable, sdist), version)
        clean = environment(place / "clean", sys.executable, wheel)
        tools = environment(place / "tools", sys.executable, *TOOLS)
        name = wheel.name.partition("-py3")[0]
        run(
            *(tools / "cyclonedx-py", "environment", clean / "python"),
            *("--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"),
            *("--output-reproducible", "--of", "JSON", "-o", DIST / f"{name}.cdx.json"),
        )
        run(
            *(tools / "pip-licenses", f"--python={clean / 'python'}", "--format=plain-vertical"),
            *("--with-urls", "--with-license-file", "--no-license-path", "--with-notice-file"),
            *("--ignore-packages", "stowray", "pip", "setuptools"),
            output=DIST / "THIRD_PARTY_NOTICES.txt",
        )
    made = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in made)
    (DIST / "SHA256SUMS").write_text(sums, encoding="ascii")
    print(sums, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
