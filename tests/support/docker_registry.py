"""A real `docker-registry` (the reference implementation) on a free loopback port.

Invariant: what `start` began is ended by `stop`, by its own process id, also when starting failed.
"""

from __future__ import annotations

import contextlib
import http.client
import shutil
import socket
import subprocess
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from tests.support.token_server import TokenServer

PROGRAM = "docker-registry"
START_SECONDS = 30.0


def available() -> bool:
    return shutil.which(PROGRAM) is not None


def free_port() -> int:
    """A port that was free just now (the registry cannot tell which one it took)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class DockerRegistry:
    """One registry process with its files under `root`; `host` is what a reference starts with."""

    def __init__(
        self,
        root: Path,
        *,
        htpasswd: str | None = None,
        token: TokenServer | None = None,
        delete: bool = False,
    ) -> None:
        self.root = root
        self.htpasswd = htpasswd
        self.token = token
        self.delete = delete
        self.port = 0
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        path = self.root / "registry.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def start(self) -> None:
        """Start, or start again on the same port with the same content."""
        self.root.mkdir(parents=True, exist_ok=True)
        # Another process may take a probed port before the registry binds it: try a few.
        for attempt in range(5):
            if not self.port or attempt:
                self.port = free_port()
            if self._try_start():
                return
        raise RuntimeError(f"{PROGRAM} does not start:\n{self.log[-2000:]}")

    def _try_start(self) -> bool:
        config = self.root / "config.yml"
        config.write_text(self._config())
        with (self.root / "registry.log").open("ab") as log:
            self._process = subprocess.Popen(
                [PROGRAM, "serve", str(config)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # The machine's own proxies and registry settings are not for this one.
                env={"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(self.root)},
            )
        give_up = time.monotonic() + START_SECONDS
        while time.monotonic() < give_up:
            if self._process.poll() is not None:
                self._process = None
                return False
            with contextlib.suppress(OSError, http.client.HTTPException):
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=2)
                with contextlib.closing(connection):
                    connection.request("GET", "/v2/")
                    if connection.getresponse().status in (200, 401):
                        return True
            time.sleep(0.02)
        self.stop()
        return False

    def _config(self) -> str:
        lines = [
            "version: 0.1",
            "log: {level: info, accesslog: {disabled: false}}",
            "storage:",
            f"  filesystem: {{rootdirectory: {self.root / 'data'}}}",
            f"  delete: {{enabled: {'true' if self.delete else 'false'}}}",
            "  maintenance: {uploadpurging: {enabled: false}}",
            f"http: {{addr: '127.0.0.1:{self.port}', secret: not-secret}}",
        ]
        if self.htpasswd is not None:
            path = self.root / "htpasswd"
            path.write_text(self.htpasswd + "\n")
            lines.append(f"auth: {{htpasswd: {{realm: stowray-tests, path: {path}}}}}")
        if self.token is not None:
            lines.append(self.token.config())
        return "\n".join(lines) + "\n"

    def stop(self) -> None:
        """End the process; content and port stay for a later `start`."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@contextlib.contextmanager
def running(
    root: Path, *, htpasswd: str | None = None, token: TokenServer | None = None
) -> Iterator[DockerRegistry]:
    registry = DockerRegistry(root, htpasswd=htpasswd, token=token)
    registry.start()
    try:
        yield registry
    finally:
        registry.stop()
