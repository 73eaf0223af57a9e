"""A registry over real sockets, in this process, that can misbehave on cue.

    with FakeRegistry() as registry:
        digest = registry.add_image("a/b", "1", layers=[tar_bytes])
        reference = f"{registry.host}/a/b:1"

Faults are scripted per request: ``registry.fault("/blobs/", Fault(cut="reset", after=10))`` makes
the next request whose path contains ``/blobs/`` break after ten body bytes; several faults are used
up one request after the other, ``repeat=True`` keeps the last one for ever. ``registry.requests``
records every request that arrived.
"""

from __future__ import annotations

import base64
import binascii
import gzip
import hashlib
import json
import re
import secrets
import socket
import ssl
import struct
import sys
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, Self
from urllib.parse import parse_qs, urlsplit

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from datetime import datetime

    import trustme

OCI_INDEX = "application/vnd.oci.image.index.v1+json"
OCI_MANIFEST = "application/vnd.oci.image.manifest.v1+json"
OCI_CONFIG = "application/vnd.oci.image.config.v1+json"
OCI_LAYER = "application/vnd.oci.image.layer.v1.tar"
DOCKER_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"
DOCKER_MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"

Headers = tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class Request:
    """One request as it arrived; ``listener`` is ``registry`` or ``cdn``."""

    method: str
    path: str
    query: str
    headers: dict[str, str]
    accept: tuple[str, ...]
    range: str | None
    authorization: str | None
    time: float
    listener: str
    connection: int
    body: bytes = b""

    @property
    def authenticated(self) -> bool:
        return self.authorization is not None


@dataclass(frozen=True)
class Fault:
    """What goes wrong with one answer; the fields combine."""

    status: int | None = None  # answer this instead, with `headers` and `body`
    headers: Headers = ()  # added to whatever is answered, replacing those of the same name
    remove: tuple[str, ...] = ()  # headers left out
    body: bytes | None = None  # other bytes than the right ones
    corrupt: int | None = None  # flip the byte at this offset of what is sent
    cut: str | None = None  # "reset" (RST) or "fin" after `after` body bytes
    after: int = 0
    hang: bool = False  # say nothing until the client gives up
    stall: int | None = None  # say nothing more after that many body bytes
    trickle: tuple[int, float] | None = None  # (bytes, pause) for the body
    delay: float = 0.0  # before the answer
    length: str | int = "right"  # "right", "none" (close-delimited), "chunked", or a false number
    ignore_range: bool = False
    shift_range: int = 0  # answer another range than asked, and say so
    false_range: str | None = None  # the Content-Range to claim
    short_range: int | None = None  # at most that many bytes of the range
    no_total: bool = False
    multipart: bool = False
    encoding: str | None = None  # "gzip" compresses the body; others are claimed only
    then: Callable[[], None] | None = None  # called when the fault is used


@dataclass
class _Script:
    method: str | None
    needle: str
    faults: list[Fault]
    repeat: bool


@dataclass
class _Token:
    scopes: frozenset[str]
    expires: float
    user: str | None


def digest_of(data: bytes, algorithm: str = "sha256") -> str:
    return f"{algorithm}:{hashlib.new(algorithm, data).hexdigest()}"


def compact(document: object) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


def _plain(layer: bytes) -> bytes:
    if layer[:2] == b"\x1f\x8b":
        return gzip.decompress(layer)
    if layer[:4] == b"\x28\xb5\x2f\xfd":
        if sys.version_info >= (3, 14):
            from compression import zstd
        else:
            from backports import zstd
        return zstd.decompress(layer)
    return layer


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    allow_reuse_address = True

    def __init__(
        self,
        registry: FakeRegistry,
        listener: str,
        host: str,
        given: socket.socket | None = None,
    ) -> None:
        self.registry = registry
        self.listener = listener
        self.live: set[socket.socket] = set()
        self.live_lock = threading.Lock()
        if ":" in host:
            self.address_family = socket.AF_INET6
        super().__init__((host, 0), _Handler, bind_and_activate=given is None)
        if given is not None:
            self.socket.close()
            self.socket = given
            self.server_address = given.getsockname()
            self.server_name, self.server_port = self.server_address[:2]
            self.server_activate()

    def server_bind(self) -> None:
        # HTTPServer.server_bind looks the host name up, which can take seconds.
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[:2]

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        with self.live_lock:
            self.live.add(connection)
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        fault = self.registry._take("CONNECT", f"<connect:{self.listener}>")
        if fault is not None:
            self.registry._apply_connect_fault(fault, request)
            if fault.cut or fault.hang:
                return
        context = self.registry._context
        if context is not None:
            with self.live_lock:
                self.live.discard(request)
            try:
                if self.registry.plain_answer and request.recv(1, socket.MSG_PEEK) != b"\x16":
                    request.recv(65536)
                    request.sendall(self.registry.plain_answer)
                    return
                request = context.wrap_socket(request, server_side=True)
            except OSError:
                return
            with self.live_lock:
                self.live.add(request)
        try:
            super().finish_request(request, client_address)
        finally:
            if context is not None:
                self.shutdown_request(request)

    def shutdown_request(self, request: Any) -> None:
        with self.live_lock:
            self.live.discard(request)
        super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.registry.failures.append(error)

    def cut_all(self) -> None:
        with self.live_lock:
            live = list(self.live)
        for connection in live:
            try:
                socket.socket.shutdown(connection, socket.SHUT_RDWR)
            except OSError:
                continue


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server
    wbufsize = 0

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _serve(self) -> None:
        registry = self.server.registry
        split = urlsplit(self.path)
        length = int(self.headers.get("Content-Length") or 0)
        request = Request(
            method=self.command,
            path=split.path,
            query=split.query,
            headers=dict(self.headers.items()),
            accept=tuple(self.headers.get_all("Accept") or ()),
            range=self.headers.get("Range"),
            authorization=self.headers.get("Authorization"),
            time=time.monotonic(),
            listener=self.server.listener,
            connection=self.client_address[1],
            body=self.rfile.read(length) if length else b"",
        )
        with registry._lock:
            registry.requests.append(request)
            registry._arrived.notify_all()
        fault = registry._take(request.method, request.path) or Fault()
        if fault.then is not None:
            fault.then()
        if fault.delay:
            registry._closing.wait(fault.delay)
        if fault.hang:
            self._hang()
            return
        if fault.cut and fault.after < 0:
            self._cut(fault.cut)
            return
        if fault.status is not None:
            self._answer(request, fault, fault.status, [], fault.body or b"")
            return
        if self.server.listener == "cdn":
            status, headers, body = registry._serve_cdn(request)
        else:
            status, headers, body = registry._serve(request)
        if fault.body is not None:
            body = fault.body
        self._answer(request, fault, status, headers, body)

    do_GET = _serve  # noqa: N815
    do_HEAD = _serve  # noqa: N815
    do_POST = _serve  # noqa: N815

    def _answer(
        self,
        request: Request,
        fault: Fault,
        status: int,
        headers: list[tuple[str, str]],
        body: bytes | memoryview,
    ) -> None:
        if fault.encoding is not None:
            headers.append(("Content-Encoding", fault.encoding))
            if fault.encoding == "gzip":
                body = gzip.compress(bytes(body), 1)
        ranged = fault.status is None and not fault.ignore_range
        if status == 200 and request.range is not None and ranged:
            status, headers, body = self._ranged(request.range, fault, headers, body)
        if fault.corrupt is not None and fault.corrupt < len(body):
            changed = bytearray(body)
            changed[fault.corrupt] ^= 0xFF
            body = bytes(changed)
        lines = [f"HTTP/1.1 {status} {_REASONS.get(status, 'Status')}"]
        close = False
        if fault.length == "none":
            close = True
            headers.append(("Connection", "close"))
        elif fault.length == "chunked":
            headers.append(("Transfer-Encoding", "chunked"))
        elif fault.length == "right":
            headers.append(("Content-Length", str(len(body))))
        else:
            headers.append(("Content-Length", str(fault.length)))
        removed = {name.lower() for name in fault.remove}
        replaced = {name.lower() for name, _ in fault.headers}
        lines += [
            f"{name}: {value}"
            for name, value in headers
            if name.lower() not in removed and name.lower() not in replaced
        ]
        lines += [f"{name}: {value}" for name, value in fault.headers]
        self.wfile.write(("\r\n".join(lines) + "\r\n\r\n").encode("latin-1"))
        if request.method == "HEAD":
            self.close_connection = close
            return
        if isinstance(fault.length, int) and fault.length != len(body):
            close = True
        self._send_body(fault, memoryview(body))
        if close:
            self.close_connection = True

    def _send_body(self, fault: Fault, body: memoryview) -> None:
        end = len(body)
        if fault.cut:
            end = min(end, fault.after)
        if fault.stall is not None:
            end = min(end, fault.stall)
        step, pause = fault.trickle or (1 << 20, 0.0)
        if end > step:
            self.server.registry._count_body(1)
        for start in range(0, end, step):
            if end > step and start + step >= end:
                # Before its last piece is sent: with that one the client may go on.
                self.server.registry._count_body(-1)
            piece = body[start : min(start + step, end)]
            if fault.length == "chunked":
                self.wfile.write(b"%x\r\n" % len(piece) + piece.tobytes() + b"\r\n")
            else:
                self.connection.sendall(piece)
            if pause and self.server.registry._closing.wait(pause):
                break
        if fault.stall is not None:
            self._hang()
        elif fault.cut:
            self._cut(fault.cut)
        elif fault.length == "chunked":
            self.wfile.write(b"0\r\n\r\n")

    def _cut(self, how: str) -> None:
        self.close_connection = True
        _cut(self.connection, how)

    def _hang(self) -> None:
        """Wait until the client closes (or the registry ends), then close."""
        self.close_connection = True
        self.connection.settimeout(0.1)
        while not self.server.registry._closing.is_set():
            try:
                if not self.connection.recv(1):
                    return
            except TimeoutError:
                continue
            except OSError:
                return

    def _ranged(
        self,
        asked: str,
        fault: Fault,
        headers: list[tuple[str, str]],
        body: bytes | memoryview,
    ) -> tuple[int, list[tuple[str, str]], bytes | memoryview]:
        match = re.fullmatch(r"bytes=([0-9]+)-([0-9]*)", asked)
        total = len(body)
        if match is None:
            return 200, headers, body
        first = int(match[1]) + fault.shift_range
        last = min(int(match[2]) if match[2] else total - 1, total - 1)
        if first >= total or last < first:
            return 416, [*headers, ("Content-Range", f"bytes */{total}")], b""
        if fault.short_range is not None:
            last = min(last, first + fault.short_range - 1)
        view = memoryview(body)[first : last + 1]
        if fault.multipart:
            mixed = b"--x\r\nContent-Range: bytes %d-%d/%d\r\n\r\n" % (first, last, total)
            mixed += view.tobytes() + b"\r\n--x--\r\n"
            kept = [(name, value) for name, value in headers if name != "Content-Type"]
            return 206, [*kept, ("Content-Type", "multipart/byteranges; boundary=x")], mixed
        total_text = "*" if fault.no_total else str(total)
        claimed = fault.false_range
        if claimed is None:
            claimed = f"bytes {first}-{last}/{total_text}"
        return 206, [*headers, ("Content-Range", claimed)], view


_REASONS = {200: "OK", 206: "Partial Content", 307: "Temporary Redirect", 401: "Unauthorized"}


def _cut(connection: socket.socket, how: str) -> None:
    if how == "reset":
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        # rfile and wfile hold the socket open: detach the descriptor, so that close() means close.
        socket.close(connection.detach())
    else:
        socket.socket.shutdown(connection, socket.SHUT_RDWR)


@dataclass
class FakeRegistry:
    """The registry; ``redirect=True`` serves blobs from a second listener with signed URLs."""

    auth: str | None = None  # None, "basic" or "bearer"
    users: dict[str, str] = field(default_factory=dict)
    anonymous: bool = True  # bearer: tokens without credentials may pull
    redirect: bool = False
    redirect_status: int = 307
    authority: trustme.CA | None = None  # given: TLS with a certificate of this authority
    certificate_names: Sequence[str] = ()  # other names than the address and localhost
    not_after: datetime | None = None  # when the certificate expires
    address: str = "127.0.0.1"
    token_lifetime: float = 300.0
    identity_tokens: dict[str, str] = field(default_factory=dict)  # refresh token -> user
    oauth_post: bool = True
    listener: socket.socket | None = None  # given: listens there, not on `address`
    plain_answer: bytes = b""  # what a TLS listener says to plain HTTP

    def __post_init__(self) -> None:
        self.requests: list[Request] = []
        self.bodies = 0  # of several pieces, under way but for their last piece
        self.failures: list[BaseException | None] = []
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.tags: dict[tuple[str, str], str] = {}
        self.repositories: set[str] = set()
        self.signatures: set[str] = set()
        self.tokens: dict[str, _Token] = {}
        self.expired_answer: tuple[int, bytes] = (403, b"<Error><Code>AccessDenied</Code></Error>")
        self._scripts: list[_Script] = []
        self._lock = threading.Lock()
        self._arrived = threading.Condition(self._lock)
        self._closing = threading.Event()
        self._context: ssl.SSLContext | None = None
        self._threads: list[threading.Thread] = []

    def __enter__(self) -> Self:
        if self.authority is not None:
            names = self.certificate_names or (self.address, "localhost")
            certificate = self.authority.issue_cert(*names, not_after=self.not_after)
            self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            certificate.configure_cert(self._context)
        self._server = _Server(self, "registry", self.address, self.listener)
        self._cdn = _Server(self, "cdn", self.address)
        for server in (self._server, self._cdn):
            thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
            thread.start()
            self._threads.append(thread)
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
        if self.failures:
            raise AssertionError(f"the fake registry failed: {self.failures!r}")

    def close(self) -> None:
        """Stop listening and cut all connections."""
        self._closing.set()
        for server in (self._server, self._cdn):
            server.shutdown()
            server.server_close()
            server.cut_all()
        for thread in self._threads:
            thread.join()

    def cut_connections(self) -> None:
        """Close every connection, as a server does with idle ones."""
        self._server.cut_all()
        self._cdn.cut_all()

    @property
    def live_connections(self) -> int:
        return len(self._server.live) + len(self._cdn.live)

    @property
    def host(self) -> str:
        return self._name(self._server)

    @property
    def cdn_host(self) -> str:
        return self._name(self._cdn)

    @property
    def url(self) -> str:
        return f"{self._scheme}://{self.host}"

    @property
    def _scheme(self) -> str:
        return "http" if self.authority is None else "https"

    def _name(self, server: _Server) -> str:
        address = f"[{self.address}]" if ":" in self.address else self.address
        return f"{address}:{server.server_port}"

    # Content

    def add_blob(self, data: bytes, digest: str | None = None) -> str:
        """Hold ``data``; with ``digest`` under that (perhaps false) name."""
        name = digest or digest_of(data)
        self.blobs[name] = data
        return name

    def add_manifest(
        self,
        repository: str,
        body: bytes,
        media_type: str = OCI_MANIFEST,
        tag: str | None = None,
        digest: str | None = None,
    ) -> str:
        name = digest or digest_of(body)
        self.repositories.add(repository)
        self.manifests[repository, name] = (media_type, body)
        if tag is not None:
            self.tags[repository, tag] = name
        return name

    def add_image(
        self,
        repository: str,
        tag: str | None = None,
        layers: Sequence[bytes] = (),
        *,
        compression: str | None = "gzip",
        config_overrides: Mapping[str, Any] | None = None,
        manifest_overrides: Mapping[str, Any] | None = None,
        os: str = "linux",
        architecture: str = "amd64",
    ) -> str:
        """Add an image of ``layers`` (tars, plain or already compressed); return its digest."""
        diff_ids = []
        descriptors = []
        for layer in layers:
            plain = _plain(layer)
            diff_ids.append(digest_of(plain))
            media_type, blob = OCI_LAYER, layer
            if layer is plain and compression == "gzip":
                blob = gzip.compress(layer, 1, mtime=0)
            elif layer is plain and compression == "zstd":
                if sys.version_info >= (3, 14):
                    from compression import zstd
                else:
                    from backports import zstd
                blob = zstd.compress(layer, 3)
            if blob[:2] == b"\x1f\x8b":
                media_type += "+gzip"
            elif blob[:4] == b"\x28\xb5\x2f\xfd":
                media_type += "+zstd"
            descriptors.append(
                {"mediaType": media_type, "digest": self.add_blob(blob), "size": len(blob)}
            )
        config = compact(
            {
                "architecture": architecture,
                "os": os,
                "config": {"Env": ["PATH=/usr/bin:/bin"], "Cmd": ["/bin/sh"]},
                "rootfs": {"type": "layers", "diff_ids": diff_ids},
                "history": [{"created_by": f"layer {i}"} for i in range(len(diff_ids))],
                **(config_overrides or {}),
            }
        )
        manifest = compact(
            {
                "schemaVersion": 2,
                "mediaType": OCI_MANIFEST,
                "config": {
                    "mediaType": OCI_CONFIG,
                    "digest": self.add_blob(config),
                    "size": len(config),
                },
                "layers": descriptors,
                **(manifest_overrides or {}),
            }
        )
        return self.add_manifest(repository, manifest, OCI_MANIFEST, tag)

    def add_index(
        self,
        repository: str,
        tag: str | None,
        images: Mapping[str, str],
        *,
        extra: Sequence[Mapping[str, Any]] = (),
        media_type: str = OCI_INDEX,
    ) -> str:
        """Add an index of ``images``: platform text (``linux/arm64/v8``) to manifest digest."""
        entries: list[Mapping[str, Any]] = []
        for platform, digest in images.items():
            kind, body = self.manifests[repository, digest]
            names = dict(zip(("os", "architecture", "variant"), platform.split("/"), strict=False))
            entries.append(
                {"mediaType": kind, "digest": digest, "size": len(body), "platform": names}
            )
        index = compact(
            {"schemaVersion": 2, "mediaType": media_type, "manifests": [*entries, *extra]}
        )
        return self.add_manifest(repository, index, media_type, tag)

    # Faults and records

    def fault(
        self, needle: str, *faults: Fault, method: str | None = None, repeat: bool = False
    ) -> None:
        """Script the next requests whose path contains ``needle``."""
        with self._lock:
            self._scripts.append(_Script(method, needle, list(faults), repeat))

    def fault_connections(self, *faults: Fault, cdn: bool = False, repeat: bool = False) -> None:
        """Script the next connections, before a byte of a request is read."""
        self.fault(f"<connect:{'cdn' if cdn else 'registry'}>", *faults, repeat=repeat)

    def clear_faults(self) -> None:
        with self._lock:
            self._scripts.clear()

    def count(self, needle: str = "", method: str | None = None) -> int:
        """Return how many requests had ``needle`` in their path."""
        return len(self.seen(needle, method))

    def seen(self, needle: str = "", method: str | None = None) -> list[Request]:
        with self._lock:
            return [
                request
                for request in self.requests
                if needle in request.path and method in (None, request.method)
            ]

    def wait_for(self, needle: str, count: int = 1, timeout: float = 30.0) -> None:
        """Wait until ``count`` such requests have arrived."""

        def arrived() -> bool:
            return sum(needle in request.path for request in self.requests) >= count

        with self._arrived:
            if not self._arrived.wait_for(arrived, timeout):
                raise AssertionError(f"no {count} requests for {needle!r} in {timeout} s")

    def expire_signatures(self) -> None:
        """Make every signed URL given out so far invalid."""
        with self._lock:
            self.signatures.clear()

    def grant(self, token: str, scopes: Sequence[str], user: str | None = None) -> None:
        """Take ``token`` for one that was given out."""
        with self._lock:
            expires = time.monotonic() + self.token_lifetime
            self.tokens[token] = _Token(frozenset(scopes), expires, user)

    def revoke_tokens(self) -> None:
        with self._lock:
            self.tokens.clear()

    def _count_body(self, change: int) -> None:
        with self._lock:
            self.bodies += change

    def _take(self, method: str, path: str) -> Fault | None:
        with self._lock:
            for script in self._scripts:
                if script.needle not in path or script.method not in (None, method):
                    continue
                if script.repeat and len(script.faults) == 1:
                    return script.faults[0]
                fault = script.faults.pop(0)
                if not script.faults:
                    self._scripts.remove(script)
                return fault
        return None

    def _apply_connect_fault(self, fault: Fault, connection: socket.socket) -> None:
        if fault.then is not None:
            fault.then()
        if fault.hang:
            self._closing.wait()
        if fault.cut:
            _cut(connection, fault.cut)

    # Answers

    def _serve(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        if request.path == "/token":
            return self._serve_token(request)
        denied = self._denied(request)
        if denied is not None:
            return denied
        if request.path in ("/v2", "/v2/"):
            return 200, [("Content-Type", "application/json")], b"{}"
        match = re.fullmatch(r"/v2/(.+)/(manifests|blobs|tags)/([^/]+)", request.path)
        if match is None:
            return _error(404, "NOT_FOUND", "no such endpoint")
        repository, kind, target = match.groups()
        if kind == "manifests":
            return self._serve_manifest(repository, target)
        if kind == "tags":
            tags = sorted(tag for name, tag in self.tags if name == repository)
            return 200, [], compact({"name": repository, "tags": tags})
        blob = self.blobs.get(target)
        if blob is None:
            return _error(404, "BLOB_UNKNOWN", "blob unknown to registry")
        if self.redirect:
            signature = secrets.token_hex(8)
            with self._lock:
                self.signatures.add(signature)
            location = (
                f"{self._scheme}://{self.cdn_host}/cdn/{target}"
                f"?X-Amz-Signature={signature}&X-Amz-Security-Token=cdnsecret"
            )
            return self.redirect_status, [("Location", location)], b"moved"
        headers = [
            ("Content-Type", "application/octet-stream"),
            ("Docker-Content-Digest", target),
            ("Accept-Ranges", "bytes"),
        ]
        return 200, headers, blob

    def _serve_manifest(
        self, repository: str, target: str
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        digest = self.tags.get((repository, target), target)
        found = self.manifests.get((repository, digest))
        if found is None:
            code = "MANIFEST_UNKNOWN" if repository in self.repositories else "NAME_UNKNOWN"
            return _error(404, code, "manifest unknown")
        media_type, body = found
        headers = [("Content-Type", media_type), ("Docker-Content-Digest", digest)]
        return 200, headers, body

    def _serve_cdn(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        if request.authorization is not None:
            return 400, [], b"<Error><Code>InvalidArgument</Code></Error>"
        signature = parse_qs(request.query).get("X-Amz-Signature", [""])[0]
        if signature not in self.signatures:
            status, body = self.expired_answer
            return status, [("Content-Type", "application/xml")], body
        blob = self.blobs.get(request.path.removeprefix("/cdn/"))
        if blob is None:
            return 404, [], b"<Error><Code>NoSuchKey</Code></Error>"
        return 200, [("Content-Type", "binary/octet-stream")], blob

    def _denied(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes] | None:
        if self.auth is None:
            return None
        scheme, _, value = (request.authorization or "").partition(" ")
        if self.auth == "basic":
            if scheme.lower() == "basic" and self._user(value) is not None:
                return None
            return _error(
                401,
                "UNAUTHORIZED",
                "authentication required",
                [("WWW-Authenticate", 'Basic realm="Fake Registry"')],
            )
        match = re.match(r"/v2/(.+)/(?:manifests|blobs|tags)/", request.path)
        needed = f"repository:{match[1]}:pull" if match else None
        token = self.tokens.get(value) if scheme.lower() == "bearer" else None
        challenge = f'Bearer realm="{self.url}/token",service="{self.host}"'
        if needed is not None:
            challenge += f',scope="{needed}"'
        if token is None or token.expires <= time.monotonic():
            if value:
                challenge += ',error="invalid_token"'
        elif needed is None or needed in token.scopes:
            return None
        else:
            challenge += ',error="insufficient_scope"'
        return _error(
            401, "UNAUTHORIZED", "authentication required", [("WWW-Authenticate", challenge)]
        )

    def _user(self, encoded: str) -> str | None:
        try:
            user, _, password = base64.b64decode(encoded).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return user if self.users.get(user) == password and user else None

    def _serve_token(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        user: str | None = None
        if request.method == "POST":
            if not self.oauth_post:
                return 405, [], b""
            form = {key: values[0] for key, values in parse_qs(request.body.decode()).items()}
            scopes = form.get("scope", "").split()
            if form.get("grant_type") == "refresh_token":
                user = self.identity_tokens.get(form.get("refresh_token", ""))
            elif self.users.get(form.get("username", "")) == form.get("password"):
                user = form["username"]
            if user is None:
                return _error(401, "UNAUTHORIZED", "bad credentials")
        else:
            scopes = parse_qs(request.query).get("scope", [])
            scheme, _, value = (request.authorization or "").partition(" ")
            if scheme.lower() == "basic":
                user = self._user(value)
                if user is None:
                    return _error(401, "UNAUTHORIZED", "incorrect username or password")
        granted = frozenset(scopes) if user is not None or self.anonymous else frozenset[str]()
        token = secrets.token_hex(16)
        with self._lock:
            self.tokens[token] = _Token(granted, time.monotonic() + self.token_lifetime, user)
        answer = {"token": token, "access_token": token, "expires_in": int(self.token_lifetime)}
        return 200, [("Content-Type", "application/json")], compact(answer)


def _error(
    status: int, code: str, message: str, headers: Sequence[tuple[str, str]] = ()
) -> tuple[int, list[tuple[str, str]], bytes]:
    body = compact({"errors": [{"code": code, "message": message}]})
    return status, [*headers, ("Content-Type", "application/json")], body


def incompressible(size: int, seed: int = 1) -> bytes:
    """Return ``size`` bytes, the same for the same seed, that no compressor makes smaller."""
    return hashlib.shake_256(struct.pack(">Q", seed)).digest(size)
