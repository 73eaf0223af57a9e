from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stowray.cli.app import run
from stowray.pipeline.blob_stream import RegistryBlob
from stowray.pipeline.clock import Clock
from stowray.pipeline.errors import CancelledError, NodeError
from stowray.pipeline.limiter import SMALLEST_PIECE, HostMeter, Limiter
from stowray.pipeline.quota import Quota, read_quota
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.support.registry import FakeRegistry, Fault

if TYPE_CHECKING:
    from pathlib import Path


class Headers:
    """The one thing of a response that is looked at."""

    def __init__(self, **headers: str) -> None:
        self._headers = headers

    def header(self, name: str) -> str | None:
        return self._headers.get(name.replace("-", "_").lower())


@pytest.mark.parametrize(
    ("remaining", "limit", "quota"),
    [
        ("76;w=21600", "100;w=21600", Quota(76, 100, 21600)),
        ("76", "100", Quota(76, 100, None)),
        ("0;w=60", None, Quota(0, None, 60)),
        ("5", "100, 100;w=10", Quota(5, 100, 10)),
        ("5 ; w=10 ; comment=x", "x", Quota(5, None, 10)),
        (None, "100;w=21600", None),
        ("", "", None),
        ("-1", "100", None),
        ("many", "100", None),
        ("9" * 400, "100", None),
        ("1e3", "100", None),
        ("٣", "100", None),
    ],
)
def test_quota_headers(remaining: str | None, limit: str | None, quota: Quota | None) -> None:
    told = {"ratelimit_remaining": remaining, "ratelimit_limit": limit}
    headers = Headers(**{name: value for name, value in told.items() if value is not None})
    assert read_quota(headers) == quota  # type: ignore[arg-type]


def test_requests_are_spaced_the_more_the_fewer_are_left() -> None:
    assert Quota(50, 100, 21600).gap_seconds == 0
    gaps = [Quota(left, 100, 21600).gap_seconds for left in (10, 5, 0)]
    assert gaps == sorted(gaps)
    assert gaps[-1] == 2.0
    # Where the window is short, not longer than it takes to refill.
    assert Quota(0, 100, 10).gap_seconds == 0.1
    assert Quota(0).gap_seconds == 2.0


def test_a_registry_s_quota_is_kept_warned_of_and_respected() -> None:
    now, shown = [1000.0], list[str]()

    def sleep(seconds: float) -> None:
        now[0] += seconds

    clock = Clock(monotonic=lambda: now[0], sleep=sleep)
    with FakeRegistry() as fake:
        fake.add_image("a/b", "1", layers=[])
        reference = Reference.parse(f"{fake.host}/a/b:1")
        registry = Registry(RegistrySettings(), environment={}, clock=clock, warn=shown.append)

        def ask(left: int) -> float:
            headers = (
                ("RateLimit-Limit", "100;w=21600"),
                ("RateLimit-Remaining", f"{left};w=21600"),
            )
            fake.fault("/manifests/", Fault(headers=headers))
            before = now[0]
            registry.resolve(reference)
            assert registry.quota(reference) == Quota(left, 100, 21600)
            return now[0] - before

        assert registry.quota(reference) is None
        assert [ask(50), ask(10), ask(1)] == [0.0, 0.0, 0.0]
        assert len(shown) == 1
        assert "10 of 100 requests are left in 6 h" in shown[0]
        assert ask(0) == pytest.approx(1.8, abs=0.2)
        assert ask(0) == pytest.approx(2.0, abs=0.1)
        assert len(shown) == 2
        ask(100)
        assert ask(100) == 0.0
        registry.close()


def test_the_plan_shows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with FakeRegistry() as fake:
        fake.add_image("a/b", "1", layers=[])
        headers = (("RateLimit-Limit", "100;w=60"), ("RateLimit-Remaining", "3;w=60"))
        fake.fault("/manifests/", Fault(headers=headers), repeat=True)
        reference = f"{fake.host}/a/b:1"
        options = ["--store", str(tmp_path / "store"), "--engine", "local"]
        assert run([*options, "--json", "plan", reference]) == 0
        shown = capsys.readouterr()
        assert json.loads(shown.out)["quota"] == {
            "remaining": 3,
            "limit": 100,
            "window_seconds": 60,
        }
        assert f"{fake.host}: 3 of 100 requests are left" in shown.err
        assert run([*options, "plan", reference]) == 0
        assert "3 of 100 requests are left" in capsys.readouterr().out


# Limits of our own


def clock_at(now: list[float]) -> Clock:
    def sleep(seconds: float) -> None:
        now[0] += seconds

    return Clock(monotonic=lambda: now[0], sleep=sleep)


def test_requests_per_second() -> None:
    now = [100.0]
    limiter = Limiter(10, clock_at(now), requests_per_second=4.0)
    for document in (True, False, True, False, False):
        limiter.acquire("h", document=document)()
    assert now[0] == pytest.approx(101.0, abs=0.3)
    limiter.acquire("g", document=False)
    assert now[0] == pytest.approx(101.0, abs=0.3)


def test_bytes_per_second_are_those_of_all_threads_together() -> None:
    now = [100.0]
    limiter = Limiter(10, clock_at(now), bytes_per_second=1000)
    for _ in range(50):
        limiter.spend("h", 100, lambda: False)
    assert now[0] == pytest.approx(105.0, abs=0.1)
    # What was not used up does not come in a burst later, and other hosts are not concerned.
    now[0] += 1000
    before = now[0]
    limiter.spend("h", 1000, lambda: False)
    limiter.spend("g", 1000, lambda: False)
    assert now[0] - before == pytest.approx(2.0, abs=0.1)


def test_waiting_for_the_line_can_be_cancelled() -> None:
    now = [100.0]
    limiter = Limiter(10, clock_at(now), bytes_per_second=1)
    with pytest.raises(CancelledError):
        limiter.spend("h", 1000, lambda: now[0] > 101)
    assert now[0] < 102


class Body:
    """A response whose body is all there; ``is_closed`` when its reader is done."""

    def __init__(self, data: bytes) -> None:
        self.left = data
        self.is_closed = False

    def read_piece(self, size: int) -> bytes:
        piece, self.left = self.left[:size], self.left[size:]
        return piece

    def read_into(self, buffer: memoryview) -> int:
        piece = self.read_piece(len(buffer))
        buffer[: len(piece)] = piece
        return len(piece)

    def close(self) -> None:
        self.is_closed = True


@pytest.mark.parametrize("how", ["read", "read_into"])
def test_bytes_that_came_are_handed_out_before_they_are_waited_for(how: str) -> None:
    """Who is cancelled while it waits for its share of the line loses none that have come."""
    now = [100.0]
    limiter = Limiter(10, clock_at(now), bytes_per_second=1000)
    over = [False]
    body = Body(bytes(range(256)) * 64)
    stream = RegistryBlob(body, 0, "h")  # type: ignore[arg-type]
    stream.limit(HostMeter(limiter, "h", lambda: over[0]))
    got = bytearray()
    buffer = memoryview(bytearray(1 << 20))

    def read() -> int:
        if how == "read":
            got.extend(piece := stream.read())
            return len(piece)
        count = stream.read_into(buffer)
        got.extend(buffer[:count])
        return count

    assert read() == SMALLEST_PIECE
    assert now[0] == 100.0
    assert read() == SMALLEST_PIECE
    assert now[0] == pytest.approx(104.1, abs=0.1)
    over[0] = True
    with pytest.raises(CancelledError):
        read()
    assert got + body.left == bytes(range(256)) * 64
    stream.close()
    assert body.is_closed
    # What was booked before stays so; nothing is booked twice.
    limiter.spend("h", 0, lambda: False)
    assert now[0] == pytest.approx(108.2, abs=0.1)


class DeafMeter:
    """One whose owner does not answer."""

    piece_size = 1000

    def pay(self, count: int) -> None:
        """Let all through."""

    def charge(self, count: int) -> None:
        raise NodeError("owner", f"does not answer ({count} bytes)")


def test_an_answer_is_closed_though_nobody_takes_what_it_owes() -> None:
    body = Body(bytes(3000))
    stream = RegistryBlob(body, 0, "h")  # type: ignore[arg-type]
    stream.limit(DeafMeter())
    stream.read()
    with pytest.raises(NodeError):
        stream.close()
    assert body.is_closed
    stream.close()


def test_an_answer_of_one_piece_makes_the_next_one_wait() -> None:
    now = [100.0]
    limiter = Limiter(10, clock_at(now), bytes_per_second=1000)
    for number in range(5):
        stream = RegistryBlob(Body(bytes(1000)), 0, "h")  # type: ignore[arg-type]
        stream.limit(HostMeter(limiter, "h", lambda: False))
        assert len(stream.read()) == 1000
        stream.close()
        assert now[0] == pytest.approx(100.0 + number, abs=0.1)


def test_spare_permits() -> None:
    limiter = Limiter(2)
    assert limiter.spare("h") == 2
    release = limiter.acquire("h", document=False)
    limiter.acquire("h", document=True)
    assert limiter.spare("h") == 1
    limiter.pause("h", 60)
    assert limiter.spare("h") == 0
    release()
