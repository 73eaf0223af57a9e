"""Make and check everything that a release consists of, in ``dist/``: ``make dist``.

The wheel is built from the sdist, checked, and installed into a clean environment of each Python
that is here (on PATH, or pyenv's), where it has to run; so is the sdist, with this Python. Of one
of them come the bill of materials (CycloneDX) and the notices of third parties.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DIST = ROOT / "dist"
# Well-kept tools for their purpose; they stay out of what they describe.
TOOLS = ("cyclonedx-bom>=7", "pip-licenses>=5")


def run(*command: str | Path) -> str:
    """Run a command that has to succeed and return what it printed."""
    print("+", " ".join(map(str, command)), flush=True)
    return subprocess.run(
        [*map(str, command)], check=True, stdout=subprocess.PIPE, text=True
    ).stdout


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


def described(tools: Path, clean: Path) -> list[dict[str, str]]:
    """Return what the packages of the environment ``clean`` say of their licences."""
    said = run(
        *(tools / "pip-licenses", f"--python={clean / 'python'}", "--format=json", "--with-urls"),
        *("--with-license-file", "--no-license-path", "--with-notice-file"),
        *("--ignore-packages", "stowray", "pip", "setuptools"),
    )
    found: list[dict[str, str]] = json.loads(said)
    return found


def bill(tools: Path, clean: Path, version: str, licences: list[dict[str, str]]) -> str:
    """Return the bill of materials of the environment ``clean``: CycloneDX, JSON.

    The tool knows neither a version that is read from the source nor licences in words of a
    package's own: both are put in.
    """
    said = run(
        *(tools / "cyclonedx-py", "environment", clean / "python"),
        *("--pyproject", ROOT / "pyproject.toml", "--mc-type", "application"),
        *("--output-reproducible", "--of", "JSON"),
    )
    document = json.loads(said)
    document["metadata"]["component"] |= {
        "version": version,
        "purl": f"pkg:pypi/stowray@{version}",
    }
    known = {entry["Name"].lower(): entry["License"] for entry in licences}
    for component in document["components"]:
        name = known.get(component["name"].lower(), "UNKNOWN")
        if not component.get("licenses") and name != "UNKNOWN":
            component["licenses"] = [{"license": {"name": name}}]
    return json.dumps(document, indent=2) + "\n"


def notices(licences: list[dict[str, str]]) -> str:
    """Return the licences and notices of third parties as text."""
    parts = []
    for entry in sorted(licences, key=lambda entry: entry["Name"].lower()):
        head = f"{entry['Name']} {entry['Version']}\n{entry['License']}\n{entry['URL']}\n"
        texts = [entry["LicenseText"], entry["NoticeText"]]
        told = [text.strip() for text in texts if text not in ("UNKNOWN", "")]
        parts.append("\n\n".join([head, *(told or ["The package ships no text of its licence."])]))
    rule = "-" * 80
    return f"\n\n{rule}\n\n".join(parts) + "\n"


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
        licences = described(tools, clean)
        materials = bill(tools, clean, version, licences)
        (DIST / f"{name}.cdx.json").write_text(materials, encoding="utf-8")
        (DIST / "THIRD_PARTY_NOTICES.txt").write_text(notices(licences), encoding="utf-8")
    made = sorted(path for path in DIST.iterdir() if path.name != "SHA256SUMS")
    sums = "".join(f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.name}\n" for p in made)
    (DIST / "SHA256SUMS").write_text(sums, encoding="ascii")
    print(sums, end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
