"""Runs a scenario in a process that dies, or that the disk refuses, at one of its calls.

A server process (started once; it has everything imported) forks a child per round, so that a round
costs no start of an interpreter. `Faults` is its client.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.support.scenarios import IMAGES_VARIABLE
from tests.support.stores import FIRST_BOOT, NEXT_BOOT

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.clock import Boot

ROOT = Path(__file__).parents[2]
PAGE = 4096


@dataclass(frozen=True)
class End:
    """How a round ended: ``status`` is ``done``, ``killed``, ``refused`` (a classed error)."""

    status: str
    count: int = 0
    error: str = ""
    message: str = ""
    exit_code: int = 0
    result: Any = None
    kinds: list[str] = field(default_factory=list)


class Faults:
    """The client of one server process; a context manager."""

    def __init__(self, images: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.faults"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env={**os.environ, IMAGES_VARIABLE: str(images)},
        )

    def __enter__(self) -> Faults:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()

    def run(
        self,
        scenario: str,
        store: Path,
        *,
        boot: Boot = FIRST_BOOT,
        kill: int = 0,
        fail: int = 0,
        code: int = 0,
        lasting: bool = False,
        failpoint: str = "",
        seconds: int = 120,
    ) -> End:
        """Run a scenario: to its end, or until it is killed, or with calls that fail."""
        order = {
            "scenario": scenario,
            "store": str(store),
            "boot": [boot.boot_id, boot.host],
            "kill": kill,
            "fail": fail,
            "code": code,
            "lasting": lasting,
            "failpoint": failpoint,
            "seconds": seconds,
        }
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        assert answer, "the server of the faults has died"
        return End(**json.loads(answer))


@contextlib.contextmanager
def copied(template: Path, place: Path) -> Iterator[Path]:
    """A copy of a template store (or none yet) in a new folder, which is gone afterwards."""
    place.mkdir()
    try:
        if template.exists():
            subprocess.run(["cp", "-a", str(template), str(place / "store")], check=True)
        yield place / "store"
    finally:
        shutil.rmtree(place)


def lose(store: Path, before: dict[str, tuple[int, int]], how: str) -> list[str]:
    """Spoil what was not on the disk when the power went: all files that are not as ``before``."""
    lost = []
    for path in sorted(store.rglob("*")):
        name = str(path.relative_to(store))
        if path.is_symlink() or not path.is_file():
            continue
        status = path.stat()
        if before.get(name) == (status.st_ino, status.st_mtime_ns) or not status.st_size:
            continue
        size = status.st_size
        times = (status.st_atime_ns, status.st_mtime_ns)
        if how == "torn" and size <= PAGE:
            continue  # such a file came to the disk as a whole
        mode = status.st_mode & 0o7777
        path.chmod(0o600)
        with path.open("r+b") as content:
            if how == "emptied":
                content.truncate(0)
            elif how == "zeroed":
                content.write(bytes(size))
            else:
                # The last page came to the disk, those before it did not.
                content.write(bytes((size - 1) // PAGE * PAGE))
        path.chmod(mode)
        os.utime(path, ns=times)
        lost.append(name)
    return lost


def state_of(store: Path) -> dict[str, tuple[int, int]]:
    """Return what tells each file of a store from a later one of its name."""
    found = {}
    for path in store.rglob("*"):
        if path.is_file() and not path.is_symlink():
            status = path.stat()
            found[str(path.relative_to(store))] = (status.st_ino, status.st_mtime_ns)
    return found


def _serve() -> None:
    import stowray.pipeline.entry_list
    import stowray.pipeline.mount  # noqa: F401
    from tests.support import scenarios  # noqa: F401

    for line in sys.stdin:
        order = json.loads(line)
        read, write = os.pipe()
        pid = os.fork()
        if not pid:
            os.close(read)
            _child(order, write)
        os.close(write)
        with os.fdopen(read, "rb") as stream:
            answer = stream.read()
        _, status = os.waitpid(pid, 0)
        if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL:
            answer = json.dumps({"status": "killed"}).encode()
        elif not answer:
            answer = json.dumps({"status": "lost", "message": f"wait status {status}"}).encode()
        sys.stdout.write(answer.decode() + "\n")
        sys.stdout.flush()


def _child(order: dict[str, Any], write: int) -> None:
    from stowray.pipeline.clock import Boot
    from stowray.pipeline.errors import StowrayError
    from tests.support.interpose import CHANGES, ERRORS, Interposer, failer, killer
    from tests.support.scenarios import SCENARIOS

    # A session of its own: what it may leave behind is not for the test to inherit.
    signal.alarm(order["seconds"])
    import faulthandler

    faulthandler.dump_traceback_later(max(1, order["seconds"] - 1))
    kinds: list[str] = []
    if order["fail"]:
        at = failer(order["fail"], order["code"], lasting=order["lasting"])
        concerned = ERRORS[order["code"]]
    elif order["kill"]:
        at, concerned = killer(order["kill"]), {*CHANGES, "create"}
    elif order["code"]:
        concerned = ERRORS[order["code"]]

        def at(_number: int, name: str) -> None:
            kinds.append(name)
    else:
        concerned = {*CHANGES, "create"}

        def at(_number: int, name: str) -> None:
            kinds.append(name)

    if order["failpoint"]:
        os.environ["STOWRAY_FAILPOINT"] = order["failpoint"]
    interposer = Interposer(Path(order["store"]), concerned, at)
    interposer.install()
    answer: dict[str, Any]
    try:
        result = SCENARIOS[order["scenario"]](Path(order["store"]), Boot(*order["boot"]))
        answer = {"status": "done", "result": result}
    except StowrayError as error:
        answer = {
            "status": "refused",
            "error": type(error).__name__,
            "message": str(error),
            "exit_code": error.exit_code,
        }
    except BaseException as error:  # noqa: BLE001 - that is what is looked for
        answer = {
            "status": "escaped",
            "error": type(error).__name__,
            "message": _where(error),
        }
    answer |= {"count": interposer.count, "kinds": kinds}
    with os.fdopen(write, "wb") as stream:
        stream.write(json.dumps(answer).encode())
    os._exit(0)


def _where(error: BaseException) -> str:
    """Return the error with the places that it came through, the innermost first."""
    frames = traceback.extract_tb(error.__traceback__)[::-1]
    places = [f"{Path(frame.filename).name}:{frame.lineno}" for frame in frames]
    return f"{error} at {' < '.join(places[:14])}"


if __name__ == "__main__":
    _serve()

__all__ = ["FIRST_BOOT", "NEXT_BOOT", "End", "Faults", "copied", "lose", "state_of"]
