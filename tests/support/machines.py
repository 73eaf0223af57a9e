"""Machines that are namespaces: a bridge, one network, process and mount namespace for each node.

Invariant: nothing touches the host's own network; what was made is undone by name and process id. A
machine ends, with every process in it, when its first process is killed. Needs root and iproute2:
`why_not` says what is missing.

    with machines(folder, ["m0", "m1", "m2", "m3"]) as net, net.ray() as ray:
        listener = net.listen()                       # seen by the machines, served by this process
        net["m0"].run([...])                          # a program on a machine
        net.cut("m2"); net.heal("m2")                 # its cable
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

START_SECONDS = 120.0
OBJECT_STORE = 80 << 20
GCS_PORT = 6399
CLONE_NEWNET = 0x40000000
_SWITCH = "10.83.0.254"


def why_not() -> str:
    """Return why machines cannot be made here; empty when they can."""
    if os.geteuid() != 0:
        return "namespaces need root"
    absent = [name for name in ("ip", "nsenter", "unshare") if shutil.which(name) is None]
    if absent:
        return f"not installed: {', '.join(absent)} (make deps)"
    name = f"sw{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"no network namespaces here: {made.stderr.strip()}"
    bridge = subprocess.run(
        ["ip", "-n", name, "link", "add", "br0", "type", "bridge"], capture_output=True, text=True
    )
    subprocess.run(["ip", "netns", "del", name], check=True)
    return "" if bridge.returncode == 0 else f"no bridges here: {bridge.stderr.strip()}"


class Machine:
    """One machine: `address` is its own on the bridge."""

    def __init__(self, net: Machines, name: str, number: int) -> None:
        self.name = name
        self.address = f"10.83.0.{number + 1}"
        self.namespace = f"{net.prefix}-{name}"
        self.port = f"p{number}"
        self._net = net
        self._first: subprocess.Popen[bytes] | None = None
        self._pid = 0

    def start(self) -> None:
        net = self._net
        _ip("netns", "add", self.namespace)
        _ip("-n", self.namespace, "link", "set", "lo", "up")
        _ip(
            *("-n", net.switch, "link", "add", self.port, "type", "veth"),
            *("peer", "name", "eth0", "netns", self.namespace),
        )
        _ip("-n", net.switch, "link", "set", self.port, "master", "br0", "up")
        _ip("-n", self.namespace, "addr", "add", f"{self.address}/24", "dev", "eth0")
        _ip("-n", self.namespace, "link", "set", "eth0", "up")
        ready, told = os.pipe()
        # The first process of the machine: its end is that of all others there. Ray's temporary
        # folder is the machine's own, as it would be.
        script = (
            f"mount -t tmpfs -o mode=1777 machine {net.temporary} && hostname {self.name} "
            "&& echo up && exec sleep infinity >/dev/null"
        )
        self._first = subprocess.Popen(
            [
                *("ip", "netns", "exec", self.namespace),
                *("unshare", "--pid", "--fork", "--kill-child", "--mount-proc", "--uts"),
                *("sh", "-c", script),
            ],
            stdin=subprocess.DEVNULL,
            stdout=told,
        )
        os.close(told)
        with os.fdopen(ready) as answer:
            if answer.readline().strip() != "up":
                raise RuntimeError(f"machine {self.name} does not start")
        # `unshare` stays outside; its child is number 1 within.
        children = Path(f"/proc/{self._first.pid}/task/{self._first.pid}/children")
        self._pid = int(children.read_text().split()[0])

    def enter(self, command: Sequence[str]) -> list[str]:
        """Return the command that runs `command` on the machine."""
        return ["nsenter", "-t", str(self._pid), "-n", "-p", "-m", "-u", "--", *command]

    def run(
        self,
        command: Sequence[str],
        *,
        env: Mapping[str, str] | None = None,
        seconds: float = START_SECONDS,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program there to its end."""
        return subprocess.run(
            self.enter(command),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            env=env,
            timeout=seconds,
            check=False,
        )

    def kill(self) -> None:
        """End the machine with all that runs on it."""
        first, self._first = self._first, None
        if first is None:
            return
        if self._pid:  # 0 would be everybody here
            with contextlib.suppress(ProcessLookupError):
                os.kill(self._pid, signal.SIGKILL)
        first.kill()
        first.wait()

    def remove(self) -> None:
        self.kill()
        subprocess.run(["ip", "netns", "del", self.namespace], capture_output=True, check=False)


class Machines:
    """The machines of one test and the bridge that joins them."""

    def __init__(self, folder: Path, names: Sequence[str]) -> None:
        self.folder = folder
        self.prefix = f"sw{secrets.token_hex(3)}"
        self.switch = f"{self.prefix}-switch"
        self.temporary = Path(tempfile.mkdtemp(prefix="sw-ray-", dir="/tmp"))
        self._machines = {name: Machine(self, name, number) for number, name in enumerate(names)}

    def __getitem__(self, name: str) -> Machine:
        return self._machines[name]

    def start(self) -> None:
        _ip("netns", "add", self.switch)
        _ip("-n", self.switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self.switch, "addr", "add", f"{_SWITCH}/24", "dev", "br0")
        _ip("-n", self.switch, "link", "set", "br0", "up")
        _ip("-n", self.switch, "link", "set", "lo", "up")
        for machine in self._machines.values():
            machine.start()

    def close(self) -> None:
        for machine in self._machines.values():
            machine.remove()
        subprocess.run(["ip", "netns", "del", self.switch], capture_output=True, check=False)
        shutil.rmtree(self.temporary, ignore_errors=True)

    def listen(self) -> socket.socket:
        """Return a socket that listens where the machines see it, on the bridge itself."""
        made: list[socket.socket | OSError] = []

        def make() -> None:
            # setns(2) moves the calling thread only; the socket stays where it was made.
            libc = ctypes.CDLL(None, use_errno=True)
            with open(f"/run/netns/{self.switch}") as namespace:
                if libc.setns(namespace.fileno(), CLONE_NEWNET):
                    made.append(OSError(ctypes.get_errno(), "setns"))
                    return
            made.append(socket.create_server((_SWITCH, 0), backlog=128))

        thread = threading.Thread(target=make)
        thread.start()
        thread.join()
        (result,) = made
        if isinstance(result, OSError):
            raise result
        return result

    def cut(self, name: str) -> None:
        """Pull the cable of a machine: what it sends and is sent is lost without a word."""
        _ip("-n", self.switch, "link", "set", self._machines[name].port, "down")

    def heal(self, name: str) -> None:
        """Plug the cable in again."""
        _ip("-n", self.switch, "link", "set", self._machines[name].port, "up")

    @contextlib.contextmanager
    def ray(
        self,
        names: Sequence[str] | None = None,
        *,
        environment: Mapping[str, str] | None = None,
        system: str = "",
    ) -> Iterator[str]:
        """Run `ray start` on machines, the first one the head; gives the cluster's address."""
        chosen = list(names or self._machines)
        head = self._machines[chosen[0]]
        address = f"{head.address}:{GCS_PORT}"
        started: list[subprocess.Popen[bytes]] = []
        variables = {**self.environment(), **(environment or {})}
        try:
            where = ["--head", "--port", str(GCS_PORT), "--include-dashboard", "false"]
            if system:
                where += ["--system-config", system]
            started.append(self._ray(head, where, variables))
            self._wait_for_ray(head, started[0])
            for name in chosen[1:]:
                started.append(self._ray(self._machines[name], ["--address", address], variables))
            for name, process in zip(chosen[1:], started[1:], strict=True):
                self._wait_for_ray(self._machines[name], process)
            yield address
        finally:
            for process in started:
                process.kill()
            for name in chosen:
                self._machines[name].kill()
            for process in started:
                process.wait()

    def environment(self) -> dict[str, str]:
        """What Ray's nodes and drivers run with."""
        kept = {key: os.environ[key] for key in ("PATH", "LANG", "HOME") if key in os.environ}
        return {
            **kept,
            "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
            # Whatever token another Ray has left in this home.
            "RAY_AUTH_MODE": "disabled",
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_worker_niceness": "0",
            "RAY_TMPDIR": str(self.temporary),
        }

    def _ray(
        self, machine: Machine, where: Sequence[str], environment: Mapping[str, str]
    ) -> subprocess.Popen[bytes]:
        program = Path(sys.executable).parent / "ray"
        with self._log(machine).open("wb") as output:
            return subprocess.Popen(
                machine.enter(
                    [
                        *(str(program), "start", *where, "--block", "--num-cpus", "2"),
                        *("--node-ip-address", machine.address, "--node-name", machine.name),
                        *("--object-store-memory", str(OBJECT_STORE)),
                        "--disable-usage-stats",
                    ]
                ),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**environment, "STOWRAY_NODE": machine.name},
            )

    def _wait_for_ray(self, machine: Machine, process: subprocess.Popen[bytes]) -> None:
        give_up = time.monotonic() + START_SECONDS
        log = self._log(machine)
        while "Ray runtime started" not in log.read_text(errors="replace"):
            if process.poll() is not None or time.monotonic() > give_up:
                text = log.read_text(errors="replace")
                raise RuntimeError(f"Ray does not start on {machine.name}:\n{text}")
            time.sleep(0.05)

    def _log(self, machine: Machine) -> Path:
        return self.folder / f"ray-{machine.name}.log"


def _ip(*arguments: str) -> None:
    done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextlib.contextmanager
def machines(folder: Path, names: Sequence[str]) -> Iterator[Machines]:
    """Make machines and undo them; `folder` gets the logs of Ray."""
    net = Machines(folder, names)
    try:
        net.start()
        yield net
    finally:
        net.close()
