"""Check that a wheel and an sdist hold what they should and nothing else.

    python release/check_wheel.py dist/*.whl dist/*.tar.gz

Prints one line for each file and exits with 1 at the first thing that is wrong.
"""

from __future__ import annotations

import sys
import tarfile
import zipfile
from email.parser import Parser
from pathlib import Path, PurePosixPath

ROOT = Path(__file__).parent.parent
NEEDED = {
    "stowray/__init__.py",
    "stowray/py.typed",
    "stowray/pipeline/engine.py",
    "stowray/actors/engine.py",
    "stowray/cli/app.py",
}
KINDS = {".py", ".typed", ".toml"}


class WrongError(Exception):
    """The file is not as it should be; field: the sentence."""


def version() -> str:
    """Return the version, which is written in one place only."""
    for line in (ROOT / "stowray" / "__init__.py").read_text(encoding="utf-8").splitlines():
        if line.startswith("__version__ = "):
            return line.partition(" = ")[2].strip('"')
    raise WrongError("stowray/__init__.py has no __version__")


def check_wheel(path: Path) -> str:
    """Return what is in a wheel as a sentence."""
    expected = version()
    with zipfile.ZipFile(path) as wheel:
        infos = [info for info in wheel.infolist() if not info.is_dir()]
        names = {info.filename for info in infos}
        meta = f"stowray-{expected}.dist-info"
        manual = f"stowray-{expected}.data/data/share/man/man1/stowray.1"
        if manual not in names:
            raise WrongError(f"{path.name} lacks its man page")
        for info in infos:
            name = PurePosixPath(info.filename)
            if name.parts[0] == meta or info.filename == manual:
                continue
            if name.parts[0] != "stowray" or name.suffix not in KINDS:
                raise WrongError(f"{path.name} holds {name}")
            if (info.external_attr >> 16) & 0o170000 == 0o120000:
                raise WrongError(f"{path.name} holds the link {name}")
        if missing := NEEDED - names:
            raise WrongError(f"{path.name} lacks {', '.join(sorted(missing))}")
        if missing := sources() - names:
            raise WrongError(f"{path.name} lacks {', '.join(sorted(missing))}")
        metadata = Parser().parsestr(wheel.read(f"{meta}/METADATA").decode())
        if not any(name.startswith(f"{meta}/licenses/LICENSE") for name in names):
            raise WrongError(f"{path.name} has no licence")
    if metadata["Version"] != expected:
        raise WrongError(f"{path.name} says version {metadata['Version']}, not {expected}")
    return f"{path.name}: {len(names)} files, version {expected}"


def sources() -> set[str]:
    """Return the names that the checkout's modules have in the wheel."""
    found = set()
    for folder, place in (("stowray", ""), ("pipeline", "stowray/"), ("actors", "stowray/")):
        for module in (ROOT / folder).rglob("*.py"):
            relative = module.relative_to(ROOT)
            if relative.parts[:2] in (("stowray", "pipeline"), ("stowray", "actors")):
                continue
            found.add(f"{place}{relative}")
    return found


def check_sdist(path: Path) -> str:
    """Return what is in an sdist as a sentence: it has to build, test and document."""
    top = f"stowray-{version()}"
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
        outside = [name for name in archive.getnames() if name.partition("/")[0] != top]
    if outside:
        raise WrongError(f"{path.name} holds {outside[0]}")
    for name in ("pyproject.toml", "LICENSE", "README.md", "Makefile", "pipeline/engine.py"):
        if name not in names:
            raise WrongError(f"{path.name} lacks {name}")
    for folder in ("tests/unit", "docs", "actors", "stowray/cli"):
        if not any(name.startswith(f"{folder}/") for name in names):
            raise WrongError(f"{path.name} lacks {folder}/")
    for name in names:
        if name.startswith((".git/", ".venv/", "dist/", ".ci/")):
            raise WrongError(f"{path.name} holds {name}")
    return f"{path.name}: {len(names)} files"


def main(arguments: list[str]) -> int:
    """Check each file."""
    for argument in arguments:
        path = Path(argument)
        try:
            print(check_wheel(path) if path.suffix == ".whl" else check_sdist(path))
        except WrongError as error:
            print(f"wrong: {error}", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
