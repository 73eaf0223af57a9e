"""The contenders: what each runs to bring an image from the registry to a root filesystem.

Invariant: every run starts cold, in a folder of its own; what is there before the clock starts
(a daemon, a warm session) is said in the contender's `note`.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from bench.runner import Sample, measure
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

STOWRAY = Path(sys.executable).parent / "stowray"
DAEMON_SECONDS = 30.0
LOCAL = ("pull", "--engine", "local")


@dataclass(frozen=True)
class Source:
    """An image in the registry: `twin` is the same tree for tools that do not read `repository`.

    `layout` and `tag` say where its layers lie on disk.
    """

    host: str
    repository: str
    twin: str
    layout: Path
    tag: str

    @property
    def reference(self) -> str:
        return f"{self.host}/{self.repository}:1"


@dataclass(frozen=True)
class Contender:
    """`run` measures one cold pull into an empty folder; `programs` must be installed."""

    name: str
    note: str
    programs: tuple[str, ...]
    run: Callable[[Source, Path], Sample]
    daemon: Callable[[Path], contextlib.AbstractContextManager[None]] = field(
        default=lambda _: contextlib.nullcontext()
    )

    def missing(self) -> list[str]:
        absent = peers.missing(*self.programs)
        if self.name.startswith("stowray") and not STOWRAY.exists():
            absent.append("stowray")
        return absent


def _stowray(
    source: Source, folder: Path, *options: str, prepare: Sequence[str] = (), pinned: bool = False
) -> Sample:
    store = ["--store", str(folder / "store"), "--progress", "none"]
    reference = source.reference
    if prepare:
        measure([[str(STOWRAY), *prepare, *store, reference]], folder / "prepare.log")
        if pinned:
            answer = (folder / "prepare.log").read_text().split()[-1]
            reference = f"{source.host}/{source.repository}@{answer.rpartition('@')[2]}"
            measure([[str(STOWRAY), *prepare, *store, reference]], folder / "prepare.log")
    command = [str(STOWRAY), "pull", *store, *options, reference]
    return measure([command], folder / "log")


def _local(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "local")


def _fetch(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "local", "--no-unpack")


def _warm(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "local", prepare=LOCAL)


def _missing_policy(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--policy", "missing", prepare=LOCAL)


def _by_digest(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, prepare=LOCAL, pinned=True)


def _help(_: Source, folder: Path) -> Sample:
    return measure([[str(STOWRAY), "--help"]], folder / "log")


def _inside(source: Source, folder: Path) -> Sample:
    """A pull in a process that runs already: the wall time is what that process says."""
    command = [sys.executable, "-m", "bench.inside", source.reference, str(folder / "store")]
    whole = measure([command], folder / "log")
    return Sample(json.loads((folder / "log").read_text())["seconds"], whole.cpu_seconds, whole.rss)


def _ray(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "ray")


@contextlib.contextmanager
def _session(folder: Path) -> Iterator[None]:
    store = ["--store", str(folder / "warm-up")]
    measure([[str(STOWRAY), "session", "start", *store]], folder / "session.log")
    try:
        yield
    finally:
        measure([[str(STOWRAY), "session", "stop", *store]], folder / "session.log")


def _skopeo(source: Source, folder: Path) -> Sample:
    layout = folder / "layout"
    reference = f"docker://{source.host}/{source.repository}:1"
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", reference, f"oci:{layout}:1"]
    return measure([copy], folder / "log")


def _crane(source: Source, folder: Path) -> Sample:
    pull = ["crane", "pull", "--insecure", "--format=oci", source.reference, str(folder / "layout")]
    return measure([pull], folder / "log")


def _skopeo_umoci(source: Source, folder: Path) -> Sample:
    layout = folder / "layout"
    reference = f"docker://{source.host}/{source.twin}:1"
    copy = ["skopeo", "copy", "--quiet", "--src-tls-verify=false", reference, f"oci:{layout}:1"]
    unpack = ["umoci", "unpack", "--image", f"{layout}:1", str(folder / "a" / "b" / "bundle")]
    (folder / "a" / "b").mkdir(parents=True)
    return measure([copy, unpack], folder / "log")


def _podman(source: Source, folder: Path) -> Sample:
    places = ["--root", str(folder / "root"), "--runroot", str(folder / "run")]
    pull = ["podman", *places, "--storage-driver", "overlay", "pull", "--quiet"]
    return measure([[*pull, "--tls-verify=false", source.reference]], folder / "log")


def containerds() -> list[Path]:
    """Every `containerd` on PATH that has a `ctr` beside it, the first one first."""
    found: list[Path] = []
    for folder in os.environ.get("PATH", "").split(os.pathsep):
        program = Path(folder) / "containerd"
        if program.is_file() and program.with_name("ctr").is_file():
            real = program.resolve()
            if all(real != other.resolve() for other in found):
                found.append(program)
    return found


def _version(program: Path) -> tuple[int, ...]:
    words = peers.attempt([str(program), "--version"]).stdout.split()
    numbers = words[2].lstrip("v").split(".") if len(words) > 2 else []
    return tuple(int(number) for number in numbers[:2] if number.isdigit())


class _Containerd:
    """A private containerd; `ctr` talks to it."""

    def __init__(self, program: Path) -> None:
        self.program = program
        self.version = _version(program)
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = Path()

    @contextlib.contextmanager
    def daemon(self, folder: Path) -> Iterator[None]:
        folder = folder / f"containerd{self.version[0]}"
        folder.mkdir(parents=True)
        self._socket = folder / "s"
        config = folder / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self._socket}"\n'
        )
        with (folder / "log").open("wb") as log:
            command = [str(self.program), "--config", str(config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            give_up = time.monotonic() + DAEMON_SECONDS
            version = [*self._ctr, "version"]
            while peers.attempt(version).status:
                if time.monotonic() > give_up:
                    raise TimeoutError(
                        f"containerd does not answer: {(folder / 'log').read_text()}"
                    )
                time.sleep(0.1)
            yield
        finally:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()

    @property
    def _ctr(self) -> list[str]:
        return [str(self.program.with_name("ctr")), "--address", str(self._socket)]

    def run(self, source: Source, folder: Path) -> Sample:
        if self._process is None:
            raise RuntimeError("containerd was not started")
        ctr = [*self._ctr, "--namespace", "bench"]
        pull = [*ctr, "images", "pull", "--plain-http", source.reference]
        try:
            return measure([pull], folder / "log", daemons=[self._process.pid])
        finally:
            peers.attempt([*ctr, "images", "rm", "--sync", source.reference])


def _floor(source: Source, folder: Path) -> Sample:
    arguments = [str(source.layout), source.tag, str(folder / "floor")]
    measure([[sys.executable, "-m", "bench.floor", *arguments]], folder / "log")
    floor = json.loads((folder / "log").read_text())
    return Sample(floor["seconds"], floor["cpu"], 0)


def contenders() -> list[Contender]:
    """Everybody, the usual ones first; `ctr` is a containerd 1, `ctr2` a newer one."""
    found = {min(daemon.version[0], 2): daemon for daemon in map(_Containerd, containerds())}
    daemons = [
        Contender(
            "ctr" if major < 2 else "ctr2",
            f"containerd {'.'.join(map(str, daemon.version))}, daemon is running",
            (),
            daemon.run,
            daemon.daemon,
        )
        for major, daemon in sorted(found.items())
    ]
    return [
        Contender("stowray", "local engine", (), _local),
        Contender("stowray-inside", "Python API, process is running", (), _inside),
        Contender("stowray-fetch", "local engine, --no-unpack", (), _fetch),
        Contender("stowray-ray", "ray engine, session warm", (), _ray, _session),
        Contender("stowray-again", "everything is there, tag resolved again", (), _warm),
        Contender("stowray-missing", "everything is there, --policy missing", (), _missing_policy),
        Contender("stowray-digest", "everything is there, by digest", (), _by_digest),
        Contender("stowray-help", "--help", (), _help),
        Contender("skopeo+umoci", "copy to oci:, unpack", ("skopeo", "umoci"), _skopeo_umoci),
        Contender("skopeo", "copy to oci:, not unpacked", ("skopeo",), _skopeo),
        Contender("crane", "pull --format=oci, not unpacked", ("crane",), _crane),
        Contender("podman", "overlay store", ("podman",), _podman),
        *daemons,
        Contender("floor", "CPU of all parts / cores, see bench/floor.py", ("tar",), _floor),
    ]


def remove(folder: Path) -> None:
    """Remove what a run left: podman leaves a mount of its own store behind."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1].encode().decode("unicode_escape")
        if place.startswith(f"{folder}{os.sep}"):
            peers.attempt(["umount", "--lazy", place])
    shutil.rmtree(folder)
