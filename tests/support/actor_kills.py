"""Kills the actors of a session at their work: at a named point, at the n-th call, or at random.

A round: an empty store, one pull through the session, one process that dies in it. Then the
invariants hold, the pull has succeeded or says why not by class, and the next one succeeds, with
the trees of a store that nothing was killed in and nothing left over.
"""

from __future__ import annotations

import itertools
import os
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from tests.support.armed.sitecustomize import ORDER, STORES
from tests.support.command import COMMAND_SECONDS, Stowray
from tests.support.entries import directory, file, hardlink, opaque, symlink, whiteout
from tests.support.invariants import age, check_store, trees_of, wait_quiet
from tests.support.registry import FakeRegistry, incompressible
from tests.support.stacks import tar_bytes

HERE = Path(__file__).parent
# What each pull of a store that is made anew comes by, in this order.
POINTS = (
    "create-before-version",
    "lease-before-rename",
    "put-before-rename",
    "put-after-rename",
    "ingest-proven",
    "ingest-before-rename",
    "ingest-after-rename",
    "ingest-after-record",
    "ingest-before-unlock",
    "layer-before-rename",
    "layer-after-rename",
    "settle-before",
    "settle-after",
    "snapshot-before-record",
    "snapshot-after-record",
    "references-changed",
    "index-derived",
)
ACTORS = ("NodeActor", "FetchActor", "UnpackActor", "ResolverActor", "ProgressActor")
WRITERS = ACTORS[:4]
# The pull was done after all, or a node could not do it.
ENDS = (0, 6)


class ActorKills:
    """A session, a registry and rounds; a context manager."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ends: Counter[tuple[str, str, int]] = Counter()  # who died, where, status of the pull
        self._numbers = itertools.count(1)
        self._home = folder / "home"
        self._home.mkdir()
        self._stores = folder / "stores"
        self._stores.mkdir()
        self._order = folder / "order"
        self._registry = FakeRegistry()
        self._host = Stowray(self._stores / "none", self._home)
        self._armed = {
            ORDER: str(self._order),
            STORES: str(self._stores),
            "PYTHONPATH": f"{HERE / 'armed'}:{HERE.parents[1]}",
            "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        }

    def __enter__(self) -> ActorKills:
        self._registry.__enter__()
        self._registry.add_image("a/b", "1", _layers())
        self.reference = f"{self._registry.host}/a/b:1"
        pristine = Stowray(self.folder / "pristine", self._home)
        pristine.run("pull", self.reference)
        self.trees = trees_of(pristine.store)
        answer = self._host.attempt("session", "start", env=self._armed)
        assert not answer.status, answer.stderr
        return self

    def __exit__(self, *details: object) -> None:
        try:
            self._host.attempt("session", "stop")
        finally:
            self._registry.__exit__(*details)

    def at(self, who: str, where: str) -> str:
        """Kill who comes there first; return who it was, empty when nobody came."""
        number = next(self._numbers)
        waiting = self._order.with_name("order.new")
        waiting.write_text(f"{who} {where} round-{number}")
        waiting.rename(self._order)
        command = self._command(number)
        armed = self._armed if who == "driver" else {}
        answer = command.attempt("pull", self.reference, env=armed)
        self._order.unlink(missing_ok=True)
        told = [path.suffix.removeprefix(".") for path in self.folder.glob("order.*")]
        for path in self.folder.glob("order.*"):
            path.unlink()
        victim = told[0] if told else ""
        self._judge(command, victim, where, answer.status, answer.stderr)
        return victim

    def randomly(self, who: str, seconds: float) -> str:
        """Kill an actor of this kind (or the ``driver``) so long after the start of a pull."""
        command = self._command(next(self._numbers))
        with command.running("pull", self.reference) as process:
            time.sleep(seconds)
            known = {process.pid: who} if who == "driver" else actors_of(str(self._order))
            victims = [pid for pid, kind in known.items() if kind == who]
            for victim in victims[:1]:
                with suppress(ProcessLookupError):
                    os.kill(victim, signal.SIGKILL)
            try:
                _, errors = process.communicate(timeout=COMMAND_SECONDS)
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGABRT)
                _, errors = process.communicate()
            status = process.returncode
        self._judge(command, who, "at random", status, errors.decode(errors="replace"))
        return who if victims else ""

    def _command(self, number: int) -> Stowray:
        folder = self._stores / f"round-{number}"
        folder.mkdir()
        return Stowray(folder / "store", self._home, "ray")

    def _judge(self, command: Stowray, victim: str, where: str, status: int, text: str) -> None:
        what = f"{victim or 'nobody'} killed at {where}"
        allowed = (*ENDS, -signal.SIGKILL) if victim == "driver" else ENDS if victim else (0,)
        assert status in allowed, f"{what}: the pull ends with {status}: {text[-3000:]}"
        self.ends[victim or "nobody", where, status] += 1
        if command.store.exists():
            wait_quiet(command.store)
            check_store(command.store, self.trees)
        command.run("pull", self.reference)
        check_store(command.store, self.trees)
        age(command.store)
        Stowray(command.store, self._home).run("gc")
        check_store(command.store, self.trees, finished=True)
        assert trees_of(command.store) == self.trees, what
        shutil.rmtree(command.store.parent)


def actors_of(mark: str) -> dict[int, str]:
    """Return the actors whose environment holds ``mark``: their kinds by process id."""
    # prctl(2), PR_SET_NAME keeps 15 bytes of `ray::KIND` or `ray::KIND.method`.
    kinds = {kind[:10]: kind for kind in ACTORS}
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and mark.encode() in (entry / "environ").read_bytes():
                name = (entry / "comm").read_text().strip().removeprefix("ray::")
                kind = kinds.get(name.partition(".")[0])
                if kind is not None:
                    found[int(entry.name)] = kind
    return found


def _layers() -> list[bytes]:
    base = [
        directory("usr"),
        directory("usr/lib"),
        file("usr/lib/data", incompressible(400_000, 1)),
        symlink("lib", "usr/lib"),
        directory("old"),
        file("old/file", b"1"),
        directory("gone"),
    ]
    # Depends on what is below: through a link, a link to a lower file, implied parents.
    above = [
        file("lib/new", b"through a lower link"),
        hardlink("usr/lib/again", "usr/lib/data"),
        whiteout("gone"),
        opaque("old"),
        file("old/new", b"2"),
    ]
    # Fits once the directories that it only implies are those below.
    implied = [file("usr/lib/more/page", b"3"), file("usr/lib/other", b"4")]
    alone = [directory("srv"), file("srv/page", incompressible(300_000, 2))]
    return [tar_bytes(entries) for entries in (base, above, implied, alone)]
