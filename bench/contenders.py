"""The contenders: what each runs to bring an image from the registry to a root filesystem.

Invariant: every run starts cold, in a folder of its own; what is there before the clock starts
(a daemon, a warm session) is said in the contender's `note`.
"""

from __future__ import annotations

import contextlib
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


@dataclass(frozen=True)
class Source:
    """An image in the registry: `twin` is the same tree for tools that do not read `repository`."""

    host: str
    repository: str
    twin: str

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


def _stowray(source: Source, folder: Path, *options: str, prepare: Sequence[str] = ()) -> Sample:
    store = ["--store", str(folder / "store"), "--progress", "none"]
    if prepare:
        measure([[str(STOWRAY), *prepare, *store, source.reference]], folder / "prepare.log")
    command = [str(STOWRAY), "pull", *store, *options, source.reference]
    return measure([command], folder / "log")


def _local(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "local")


def _warm(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--engine", "local", prepare=("pull", "--engine", "local"))


def _missing_policy(source: Source, folder: Path) -> Sample:
    return _stowray(source, folder, "--policy", "missing", prepare=("pull", "--engine", "local"))


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


class _Containerd:
    """A private containerd; `ctr` talks to it."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._socket = Path()

    @contextlib.contextmanager
    def daemon(self, folder: Path) -> Iterator[None]:
        folder = folder / "containerd"
        folder.mkdir(parents=True)
        self._socket = folder / "s"
        config = folder / "config.toml"
        config.write_text(
            f'version = 2\nroot = "{folder}/root"\nstate = "{folder}/state"\n'
            'disabled_plugins = ["io.containerd.grpc.v1.cri"]\n'
            f'[grpc]\naddress = "{self._socket}"\n'
        )
        with (folder / "log").open("wb") as log:
            command = ["containerd", "--config", str(config)]
            self._process = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            give_up = time.monotonic() + DAEMON_SECONDS
            version = ["ctr", "--address", str(self._socket), "version"]
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

    def run(self, source: Source, folder: Path) -> Sample:
        if self._process is None:
            raise RuntimeError("containerd was not started")
        ctr = ["ctr", "--address", str(self._socket), "--namespace", "bench"]
        pull = [*ctr, "images", "pull", "--plain-http", source.reference]
        try:
            return measure([pull], folder / "log", daemons=[self._process.pid])
        finally:
            peers.attempt([*ctr, "images", "rm", "--sync", source.reference])


def _floor(source: Source, folder: Path) -> Sample:
    arguments = [source.host, source.repository, "1", str(folder / "trees")]
    return measure([[sys.executable, "-m", "bench.floor", *arguments]], folder / "log")


def contenders() -> list[Contender]:
    containerd = _Containerd()
    return [
        Contender("stowray", "local engine", (), _local),
        Contender("stowray-ray", "ray engine, session warm", (), _ray, _session),
        Contender("stowray-again", "everything is there, tag resolved again", (), _warm),
        Contender("stowray-missing", "everything is there, --policy missing", (), _missing_policy),
        Contender("skopeo+umoci", "copy to oci:, unpack", ("skopeo", "umoci"), _skopeo_umoci),
        Contender("podman", "overlay store", ("podman",), _podman),
        Contender(
            "ctr", "daemon is running", ("containerd", "ctr"), containerd.run, containerd.daemon
        ),
        Contender("floor", "receive, hash, inflate, hash, tar -x", ("tar",), _floor),
    ]


def remove(folder: Path) -> None:
    """Remove what a run left: podman leaves a mount of its own store behind."""
    for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
        place = line.split()[1].encode().decode("unicode_escape")
        if place.startswith(f"{folder}{os.sep}"):
            peers.attempt(["umount", "--lazy", place])
    shutil.rmtree(folder)
