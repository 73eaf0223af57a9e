"""The crew of actors against a real store and a real registry, its members killed in mid-work."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import cluster, frames
from stowray.actors.engine import RayEngine
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.errors import (
    CancelledError,
    DigestMismatchError,
    LayerError,
    NotFoundError,
    StowrayError,
)
from stowray.pipeline.progress import Progress
from stowray.pipeline.source import parse_source
from tests.support.registry import FakeRegistry, Fault
from tests.support.tars import archive, directory, file

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from stowray.pipeline.settings import Settings

SLOW = Fault(trickle=(32 * 1024, 0.05))


def layer(name: str, size: int = 1000) -> bytes:
    """Return a layer of one random file: never in the shared store yet, and not compressible."""
    return archive(directory(name), file(f"{name}/file", os.urandom(size)))


def blob_of(registry: FakeRegistry, plain: bytes) -> str:
    """Return the digest under which the layer ``plain`` was added."""
    import gzip
    import hashlib

    return f"sha256:{hashlib.sha256(gzip.compress(plain, 1, mtime=0)).hexdigest()}"


def members(engine: RayEngine) -> dict[str, list[int]]:
    found: dict[str, list[int]] = cluster.wait(
        engine.link.node.members.remote(), "node", seconds=60
    )
    return found


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)


class Pull:
    """A pull on a thread of its own, with its own reports."""

    def __init__(self, engine: RayEngine, reference: str) -> None:
        self.engine = engine
        self.source = parse_source(reference)
        self.cancelled = threading.Event()
        self._pool = ThreadPoolExecutor(1)
        self.future = self._pool.submit(
            engine.pull, self.source, PullOptions(), self.cancelled.is_set
        )

    def fetched(self) -> int:
        return max(
            (
                event.current
                for event in self.engine.progress.events()
                if event.reference == self.source.canonical and event.kind == "blob"
            ),
            default=0,
        )

    def finish(self) -> None:
        self.cancelled.set()
        with contextlib.suppress(StowrayError):
            self.future.result(60)
        self._pool.shutdown()


@pytest.fixture
def start(engine: RayEngine) -> Iterator[Callable[[str], Pull]]:
    pulls: list[Pull] = []

    def begin(reference: str) -> Pull:
        pulls.append(Pull(engine, reference))
        return pulls[-1]

    yield begin
    for pull in pulls:
        pull.finish()


def without_times(result: dict[str, Any]) -> dict[str, Any]:
    result = {**result, "seconds": sorted(result["seconds"]), "engine": ""}
    for entry in result["layers"]:
        entry["fetch_seconds"] = entry["apply_seconds"] = 0
    return result


def test_both_engines_give_the_same_result_and_events(
    engine: RayEngine, crew_settings: Settings, registry: FakeRegistry, workspace: Path
) -> None:
    registry.add_image("a/b", "1", [layer("one"), layer("two", 300_000), layer("one")])
    source = parse_source(f"{registry.host}/a/b:1")
    progress = Progress(node="here")
    local = LocalEngine(replace(crew_settings, store=str(workspace / "local")), progress=progress)
    expected = local.pull(source, PullOptions())
    local.close()
    progress.close()
    result = engine.pull(source, PullOptions())
    assert result.engine == "ray"
    assert without_times(result.to_dict()) == without_times(expected.to_dict())
    final = {
        (event.kind, event.id): (event.status, event.current, event.total)
        for event in engine.progress.events()
        if event.reference == source.canonical
    }
    assert final == {
        (event.kind, event.id): (event.status, event.current, event.total)
        for event in progress.events()
    }
    chain = Digest(result.chain_id)
    names = [path.name for tree in engine.snapshots.lowers(chain) for path in tree.iterdir()]
    assert sorted(set(names)) == ["one", "two"]


def test_a_second_pull_does_nothing_again(engine: RayEngine, registry: FakeRegistry) -> None:
    registry.add_image("a/b", "1", [layer("one")])
    source = parse_source(f"{registry.host}/a/b:1")
    assert engine.pull(source, PullOptions()).fetched_bytes > 0
    before = registry.count("/blobs/")
    again = engine.pull(source, PullOptions())
    assert (again.fetched_bytes, registry.count("/blobs/")) == (0, before)
    assert [entry.source for entry in again.layers] == ["store"]


def test_a_killed_fetcher_is_replaced_and_its_bytes_are_kept(
    engine: RayEngine,
    registry: FakeRegistry,
    start: Callable[[str], Pull],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    plain = layer("big", 2 << 20)
    registry.add_image("a/b", "1", [plain])
    path = f"/blobs/{blob_of(registry, plain)}"
    registry.fault(path, SLOW)
    pids = members(engine)["fetchers"]
    pull = start(f"{registry.host}/a/b:1")
    until(lambda: pull.fetched() > 256 * 1024 or pull.future.done())
    for pid in pids:
        kill(pid)
    result = pull.future.result(60)
    requests = registry.seen(path)
    assert len(requests) == 2
    assert requests[1].range is not None, "what the dead fetcher had written was thrown away"
    assert result.layers[0].unpacked_size == 2 << 20
    assert set(members(engine)["fetchers"]).isdisjoint(pids)


def test_killed_unpackers_are_replaced_in_mid_pull(
    engine: RayEngine,
    registry: FakeRegistry,
    start: Callable[[str], Pull],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    plain = layer("big", 2 << 20)
    registry.add_image("a/b", "1", [layer("small"), plain])
    path = f"/blobs/{blob_of(registry, plain)}"
    registry.fault(path, SLOW)
    pids = members(engine)["unpackers"]
    pull = start(f"{registry.host}/a/b:1")
    until(lambda: pull.fetched() > 256 * 1024 or pull.future.done())
    for pid in pids:
        kill(pid)
    result = pull.future.result(60)
    assert registry.count(path) == 1, "the death of a stage must not touch the fetch"
    assert [entry.unpacked_size for entry in result.layers] == [1000, 2 << 20]
    assert set(members(engine)["unpackers"]).isdisjoint(pids)


def test_a_killed_node_actor_walks_again(
    engine: RayEngine,
    registry: FakeRegistry,
    start: Callable[[str], Pull],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    plain = layer("big", 1 << 20)
    registry.add_image("a/b", "1", [plain])
    registry.fault(f"/blobs/{blob_of(registry, plain)}", SLOW)
    about = cluster.wait(engine.link.node.describe.remote(), "node", seconds=60)
    pull = start(f"{registry.host}/a/b:1")
    until(lambda: pull.fetched() > 128 * 1024 or pull.future.done())
    kill(about["pid"])
    assert pull.future.result(90).layers[0].unpacked_size == 1 << 20


def test_losing_the_progress_actor_fails_nothing(
    crew_settings: Settings,
    engine: RayEngine,
    registry: FakeRegistry,
    start: Callable[[str], Pull],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    plain = layer("big", 1 << 20)
    registry.add_image("a/b", "1", [plain])
    registry.fault(f"/blobs/{blob_of(registry, plain)}", SLOW)
    own = Progress(node="driver")
    other = RayEngine(replace(crew_settings, node="there"), progress=own, store=engine.store)
    try:
        other.connect()
        pull = Pull(other, f"{registry.host}/a/b:1")
        until(lambda: pull.fetched() > 0 or pull.future.done())
        cluster.end(other.link.progress)
        pull.future.result(60)
        pull.finish()
        assert all(event.is_final for event in own.events())
        assert {event.kind for event in own.events()} >= {"resolve", "blob", "layer", "commit"}
    finally:
        other.close()
        own.close()


def test_a_stalled_pull_holds_up_no_other_and_shared_layers_come_once(
    registry: FakeRegistry, start: Callable[[str], Pull]
) -> None:
    shared, stuck = layer("shared"), layer("stuck", 200_000)
    registry.add_image("a/stalled", "1", [shared, *(layer(f"s{n}") for n in range(6)), stuck])
    registry.add_image("a/quick", "1", [shared, *(layer(f"q{n}") for n in range(6))])
    path = f"/blobs/{blob_of(registry, stuck)}"
    registry.fault(path, Fault(stall=1000))
    stalled = start(f"{registry.host}/a/stalled:1")
    registry.wait_for(path)
    quick = [start(f"{registry.host}/a/quick:1") for _ in range(2)]
    for pull in quick:
        assert len(pull.future.result(60).layers) == 7
    assert not stalled.future.done()
    assert registry.count(f"/blobs/{blob_of(registry, shared)}") == 1


def test_a_cancelled_pull_ends_in_time_and_is_resumed(
    engine: RayEngine,
    registry: FakeRegistry,
    start: Callable[[str], Pull],
    until: Callable[[Callable[[], bool]], None],
) -> None:
    plain = layer("big", 2 << 20)
    registry.add_image("a/b", "1", [plain])
    path = f"/blobs/{blob_of(registry, plain)}"
    registry.fault(path, Fault(trickle=(32 * 1024, 0.2)))
    pull = start(f"{registry.host}/a/b:1")
    until(lambda: pull.fetched() > 128 * 1024 or pull.future.done())
    pull.cancelled.set()
    asked = time.monotonic()
    with pytest.raises(CancelledError):
        pull.future.result(60)
    assert time.monotonic() - asked < 5, "Ctrl-C has five seconds"
    events = [e for e in engine.progress.events() if e.reference == pull.source.canonical]
    assert all(event.is_final for event in events)
    engine.pull(pull.source, PullOptions())
    assert registry.seen(path)[-1].range is not None


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        pytest.param(
            lambda registry, blob: registry.blobs.pop(blob), NotFoundError, id="blob missing"
        ),
        pytest.param(
            lambda registry, blob: registry.fault(blob, Fault(corrupt=100), repeat=True),
            DigestMismatchError,
            id="wrong bytes",
        ),
    ],
)
def test_what_fails_on_an_actor_is_the_same_error_here(
    engine: RayEngine,
    registry: FakeRegistry,
    break_it: Callable[[FakeRegistry, str], None],
    expected: type[StowrayError],
) -> None:
    plain = layer("one", 5000)
    registry.add_image("a/b", "1", [plain])
    break_it(registry, blob_of(registry, plain))
    with pytest.raises(expected):
        engine.pull(parse_source(f"{registry.host}/a/b:1"), PullOptions())


def test_a_bad_layer_is_named_and_nothing_of_it_is_visible(
    engine: RayEngine, registry: FakeRegistry
) -> None:
    registry.add_image("a/b", "1", [layer("good"), archive(file("../outside", b"x"))])
    source = parse_source(f"{registry.host}/a/b:1")
    with pytest.raises(LayerError):
        engine.pull(source, PullOptions())
    with pytest.raises(NotFoundError):
        engine.pull(parse_source(f"{registry.host}/a/b:none"), PullOptions())
    assert all(record.reference != source.canonical for record in engine.store.references())


def test_a_watcher_that_comes_late_sees_all(engine: RayEngine, registry: FakeRegistry) -> None:
    run = "late"
    actor = engine.link.progress
    with Progress_frames(actor, run) as note:
        note("a", "downloading", 1)
        note("a", "downloading", 2)
        note("b", "done", 5)
    _, frame, closed = cluster.wait(actor.poll.remote(run, 0, 30.0), "progress", seconds=60)
    assert closed
    assert {(e.id, e.status, e.current) for e in frames.unpack(frame)} == {
        ("a", "downloading", 2),
        ("b", "done", 5),
    }


@contextlib.contextmanager
def Progress_frames(actor: Any, run: str) -> Iterator[Callable[[str, str, int], None]]:  # noqa: N802
    from stowray.pipeline.progress import Event

    def note(id: str, status: str, current: int) -> None:
        event = Event(1.0, "r", "n", id, "blob", status, current, 10, started=1.0)
        cluster.wait(actor.note.remote(run, frames.pack([event])), "progress", seconds=60)

    yield note
    cluster.wait(actor.close.remote(run), "progress", seconds=60)
