from __future__ import annotations

import contextlib
import gc
import socket
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from stowray.pipeline.errors import (
    CancelledError,
    RegistryError,
    StowrayError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.proxies import Proxies
from stowray.pipeline.transport import Transport
from tests.support.registry import FakeRegistry, Fault, incompressible

if TYPE_CHECKING:
    from collections.abc import Iterator

    from stowray.pipeline.response import Response
    from stowray.pipeline.watchdog import Watch

SIZE = 3 << 20
DATA = incompressible(SIZE)


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_blob(DATA, "blob")
        yield made


@pytest.fixture
def transport() -> Iterator[Transport]:
    made = Transport(connect_seconds=5, stall_seconds=20)
    yield made
    made.close()


def blob(registry: FakeRegistry) -> str:
    return f"{registry.url}/v2/a/blobs/blob"


def read_all(response: Response, step: int = 1 << 18) -> bytes:
    whole = bytearray()
    buffer = memoryview(bytearray(step))
    with response:
        while count := response.read_into(buffer):
            whole += buffer[:count]
    return bytes(whole)


@pytest.mark.parametrize("step", [1, 4096, 1 << 18, 8 << 20])
@pytest.mark.parametrize("length", ["right", "chunked", "none"])
def test_a_body_arrives_as_it_was_sent(
    registry: FakeRegistry, transport: Transport, step: int, length: str
) -> None:
    data = DATA[:5000] if step == 1 else DATA
    registry.fault("/blobs/", Fault(length=length, body=data))
    assert read_all(transport.exchange("GET", blob(registry)), step) == data


def test_connections_are_used_again(registry: FakeRegistry, transport: Transport) -> None:
    for _ in range(5):
        assert read_all(transport.exchange("GET", blob(registry))) == DATA
        with transport.exchange("GET", f"{registry.url}/v2/a/blobs/none") as response:
            assert response.status == 404
            response.finish()
        with transport.exchange("HEAD", blob(registry)) as response:
            response.finish()
    assert len({request.connection for request in registry.requests}) == 1


def test_a_long_rest_is_not_drained(registry: FakeRegistry, transport: Transport) -> None:
    with transport.exchange("GET", blob(registry)) as response:
        response.read_piece(1)
        response.finish()
    assert read_all(transport.exchange("GET", blob(registry))) == DATA
    assert len({request.connection for request in registry.requests}) == 2


def test_a_kept_connection_that_the_server_closed_is_replaced(
    registry: FakeRegistry, transport: Transport
) -> None:
    for _ in range(3):
        assert read_all(transport.exchange("GET", blob(registry))) == DATA
        registry.cut_connections()


def test_a_kept_connection_that_dies_at_the_next_request_is_replaced(
    registry: FakeRegistry, transport: Transport
) -> None:
    assert read_all(transport.exchange("GET", blob(registry))) == DATA
    registry.fault("/blobs/", Fault(cut="reset", after=-1))
    assert read_all(transport.exchange("GET", blob(registry))) == DATA
    registry.fault("/blobs/", Fault(cut="fin", after=-1))
    assert read_all(transport.exchange("GET", blob(registry))) == DATA


def test_a_verdict_that_comes_late_does_not_reach_who_has_the_connection_next(
    registry: FakeRegistry, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    watches: list[Watch] = []
    monkeypatch.setattr(transport.watchdog, "add", watches.append)
    assert read_all(transport.exchange("GET", blob(registry))) == DATA
    with transport.exchange("GET", blob(registry)) as response:
        # The watchdog looked at the first exchange before that ended, and acts only now.
        watches[0].cut("cancelled")
        assert read_all(response) == DATA
    assert len({request.connection for request in registry.requests}) == 1


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        pytest.param(Fault(cut="fin", after=0), "CUT", id="FIN before the body"),
        pytest.param(Fault(cut="fin", after=1), "CUT", id="FIN after 1"),
        pytest.param(Fault(cut="fin", after=SIZE // 2), "CUT", id="FIN at half"),
        pytest.param(Fault(cut="fin", after=SIZE - 1), "CUT", id="FIN at size - 1"),
        pytest.param(Fault(cut="reset", after=SIZE // 2), "CUT", id="RST at half"),
        pytest.param(Fault(cut="reset", after=-1), "CUT", id="RST for an answer"),
        pytest.param(Fault(cut="fin", after=-1), "CUT", id="FIN for an answer"),
        pytest.param(Fault(length="chunked", cut="fin", after=SIZE // 2), "CUT", id="chunks cut"),
        pytest.param(Fault(length=SIZE + 1), "CUT", id="length one too large"),
    ],
)
def test_an_early_end_is_never_silent(
    registry: FakeRegistry, transport: Transport, fault: Fault, code: str
) -> None:
    registry.fault("/blobs/", fault)
    with pytest.raises(UnavailableError) as caught:
        read_all(transport.exchange("GET", blob(registry)))
    assert caught.value.code == code
    assert caught.value.url == blob(registry)


def test_headers_without_end(transport: Transport) -> None:
    with _answering(b"HTTP/1.1 200 OK\r\n" + b"X-A: b\r\n" * 500 + b"\r\n") as host:
        with pytest.raises(UnavailableError) as caught:
            transport.exchange("GET", f"http://{host}/v2/")
        assert caught.value.code == "PROTOCOL"


@pytest.mark.parametrize(
    "answer", [b"\x15\x03\x03\x00\x02\x02\x28", b"SSH-2.0-x\r\n", b"HTTP/1.1 2 OK\r\n\r\n"]
)
def test_what_is_not_http(transport: Transport, answer: bytes) -> None:
    with _answering(answer) as host, pytest.raises(UnavailableError):
        transport.exchange("GET", f"http://{host}/v2/")


def test_silence_is_cut_short(registry: FakeRegistry) -> None:
    transport = Transport(connect_seconds=0.2, stall_seconds=0.3)
    try:
        registry.fault("/blobs/", Fault(hang=True), Fault(stall=100_000))
        for _ in range(2):
            with pytest.raises(UnavailableError) as caught:
                read_all(transport.exchange("GET", blob(registry)))
            assert caught.value.code in ("TIMEOUT", "SLOW")
    finally:
        transport.close()


def test_a_trickle_is_cut_short(registry: FakeRegistry) -> None:
    transport = Transport(connect_seconds=5, stall_seconds=0.5, minimum_rate=1000)
    try:
        registry.fault("/blobs/", Fault(trickle=(1, 0.05)))
        with pytest.raises(UnavailableError) as caught:
            read_all(transport.exchange("GET", blob(registry)))
        assert caught.value.code == "SLOW"
    finally:
        transport.close()


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(hang=True), id="waiting for headers"),
        pytest.param(Fault(stall=100_000), id="in the body"),
        pytest.param(Fault(trickle=(1, 0.02)), id="in a trickle"),
    ],
)
def test_a_cancelled_exchange_loses_its_connection(
    registry: FakeRegistry, transport: Transport, fault: Fault
) -> None:
    stop = threading.Event()
    registry.fault("/blobs/", fault)
    failed: list[Exception] = []

    def work() -> None:
        try:
            read_all(transport.exchange("GET", blob(registry), cancelled=stop.is_set))
        except StowrayError as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    registry.wait_for("/blobs/")
    stop.set()
    thread.join(10)
    assert [type(error) for error in failed] == [CancelledError]


def test_connecting_can_be_cancelled() -> None:
    # A listener whose queue is full does not answer: the SYN is dropped.
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(0)
        port = listener.getsockname()[1]
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
            fillers.append(filler)
        transport = Transport(connect_seconds=60)
        stop = threading.Event()
        threading.Timer(0.2, stop.set).start()
        try:
            with pytest.raises((CancelledError, UnavailableError)) as caught:
                transport.exchange("GET", f"http://127.0.0.1:{port}/", cancelled=stop.is_set)
            assert caught.type is CancelledError
        finally:
            transport.close()
            for filler in fillers:
                filler.close()


def test_a_host_that_is_not_there() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        transport = Transport()
        with pytest.raises(UnavailableError) as caught:
            transport.exchange("GET", f"http://127.0.0.1:{port}/v2/?sig=hunter2hunter2")
        assert caught.value.code == "UNREACHABLE"
        assert "hunter2" not in str(caught.value)
        transport.close()


def test_ipv6_hosts(transport: Transport) -> None:
    try:
        with socket.socket(socket.AF_INET6) as probe:
            probe.bind(("::1", 0))
    except OSError as error:
        pytest.skip(f"this machine has no ::1: {error}")
    with FakeRegistry(address="::1") as registry:
        registry.add_blob(DATA, "blob")
        assert read_all(transport.exchange("GET", blob(registry))) == DATA
        assert registry.requests[0].headers["Host"] == registry.host


def test_what_is_sent(registry: FakeRegistry, transport: Transport) -> None:
    headers = (("Accept", "a/b"), ("Accept", "c/d"), ("Range", "bytes=0-4"))
    with transport.exchange("GET", blob(registry), headers) as response:
        assert response.status == 206
        assert response.read(100) == DATA[:5]
    (request,) = registry.requests
    assert request.accept == ("a/b", "c/d")
    assert request.headers["Accept-Encoding"] == "identity"
    assert not request.authenticated
    assert "Cookie" not in request.headers


def test_netrc_is_not_used(
    registry: FakeRegistry,
    transport: Transport,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login u password p\ndefault login u password p\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(netrc))
    read_all(transport.exchange("GET", blob(registry)))
    assert not registry.requests[0].authenticated


def test_cookies_are_not_kept(registry: FakeRegistry, transport: Transport) -> None:
    registry.fault("/blobs/", Fault(headers=(("Set-Cookie", "a=b; Path=/"),)))
    read_all(transport.exchange("GET", blob(registry)))
    read_all(transport.exchange("GET", blob(registry)))
    assert "Cookie" not in registry.requests[1].headers


def test_redirects_are_left_to_the_caller(registry: FakeRegistry, transport: Transport) -> None:
    registry.redirect = True
    with transport.exchange("GET", blob(registry)) as response:
        assert response.status == 307
        assert response.header("location")
    assert registry.count("/cdn/") == 0


@pytest.mark.parametrize("path", ["/v2/\r\nX-Injected: 1", "/v2/ x"])
def test_a_url_cannot_carry_headers(
    registry: FakeRegistry, transport: Transport, path: str
) -> None:
    with contextlib.suppress(StowrayError), transport.exchange("GET", registry.url + path) as got:
        got.finish()
    assert all("X-Injected" not in request.headers for request in registry.requests)


# TLS


@pytest.fixture(scope="module")
def authority() -> trustme.CA:
    return trustme.CA()


@pytest.fixture
def ca_file(authority: trustme.CA, tmp_path: Path) -> str:
    path = tmp_path / "ca.pem"
    authority.cert_pem.write_to_path(str(path))
    return str(path)


def test_tls_with_a_known_authority(authority: trustme.CA, ca_file: str) -> None:
    transport = Transport(ca_file=ca_file)
    with FakeRegistry(authority=authority) as registry:
        registry.add_blob(DATA, "blob")
        for _ in range(2):
            assert read_all(transport.exchange("GET", blob(registry))) == DATA
        assert len({request.connection for request in registry.requests}) == 1
        transport.close()


@pytest.mark.parametrize("wrong", ["authority", "name", "expired"])
def test_a_certificate_that_is_not_right(
    authority: trustme.CA, ca_file: str, wrong: str, tmp_path: Path
) -> None:
    import datetime

    names = ["other.example"] if wrong == "name" else ["127.0.0.1"]
    until = datetime.datetime(2020, 1, 1) if wrong == "expired" else None
    issuer = trustme.CA() if wrong == "authority" else authority
    with FakeRegistry(authority=issuer, certificate_names=names, not_after=until) as registry:
        registry.add_blob(DATA, "blob")
        transport = Transport(ca_file=ca_file)
        with pytest.raises(RegistryError, match="certificate is not trusted") as caught:
            transport.exchange("GET", blob(registry))
        assert not caught.value.retryable
        assert registry.requests == []
        transport.close()


def test_plain_http_on_a_tls_url(registry: FakeRegistry) -> None:
    transport = Transport(connect_seconds=0.5)
    with pytest.raises(RegistryError, match=r"--plain-http 127\.0\.0\.1") as caught:
        transport.exchange("GET", blob(registry).replace("http:", "https:"))
    assert not caught.value.retryable
    transport.close()


def test_a_cancelled_tls_exchange_loses_its_connection(authority: trustme.CA, ca_file: str) -> None:
    transport = Transport(ca_file=ca_file)
    with FakeRegistry(authority=authority) as registry:
        registry.add_blob(DATA, "blob")
        registry.fault("/blobs/", Fault(stall=100_000))
        with pytest.raises(CancelledError):
            read_all(
                transport.exchange(
                    "GET", blob(registry), cancelled=lambda: registry.count("/blobs/") > 0
                )
            )
        transport.close()


def test_an_authority_file_must_be_one(tmp_path: Path) -> None:
    path = tmp_path / "ca.pem"
    path.write_text("nothing")
    for name in (path, tmp_path / "missing.pem"):
        transport = Transport(ca_file=str(name))
        with pytest.raises(UsageError, match="ca_file"):
            transport.exchange("GET", "https://127.0.0.1:1/")
        transport.close()


# Proxies


def test_a_proxy_is_used_and_its_login_is_not_for_the_origin() -> None:
    with FakeRegistry() as proxy:
        transport = Transport(
            proxies=Proxies.read({"HTTP_PROXY": f"http://user:hunter2@{proxy.host}"})
        )
        with transport.exchange("GET", "http://registry.example/v2/") as response:
            response.finish()
        (request,) = proxy.requests
        sent = {name.lower(): value for name, value in request.headers.items()}
        assert sent["proxy-authorization"].startswith("Basic ")
        assert request.headers["Host"] == "registry.example"
        assert not request.authenticated
        transport.close()


def test_a_proxy_that_wants_another_login() -> None:
    answer = b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n"
    with _answering(answer) as host:
        transport = Transport(proxies=Proxies.read({"HTTPS_PROXY": f"http://u:hunter2@{host}"}))
        with pytest.raises(RegistryError) as caught:
            transport.exchange("GET", "https://registry.example/v2/")
        assert caught.value.code == "PROXY"
        assert not caught.value.retryable, "the proxy would say the same again"
        assert "407" in str(caught.value)
        assert "hunter2" not in str(caught.value)
        transport.close()


# Nothing is left behind


def test_nothing_leaks(registry: FakeRegistry) -> None:
    def open_files() -> int:
        gc.collect()
        return len(list(Path("/proc/self/fd").iterdir()))

    threads = threading.active_count()
    transport = Transport(stall_seconds=20)
    registry.fault("/blobs/", *[Fault(cut="reset", after=50_000) for _ in range(30)])
    before = open_files()
    for index in range(60):
        with (
            contextlib.suppress(UnavailableError),
            transport.exchange("GET", blob(registry)) as response,
        ):
            if index % 3:
                response.read_piece(1 << 16)
                response.read(SIZE)
    transport.close()
    registry.cut_connections()
    # What the server side still holds is counted too: at most the last connection's end.
    assert open_files() <= before + 4
    assert threading.active_count() <= threads + registry.live_connections + 1


@contextlib.contextmanager
def _answering(answer: bytes) -> Iterator[str]:
    """Serve the same bytes to whoever connects."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(answer)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    host: Any = listener.getsockname()
    yield f"{host[0]}:{host[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join()


# Where names lead


def test_a_name_must_not_lead_to_loopback(registry: FakeRegistry, transport: Transport) -> None:
    url = blob(registry).replace("127.0.0.1", "localhost")
    with pytest.raises(RegistryError, match="not public") as caught:
        transport.exchange("GET", url, sent_by="registry.example")
    assert not caught.value.retryable
    assert registry.requests == []
    # A registry that is itself reached there may name it.
    read_all(transport.exchange("GET", blob(registry)))
    read_all(transport.exchange("GET", url, sent_by=registry.host))


def test_addresses_are_tried_in_turn(
    registry: FakeRegistry, transport: Transport, monkeypatch: pytest.MonkeyPatch
) -> None:
    port = int(registry.host.rpartition(":")[2])
    with socket.socket() as dead:
        # Bound and not listening: refuses at once, as a dead route of one family does later.
        dead.bind(("127.0.0.1", 0))
        addresses = [dead.getsockname(), ("127.0.0.1", port)]
        found = [(socket.AF_INET, socket.SOCK_STREAM, 6, "", address) for address in addresses]
        monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: found)
        assert read_all(transport.exchange("GET", "http://two.example/v2/a/blobs/blob")) == DATA
