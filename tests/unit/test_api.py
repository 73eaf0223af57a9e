"""The Python API as the contract has it, from the outside."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import pytest

import stowray
from tests.support.registry import FakeRegistry, Fault
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_image("a/b", "1", [small_tar({"etc/a": b"1" * 5000})], compression=None)
        yield made


def test_a_store_is_opened_by_its_path(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/a/b:1"
    stowray.pull(name, store=tmp_path, engine="local")
    store = stowray.Store(tmp_path)
    assert [record.reference for record in store.references()] == [name]
    assert stowray.Store(str(tmp_path)).path == tmp_path
    with pytest.raises(stowray.StorageError):
        stowray.Store(tmp_path / "none", create=False)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"reference": ""}, stowray.InvalidReferenceError),
        ({"policy": "sometimes"}, stowray.UsageError),
        ({"engine": "steam"}, stowray.UsageError),
        ({"colour": "blue"}, stowray.UsageError),
        ({"platform": "linux/s390x"}, stowray.PlatformError),
        ({"platform": "a b"}, stowray.InvalidPlatformError),
        ({"plain_http": ["http://a"]}, stowray.UsageError),
        ({"policy": "never"}, stowray.NotFoundError),
    ],
)
def test_each_mistake_has_its_class(
    arguments: dict[str, Any], kind: type[Exception], tmp_path: Path, registry: FakeRegistry
) -> None:
    given = {"reference": f"{registry.host}/a/b:1", "store": tmp_path, "engine": "local"}
    with pytest.raises(kind):
        stowray.pull(**{**given, **arguments})


def test_a_task_that_is_cancelled_ends_its_pull(tmp_path: Path, registry: FakeRegistry) -> None:
    """The recipe for asyncio: the thread is told, and what was fetched is kept."""
    registry.fault("/blobs/", Fault(hang=True), repeat=True)
    ended = threading.Event()
    stop = threading.Event()

    def work() -> None:
        try:
            stowray.pull(
                f"{registry.host}/a/b:1", store=tmp_path, engine="local", cancelled=stop.is_set
            )
        except stowray.CancelledError:
            ended.set()

    async def main() -> None:
        task = asyncio.create_task(asyncio.to_thread(work))
        await asyncio.to_thread(registry.wait_for, "/blobs/")
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            try:
                await task
            finally:
                stop.set()

    asyncio.run(main())
    assert ended.wait(60)


def test_watchers_get_events_that_end_and_may_fail(tmp_path: Path, registry: FakeRegistry) -> None:
    name = f"{registry.host}/a/b:1"
    last: dict[tuple[str, ...], stowray.Event] = {}

    def note(events: Sequence[stowray.Event]) -> None:
        last.update({event.key: event for event in events})

    def fail(_events: Sequence[stowray.Event]) -> None:
        raise RuntimeError("a broken display")

    stowray.pull(name, store=tmp_path / "a", engine="local", watch=note)
    assert {"resolve", "blob", "layer", "commit", "image"} <= {e.kind for e in last.values()}
    assert all(event.is_final for event in last.values())
    assert stowray.pull(name, store=tmp_path / "b", engine="local", watch=fail).fetched_bytes
