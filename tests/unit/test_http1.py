"""The framing of answers: against the standard library as oracle, in all pieces, and hostile."""

from __future__ import annotations

import http.client
import io
import itertools
import socket
import threading
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.http1 import CutError, MalformedError, NoAnswerError, Wire

if TYPE_CHECKING:
    from collections.abc import Sequence


class Pieces:
    """A socket that gives out what it is given piece by piece, and then the end."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = [piece for piece in pieces if piece]
        self.sent = b""

    def recv(self, size: int) -> bytes:
        if not self._pieces:
            return b""
        piece, rest = self._pieces[0][:size], self._pieces[0][size:]
        self._pieces[:1] = [rest] if rest else []
        return piece

    def recv_into(self, view: memoryview) -> int:
        piece = self.recv(len(view))
        view[: len(piece)] = piece
        return len(piece)

    def sendall(self, data: bytes) -> None:
        self.sent += data


def wire(*pieces: bytes) -> Wire:
    made: Any = Pieces(pieces)
    return Wire(made)


def body_of(answer: Any, step: int = 7) -> bytes:
    whole = b""
    while piece := answer.read(step):
        whole += piece
    return whole


def parts(data: bytes, cuts: list[int]) -> list[bytes]:
    places = sorted({0, *(cut % (len(data) + 1) for cut in cuts), len(data)})
    return [data[start:end] for start, end in itertools.pairwise(places)]


NEXT = b"HTTP/1.1 204 No Content\r\n\r\n"
CHUNKED = b"4;a=b\r\nWiki\r\n6 \r\npedia \r\n0\r\nTrailer: x\r\n\r\n"

# head and body, method, the body that is meant, whether the connection may serve again
FRAMES = [
    pytest.param(b"Content-Length: 5\r\n\r\nhello", "GET", b"hello", True, id="length"),
    pytest.param(b"content-length:5 \r\n\r\nhello", "GET", b"hello", True, id="spelt otherwise"),
    pytest.param(b"Content-Length: 0\r\n\r\n", "GET", b"", True, id="empty"),
    pytest.param(b"Content-Length: 5\r\n\r\n", "HEAD", b"", True, id="HEAD"),
    pytest.param(
        b"Transfer-Encoding: chunked\r\n\r\n" + CHUNKED, "GET", b"Wikipedia ", True, id="TE"
    ),
    pytest.param(b"Transfer-Encoding: Chunked\r\n\r\n0\r\n\r\n", "GET", b"", True, id="no chunk"),
    pytest.param(
        b"Connection: close\r\nContent-Length: 2\r\n\r\nhi", "GET", b"hi", False, id="close"
    ),
    pytest.param(
        b"Connection: x, Close\r\nContent-Length: 2\r\n\r\nhi", "GET", b"hi", False, id="listed"
    ),
    pytest.param(
        b"Content-Length: 99\r\nTransfer-Encoding: chunked\r\n\r\n" + CHUNKED,
        "GET",
        b"Wikipedia ",
        False,
        id="both: RFC 9112 6.3, 3",
    ),
    pytest.param(
        b"Transfer-Encoding: identity\r\nContent-Length: 2\r\n\r\nhi",
        "GET",
        b"hi",
        True,
        id="TE that is none",
    ),
    pytest.param(b"\r\nall the rest", "GET", b"all the rest", False, id="until it is closed"),
    pytest.param(b"Content-Length: -1\r\n\r\nrest", "GET", b"rest", False, id="told badly"),
    pytest.param(
        b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nrest", "GET", b"rest", False, id="two"
    ),
    pytest.param(
        b"Content-Length: 2\r\nContent-Length: 2\r\n\r\nhi", "GET", b"hi", True, id="twice"
    ),
    pytest.param(b"Content-Length: 2\n\nhi", "GET", b"hi", True, id="without CR"),
    pytest.param(b"Content-Length:\r\n 2\r\n\r\nhi", "GET", b"hi", True, id="folded"),
]


@pytest.mark.parametrize(("rest", "method", "body", "reusable"), FRAMES)
def test_where_an_answer_ends(rest: bytes, method: str, body: bytes, reusable: bool) -> None:
    whole = b"HTTP/1.1 200 OK\r\n" + rest
    for step in (1, 3, 1000):
        made = wire(*(whole[at : at + step] for at in range(0, len(whole), step)))
        answer = made.answer(method)
        assert body_of(answer) == body
        assert answer.is_reusable == reusable
    if reusable:
        made = wire(whole + NEXT)
        first = made.answer(method)
        assert body_of(first) == body
        # More than was asked for has come: nobody may take it for the next answer.
        assert not first.is_reusable
        assert made.answer("GET").status == 204


def test_an_old_server_keeps_a_connection_only_when_it_says_so() -> None:
    for extra, kept in ((b"", False), (b"Connection: Keep-Alive\r\n", True)):
        answer = wire(b"HTTP/1.0 200 OK\r\n" + extra + b"Content-Length: 1\r\n\r\nx").answer("GET")
        assert body_of(answer) == b"x"
        assert answer.is_reusable == kept


def test_interim_answers_are_passed_over() -> None:
    early = b"HTTP/1.1 103 Early Hints\r\nLink: </x>\r\n\r\n" + b"HTTP/1.1 100 Continue\r\n\r\n"
    answer = wire(early + b"HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\n\r\n").answer("GET")
    assert answer.status == 404
    with pytest.raises(MalformedError):
        wire(b"HTTP/1.1 100 Continue\r\n\r\n" * 100 + NEXT).answer("GET")


@pytest.mark.parametrize(
    "whole",
    [
        pytest.param(b"HTTP/1.1 200 OK\r\nNo colon\r\n\r\n", id="no colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\nName : x\r\n\r\n", id="space before the colon"),
        pytest.param(b"HTTP/1.1 200 OK\r\n: x\r\n\r\n", id="no name"),
        pytest.param(b"HTTP/1.1 200 OK\r\n folded: x\r\n\r\n", id="folded onto nothing"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\0c\r\n\r\n", id="NUL"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: b\rC: d\r\n\r\n", id="bare CR"),
        pytest.param(b"HTTP/1.1 200 OK\r\n" + b"A: b\r\n" * 101 + b"\r\n", id="too many"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 70_000 + b"\r\n\r\n", id="too long"),
        pytest.param(b"HTTP/1.1 200 OK\r\nA: " + b"b" * 200_000, id="without end"),
        pytest.param(b"HTTP/1.1 20 OK\r\n\r\n", id="two digits"),
        pytest.param(b"HTTP/1.1 2000 OK\r\n\r\n", id="four digits"),
        pytest.param(b"HTTP/1.1 \xb2\xb2\xb2 OK\r\n\r\n", id="digits of another script"),
        pytest.param(b"HTTP/2 200\r\n\r\n", id="another version"),
        pytest.param(b"SSH-2.0-OpenSSH\r\n", id="SSH"),
        pytest.param(b"\x15\x03\x03\x00\x02\x02\x28", id="TLS alert"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: gzip, chunked\r\n\r\n", id="coding"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nxyz\r\n", id="chunk"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n-1\r\n", id="minus"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n+1\r\n", id="plus"),
        pytest.param(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n0x1\r\n", id="0x"),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"f" * 16 + b"\r\n",
            id="huge",
        ),
        pytest.param(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nabc\r\n", id="longer"
        ),
    ],
)
def test_what_is_not_an_answer(whole: bytes) -> None:
    with pytest.raises(MalformedError):
        body_of(wire(whole).answer("GET"))


@pytest.mark.parametrize(("rest", "method", "body", "reusable"), FRAMES)
def test_no_part_of_an_answer_passes_for_the_whole(
    rest: bytes, method: str, body: bytes, reusable: bool
) -> None:
    whole = b"HTTP/1.1 200 OK\r\n" + rest
    with pytest.raises(NoAnswerError):
        wire().answer(method)
    if not reusable and b"chunked" not in rest and b"close" not in rest.lower():
        return  # it ends with the connection, wherever that is
    for end in range(1, len(whole)):
        with pytest.raises(CutError):
            body_of(wire(whole[:end]).answer(method))


@settings(max_examples=200, deadline=None)
@given(
    st.integers(100, 599).filter(lambda status: status >= 200),
    st.lists(
        st.tuples(
            st.from_regex(r"[A-Za-z][A-Za-z0-9-]{0,12}", fullmatch=True).filter(
                lambda name: (
                    name.lower() not in ("content-length", "transfer-encoding", "connection")
                )
            ),
            st.from_regex(r"[!-~]([ -~\xa1-\xff]{0,20}[!-~])?", fullmatch=True),
        ),
        max_size=8,
    ),
    st.binary(max_size=300),
    st.sampled_from(["length", "chunked", "close"]),
    st.lists(st.integers(0, 4000), max_size=12),
    st.integers(1, 400),
)
def test_it_reads_what_the_standard_library_reads(
    status: int,
    headers: list[tuple[str, str]],
    body: bytes,
    framing: str,
    cuts: list[int],
    step: int,
) -> None:
    lines = [f"HTTP/1.1 {status} Some reason", *(f"{name}: {value}" for name, value in headers)]
    payload = body
    if framing == "length":
        lines.append(f"Content-Length: {len(body)}")
    elif framing == "chunked":
        lines.append("Transfer-Encoding: chunked")
        payload = b"".join(
            b"%x\r\n%s\r\n" % (len(piece), piece) for piece in parts(body, cuts) if piece
        )
        payload += b"0\r\n\r\n"
    whole = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + payload

    class Stream:
        def makefile(self, _mode: str) -> io.BytesIO:
            return io.BytesIO(whole)

    oracle: Any = http.client.HTTPResponse(Stream())  # type: ignore[arg-type]
    oracle.begin()
    answer = wire(*parts(whole, cuts)).answer("GET")
    assert answer.status == oracle.status
    for name, _ in headers:
        assert answer.values(name.upper()) == oracle.headers.get_all(name)
    # The library reads chunks even where there can be none (RFC 9112, section 6.3, rule 1).
    assert body_of(answer, step) == (b"" if status in (204, 304) else oracle.read())


@pytest.mark.parametrize("bad", ["a\r\nX: y", "a\nb", "a\0b", "a\x7fb"])
def test_a_request_is_one_request(bad: str) -> None:
    for method, target, fields in (
        (bad, "/", []),
        ("GET", bad, []),
        ("GET", "/", [(bad, "x")]),
        ("GET", "/", [("X", bad)]),
    ):
        made = wire()
        with pytest.raises(ValueError, match="control character"):
            made.send(method, target, fields, b"")
        sent: Any = made.socket
        assert sent.sent == b""


def test_a_request_as_a_server_reads_it() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        seen: list[tuple[bytes, dict[str, str], bytes]] = []

        def serve() -> None:
            with theirs.makefile("rb") as stream:
                first = stream.readline()
                fields = http.client.parse_headers(stream)
                seen.append((first, dict(fields), stream.read(int(fields["Content-Length"]))))
            theirs.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok")

        server = threading.Thread(target=serve)
        server.start()
        made = Wire(ours)
        made.send("POST", "/a?b=c", [("Host", "h"), ("Content-Length", "3")], b"abc")
        assert body_of(made.answer("POST")) == b"ok"
        server.join()
    assert seen == [(b"POST /a?b=c HTTP/1.1\r\n", {"Host": "h", "Content-Length": "3"}, b"abc")]
