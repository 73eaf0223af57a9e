"""Limits that several processes keep together."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import CancelledError
from stowray.pipeline.limiter import DOCUMENT_PERMITS, Limiter
from stowray.pipeline.node_limits import FURTHEST_SECONDS, NodeLimits
from tests.support.registry import FakeRegistry, Fault, incompressible
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stowray.pipeline.node_limits import Kind

HOST = "registry.example:5000"


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Callable[..., NodeLimits]]:
    """Make what two processes would make: each its own open files below one folder."""
    with contextlib.ExitStack() as stack:

        def new(**options: object) -> NodeLimits:
            limits = NodeLimits(tmp_path / "hosts", **options)  # type: ignore[arg-type]
            stack.callback(limits.close)
            return limits

        yield new


def test_permits_are_those_of_all_processes_together(make: Callable[..., NodeLimits]) -> None:
    one, other = make(), make()
    first, second = one.permit(HOST, "blobs", 2), other.permit(HOST, "blobs", 2)
    assert first is not None
    assert second is not None
    assert one.permit(HOST, "blobs", 2) is None
    assert other.permit(HOST, "blobs", 2) is None
    # Another host and another kind are another matter.
    assert one.permit("other.example", "blobs", 1) is not None
    assert one.permit(HOST, "documents", 1) is not None
    assert one.free(HOST, "blobs", 2) == 0
    second()
    second()
    assert one.free(HOST, "blobs", 2) == other.free(HOST, "blobs", 2) == 1
    assert one.permit(HOST, "blobs", 2) is not None


def test_permits_end_with_who_has_them(make: Callable[..., NodeLimits]) -> None:
    one, other = make(), make()
    assert one.permit(HOST, "blobs", 1) is not None
    assert other.permit(HOST, "blobs", 1) is None
    one.close()
    assert other.permit(HOST, "blobs", 1) is not None


def test_a_lower_limit_counts_what_others_have(make: Callable[..., NodeLimits]) -> None:
    one, other = make(), make()
    for _ in range(3):
        assert one.permit(HOST, "blobs", 6) is not None
    assert other.permit(HOST, "blobs", 2) is None
    assert other.permit(HOST, "blobs", 4) is not None


def test_nobody_spares_what_somebody_waits_for(make: Callable[..., NodeLimits]) -> None:
    one, other = make(), make()
    limiter = Limiter(4, shared=[one])
    assert limiter.spare(HOST) == 4
    with other.waiting(HOST, "blobs"):
        assert one.is_waited_for(HOST, "blobs")
        assert not one.is_waited_for(HOST, "documents")
        assert limiter.spare(HOST) == 0
    assert not one.is_waited_for(HOST, "blobs")
    assert limiter.spare(HOST) == 4


def test_a_pause_is_for_all(make: Callable[..., NodeLimits]) -> None:
    now = [1000.0]
    one, other = (make(monotonic=lambda: now[0]) for _ in range(2))
    one.pause(HOST, 5.0)
    other.pause(HOST, 1.0)
    assert other.rest(HOST) == 5.0
    assert other.rest("other.example") == 0.0
    now[0] += 6
    assert one.rest(HOST) == 0.0


def test_lines_are_booked_one_after_the_other(make: Callable[..., NodeLimits]) -> None:
    now = [1000.0]
    one, other = (make(monotonic=lambda: now[0]) for _ in range(2))
    assert [one.book(HOST, "requests", 0.5) for _ in range(2)] == [0.0, 0.5]
    assert other.book(HOST, "requests", 0.5) == 1.0
    assert other.book(HOST, "bytes", 0.5) == 0.0
    now[0] += 100
    # What was not used does not come in a burst.
    assert [one.book(HOST, "requests", 0.5) for _ in range(2)] == [0.0, 0.5]


def test_times_of_another_boot_and_garbage_count_for_nothing(
    make: Callable[..., NodeLimits], tmp_path: Path
) -> None:
    make(monotonic=lambda: 1e6, boot_id="before").pause(HOST, 200.0)
    later = make(monotonic=lambda: 10.0, boot_id="after")
    assert later.rest(HOST) == 0.0
    later.pause(HOST, 3.0)
    assert later.rest(HOST) == 3.0
    (file,) = tmp_path.glob("hosts/*/pace")
    later.pause(HOST, 100 * FURTHEST_SECONDS)
    assert later.rest(HOST) == 0.0
    for garbage in (b"", b"x", os.urandom(48), b"\xff" * 48):
        file.write_bytes(garbage)
        assert later.rest(HOST) == 0.0
        assert later.book(HOST, "bytes", 1.0) == 0.0


def test_files_of_many_hosts_are_not_kept_open(make: Callable[..., NodeLimits]) -> None:
    limits = make()
    held = limits.permit("held.example", "blobs", 1)
    assert held is not None
    before = len(os.listdir("/proc/self/fd"))
    for number in range(300):
        release = limits.permit(f"{number}.example", "blobs", 1)
        assert release is not None
        release()
    assert len(os.listdir("/proc/self/fd")) < before + 200
    assert make().permit("held.example", "blobs", 1) is None


# Through the limiter


def test_waiting_for_another_process_can_be_cancelled(make: Callable[..., NodeLimits]) -> None:
    one, other = (Limiter(1, shared=[make()]) for _ in range(2))
    one.acquire(HOST, document=False)
    asked: list[None] = []
    with pytest.raises(CancelledError):
        other.acquire(HOST, document=False, cancelled=lambda: asked.append(None) or len(asked) > 3)
    # Nothing of the attempt stays.
    assert other.held(HOST) == 0
    other.acquire(HOST, document=True, cancelled=lambda: False)()


def test_who_waits_gets_it_although_others_come_again_and_again(
    make: Callable[..., NodeLimits],
) -> None:
    greedy, patient = (Limiter(1, shared=[make()]) for _ in range(2))
    over = threading.Event()
    rounds: list[float] = []

    def grab() -> None:
        while not over.is_set():
            release = greedy.acquire(HOST, document=False)
            rounds.append(time.monotonic())
            release()

    thread = threading.Thread(target=grab)
    thread.start()
    try:
        while not rounds:
            time.sleep(0.001)
        for _ in range(10):
            patient.acquire(HOST, document=False)()
    finally:
        over.set()
        thread.join()


def test_documents_are_limited_together(make: Callable[..., NodeLimits]) -> None:
    one, other = (Limiter(1, shared=[make()]) for _ in range(2))
    held = [one.acquire(HOST, document=True) for _ in range(DOCUMENT_PERMITS)]
    with pytest.raises(CancelledError):
        other.acquire(HOST, document=True, cancelled=iter([False, True]).__next__)
    held[0]()
    other.acquire(HOST, document=True)()


class PausedMeanwhile(NodeLimits):
    """Whoever had a permit before was asked for a pause just before it gave the permit back."""

    seconds = 0.0

    def permit(self, host: str, kind: Kind, limit: int) -> Callable[[], None] | None:
        release = super().permit(host, kind, limit)
        if release is not None:
            self.pause(host, self.seconds)
            self.seconds = 0.0
        return release


@pytest.mark.parametrize("waits", [False, True])
def test_a_permit_that_comes_with_a_pause_is_not_used(
    make: Callable[..., NodeLimits], tmp_path: Path, waits: bool
) -> None:
    held = make().permit(HOST, "blobs", 1) if waits else None
    limits = PausedMeanwhile(tmp_path / "hosts")
    limits.seconds = 0.5
    if held is not None:
        threading.Timer(0.2, held).start()
    begun = time.monotonic()
    limiter = Limiter(1, shared=[limits])
    limiter.acquire(HOST, document=False)()
    assert time.monotonic() - begun >= (0.7 if waits else 0.5)
    # The one that was not used is not lost either.
    limiter.acquire(HOST, document=False)()
    limits.close()


HOLDER = """
    import os, sys, time
    from pathlib import Path
    from stowray.pipeline.node_limits import NodeLimits
    limits = NodeLimits(Path(sys.argv[1]))
    assert limits.permit(sys.argv[2], "blobs", 1) is not None
    print("held", flush=True)
    sys.stdin.read()
"""


@contextlib.contextmanager
def holder(folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that has the only permit."""
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(HOLDER), str(folder), HOST],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == b"held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


def test_a_killed_process_leaves_its_permit(make: Callable[..., NodeLimits]) -> None:
    limits = make()
    with holder(limits._folder) as process:
        assert limits.permit(HOST, "blobs", 1) is None
        process.kill()
        process.wait()
        assert limits.permit(HOST, "blobs", 1) is not None


def test_nobody_waits_for_a_stopped_process(make: Callable[..., NodeLimits]) -> None:
    limits = make()
    with holder(limits._folder) as process:
        assert not limits.is_stopped(HOST, "blobs", 1)
        process.send_signal(signal.SIGSTOP)
        os.waitpid(process.pid, os.WUNTRACED)
        assert limits.is_stopped(HOST, "blobs", 1)
        limiter = Limiter(1, shared=[limits])
        limiter.acquire(HOST, document=False)()
        process.send_signal(signal.SIGCONT)


# Two commands at one registry


def start(store: Path, config: Path, reference: str) -> subprocess.Popen[bytes]:
    arguments = ["--store", str(store), "--config", str(config), "--engine", "local"]
    return subprocess.Popen(
        [sys.executable, "-m", "stowray", *arguments, "--json", "-q", "pull", reference],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def finish(process: subprocess.Popen[bytes]) -> dict[str, object]:
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr.decode()
    answer: dict[str, object] = json.loads(stdout)
    return answer


def two_images(fake: FakeRegistry, layers: int, size: int) -> tuple[str, str]:
    names = []
    for number, name in enumerate(("one/app", "two/app")):
        content = [
            small_tar({f"{name}-{index}": incompressible(size, 1000 * number + index)})
            for index in range(layers)
        ]
        fake.add_image(name, "1", content)
        names.append(f"{fake.host}/{name}:1")
    return names[0], names[1]


def settings(folder: Path, text: str) -> Path:
    file = folder / "settings.toml"
    file.write_text(f"[registry]\n{text}")
    return file


def test_two_processes_share_connections(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        first, second = two_images(fake, layers=4, size=60_000)
        watched = Watched(fake)
        fault = Fault(trickle=(10_000, 0.02), then=watched.look)
        for digest, blob in fake.blobs.items():
            # Configs are documents, which have connections of their own.
            if len(blob) > 10_000:
                fake.fault(digest, fault, repeat=True)
        config = settings(tmp_path, "connections = 1\n")
        store = tmp_path / "store"
        running = [start(store, config, reference) for reference in (first, second)]
        answers = [finish(process) for process in running]
    assert all(answer["fetched_bytes"] for answer in answers)
    assert watched.most == 1


class Watched:
    """How many bodies of blobs are under way, whenever a new request for one comes in."""

    def __init__(self, fake: FakeRegistry) -> None:
        self._fake = fake
        self.most = 0

    def look(self) -> None:
        self.most = max(self.most, self._fake.bodies + 1)


def test_two_processes_share_a_rate_of_requests(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        references = two_images(fake, layers=3, size=100)
        config = settings(tmp_path, "requests_per_second = 10\n")
        running = [start(tmp_path / "store", config, reference) for reference in references]
        for process in running:
            finish(process)
        times = sorted(request.time for request in fake.requests)
    # Arrivals, not departures: one may be held up on its way, but not all of them.
    assert len(times) >= 10
    assert times[-1] - times[0] >= (len(times) - 1) * 0.1 - 0.15


def test_two_processes_share_a_line(tmp_path: Path) -> None:
    size = 3 << 20
    with FakeRegistry() as fake:
        references = two_images(fake, layers=1, size=size)
        config = settings(tmp_path, f"bytes_per_second = {size // 3}\n")
        running = [start(tmp_path / "store", config, reference) for reference in references]
        for process in running:
            finish(process)
        begun = [request.time for request in fake.seen("/blobs/")]
        ended = time.monotonic()
    # Two times three seconds' worth; each of the two alone would have needed three.
    assert ended - min(begun) >= 5.9


def test_a_pause_that_one_was_asked_for_holds_the_other(tmp_path: Path) -> None:
    with FakeRegistry() as fake:
        first, second = two_images(fake, layers=1, size=100)
        asked = threading.Event()
        fault = Fault(status=429, headers=(("Retry-After", "5"),), then=asked.set)
        fake.fault("one/app/manifests/", fault)
        config = settings(tmp_path, "")
        one = start(tmp_path / "store", config, first)
        assert asked.wait(60)
        at = next(request.time for request in fake.requests)
        two = start(tmp_path / "store", config, second)
        finish(one)
        finish(two)
        later = [request.time for request in fake.requests[1:]]
    assert min(later) - at >= 4.9
