"""Make and check everything that a release consists of, in ``dist/``: ``make dist``.

The wheel is built from the sdist, checked, and installed into a clean environment, where it has to
run; of that environment come the bill of materials (CycloneDX) and the notices of third parties.
"""

from __future__ import annotations

import hashlib
import shutil
import subprocess
import sys
import tempfile
import venv
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


def environment(place: Path, *requirements: str | Path) -> Path:
    """Make a clean environment with these requirements and return its programs' folder."""
    venv.create(place, with_pip=True)
    programs = place / "bin"
    run(programs / "python", "-m", "pip", "install", "--quiet", *requirements)
    return programs


def main() -> int:
    """Build, check, install, describe."""
    shutil.rmtree(DIST, ignore_errors=True)
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", DIST, ROOT)
    (wheel,), (sdist,) = DIST.glob("*.whl"), DIST.glob("*.tar.gz")
    print(run(sys.executable, ROOT / "release" / "check_wheel.py", wheel, sdist), end="")
    with tempfile.TemporaryDirectory(prefix="stowray-dist-") as folder:
        clean = environment(Path(folder) / "clean", wheel)
        print(run(clean / "stowray", "--version"), end="")
        print(run(clean / "stowray", "demo", "--engine", "local", "--progress", "none"), end="")
        tools = environment(Path(folder) / "tools", *TOOLS)
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
