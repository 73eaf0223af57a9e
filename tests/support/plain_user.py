"""Runs a piece of Python as a plain user, whoever runs the tests."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

PLAIN_UID = 65534

# Modules are imported before the change of user: the interpreter may lie where others cannot read.
DROP = f"""
import contextlib, ctypes, importlib, os, pkgutil
import concurrent.futures.thread, encodings.ascii, encodings.idna, mmap, random, selectors
import subprocess, tempfile, isal.igzip, msgpack
import stowray.pipeline
for module in pkgutil.iter_modules(stowray.pipeline.__path__):
    with contextlib.suppress(ImportError):
        importlib.import_module(f"stowray.pipeline.{{module.name}}")
def become_plain():
    if os.getuid() == 0:
        os.setgroups([])
        os.setgid({PLAIN_UID})
        os.setuid({PLAIN_UID})
        # Only a dumpable process may write its own uid_map after a change of its IDs (prctl(2)).
        ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)
"""


def run_plain(code: str, *arguments: str | Path, timeout: float = 120) -> str:
    """Run ``code`` (which calls ``become_plain()`` after its imports) and return what it prints."""
    result = subprocess.run(
        [sys.executable, "-c", DROP + code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    if result.returncode != 0:
        raise AssertionError(f"exit {result.returncode}: {result.stdout}\n{result.stderr}")
    return result.stdout


@contextmanager
def plain_directory() -> Iterator[Path]:
    """Give a directory that a plain user can reach and write, removed afterwards."""
    base = Path("/dev/shm") if os.access("/dev/shm", os.W_OK) else None
    with tempfile.TemporaryDirectory(dir=base, prefix="stowray-plain-") as name:
        path = Path(name)
        path.chmod(0o755)
        (path / "work").mkdir()
        (path / "work").chmod(0o777)
        if os.getuid() == 0:
            os.chown(path / "work", PLAIN_UID, PLAIN_UID)
        yield path / "work"
