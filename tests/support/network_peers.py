"""Debian's `nginx` and `squid` on free loopback ports: a mirror with TLS, and a forward proxy.

Invariant: what a `with` began is ended with it, by its own process id; no file of the machine's
own nginx or squid is read or written.
"""

from __future__ import annotations

import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from tests.support.docker_registry import free_port

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

START_SECONDS = 30.0
PATH = "/usr/sbin:/usr/bin:/sbin:/bin"
AUTH_HELPER = Path("/usr/lib/squid/basic_ncsa_auth")


class Program:
    """A server that was started; ``log`` has a line for each request."""

    def __init__(self, port: int, log_file: Path) -> None:
        self.port = port
        self.log_file = log_file

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def log(self) -> list[str]:
        lines = self.log_file.read_text().splitlines() if self.log_file.exists() else []
        # Our own look whether it listens.
        return [line for line in lines if "transaction-end-before-headers" not in line]


@contextlib.contextmanager
def nginx(
    folder: Path, upstream: str, certificate: Path, key: Path, *, client_authority: Path | None
) -> Iterator[Program]:
    """Serve `upstream` (host:port, plain HTTP) over TLS.

    Its log has status, method, URI and the Proxy-Authorization that came along.
    """
    demand = ""
    if client_authority is not None:
        demand = f"ssl_verify_client on; ssl_client_certificate {client_authority};"
    with _nginx(
        folder,
        upstream,
        listen="ssl",
        more=f"ssl_certificate {certificate}; ssl_certificate_key {key}; proxy_buffering off;"
        + demand,
    ) as program:
        yield program


@contextlib.contextmanager
def limiting_nginx(folder: Path, upstream: str, bytes_per_second: int) -> Iterator[Program]:
    """Serve `upstream` over plain HTTP, each answer at that rate (`limit_rate`)."""
    # It limits only what it buffers.
    limit = f"proxy_buffering on; proxy_max_temp_file_size 0; limit_rate {bytes_per_second};"
    with _nginx(folder, upstream, more=limit) as program:
        yield program


@contextlib.contextmanager
def _nginx(folder: Path, upstream: str, *, listen: str = "", more: str = "") -> Iterator[Program]:
    folder.mkdir()
    port = free_port()
    config = folder / "nginx.conf"
    temporary = "\n".join(
        f"{name}_temp_path {folder}/{name};"
        for name in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config.write_text(
        f"""
        daemon off; master_process off; pid {folder}/pid; error_log {folder}/error.log;
        events {{ worker_connections 256; }}
        http {{
            {temporary}
            log_format brief '$status $request_method $request_uri "$http_proxy_authorization"';
            access_log {folder}/access.log brief;
            server {{
                listen 127.0.0.1:{port} {listen};
                {more}
                location / {{
                    proxy_pass http://{upstream}; proxy_http_version 1.1;
                }}
            }}
        }}
        """
    )
    command = ["nginx", "-p", str(folder), "-e", str(folder / "error.log"), "-c", str(config)]
    with _running(command, port, folder / "output"):
        yield Program(port, folder / "access.log")


@contextlib.contextmanager
def squid(names: Sequence[str], *, user: str, password: str) -> Iterator[Program]:
    """Forward requests for `names`, which are this machine, to whoever logs in."""
    # As root it becomes another user, who cannot enter the folders of a test.
    folder = Path(tempfile.mkdtemp(prefix="stowray-squid-"))
    try:
        folder.chmod(0o777)
        (folder / "hosts").write_text("".join(f"127.0.0.1 {name}\n" for name in names))
        digest = subprocess.run(
            ["openssl", "passwd", "-apr1", password], capture_output=True, check=True, text=True
        ).stdout.strip()
        (folder / "users").write_text(f"{user}:{digest}\n")
        port = free_port()
        config = folder / "squid.conf"
        config.write_text(
            f"""
http_port 127.0.0.1:{port}
hosts_file {folder}/hosts
dns_nameservers 127.0.0.1
auth_param basic program {AUTH_HELPER} {folder}/users
auth_param basic children 1 startup=1 idle=1
acl known proxy_auth REQUIRED
http_access allow known
http_access deny all
cache deny all
access_log stdio:{folder}/access.log
buffered_logs off
cache_log {folder}/cache.log
cache_store_log none
pid_filename none
pinger_enable off
coredump_dir {folder}
visible_hostname squid.test
max_filedescriptors 1024
shutdown_lifetime 0 seconds
"""
        )
        for file in folder.iterdir():
            file.chmod(0o644)
        with _running(["squid", "-N", "-f", str(config)], port, folder / "output"):
            yield Program(port, folder / "access.log")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def _running(command: list[str], port: int, output: Path) -> Iterator[None]:
    with output.open("wb") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=stream,
            env={"PATH": PATH},
        )
    try:
        _wait(process, port, output)
        yield
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait(process: subprocess.Popen[bytes], port: int, output: Path) -> None:
    give_up = time.monotonic() + START_SECONDS
    while time.monotonic() < give_up and process.poll() is None:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return
        time.sleep(0.02)
    raise RuntimeError(f"{process.args!r} does not start:\n{output.read_text()[-2000:]}")
