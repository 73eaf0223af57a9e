from __future__ import annotations

import os
import threading
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.collect import Collected, collect, remove
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import NotFoundError, StorageError
from stowray.pipeline.leases import LOCK
from stowray.pipeline.references import pin_reference, record_path
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.plain_user import plain_directory, run_plain
from tests.support.stores import (
    FIRST_BOOT,
    NEXT_BOOT,
    OTHER_HOST,
    check_blobs,
    commit,
    kill,
    leftovers,
    listen,
    pattern,
    run_killed,
    start,
    stow,
    tar,
)

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path


HOLD = """
store = Store.open(sys.argv[1])
with store.lease("pull") as lease:
    say("empty")
    sys.stdin.readline()
    lease.add([Digest(text) for text in sys.argv[2:]])
    say("named")
    sys.stdin.readline()
"""


@pytest.fixture
def store(workspace: Path) -> Iterator[Store]:
    with Store.open(workspace / "store") as store:
        yield store


def content(store: Store) -> list[str]:
    """Return all that is in the store besides what every store has."""
    folders = ("blobs/sha256", "blobs/sha512", "sources/sha256", "sources/sha512", "refs", "trash")
    folders += ("ingest", "layers", "snapshots", "leases", "quarantine")
    return [f"{folder}/{name}" for folder in folders for name in os.listdir(store.path / folder)]


def test_nothing_that_an_image_needs_is_collected(store: Store) -> None:
    known = stow(store, "a:1", "base", "top")
    before = sorted(content(store))
    report = collect(store)
    assert report == Collected((), (), (), (), (), 0, report.kept)
    assert report.kept > 0
    assert sorted(content(store)) == before
    assert Snapshots(store).has(Digest(known.chain_id))


def test_after_the_last_reference_nothing_of_an_image_is_left(store: Store) -> None:
    known = stow(store, "a:1", "base", "top")
    assert remove(store, "a:1") == 1
    dry = collect(store, dry_run=True)
    assert len(check_blobs(store.path)) == 4
    report = collect(store)
    assert report == dry
    assert set(report.blobs) == {*known.layers, known.config, known.manifest}
    assert len(report.snapshots) == len(report.layers) == 2
    assert report.kept == 0
    assert content(store) == []


def test_removing_what_is_not_here_says_so(store: Store) -> None:
    stow(store, "a:1", "base")
    with pytest.raises(NotFoundError, match="b:1"):
        remove(store, "b:1")
    with pytest.raises(NotFoundError, match="linux/s390x"):
        remove(store, "a:1", "linux/s390x")
    assert remove(store, "a:1", "linux/amd64") == 1


def test_shared_layers_stay_as_long_as_one_image_needs_them(store: Store) -> None:
    stow(store, "a:1", "base", "a")
    other = stow(store, "b:1", "base", "b")
    remove(store, "a:1")
    report = collect(store)
    assert len(report.layers) == len(report.snapshots) == 1
    assert check_blobs(store.path) == {*other.layers, other.config, other.manifest}
    assert len(Snapshots(store).chain(Digest(other.chain_id))) == 2


def test_a_handle_holds_an_image_that_was_removed(store: Store) -> None:
    known = stow(store, "a:1", "base", "top")
    with store.lease("handle", known.digests, [known.chain_id]):
        remove(store, "a:1")
        before = sorted(content(store))
        report = collect(store)
        assert (report.blobs, report.snapshots, report.layers) == ((), (), ())
        assert sorted(content(store)) == before
    collect(store)
    assert content(store) == []


def test_a_running_pull_loses_nothing(store: Store) -> None:
    early = commit(store, b"here before the pull")
    layer = commit(store, tar("x"))
    process = start(HOLD, store.path, layer)
    listen(process, "empty")
    # It may be about to name what is made from now on, but not what it has not looked for.
    late = commit(store, b"made while the pull resolves")
    assert set(collect(store).blobs) == {early, layer}
    commit(store, tar("x"))
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()
    listen(process, "named")
    # Now it has named what it needs.
    assert set(collect(store).blobs) == {late}
    assert check_blobs(store.path) == {layer}
    kill(process)
    assert set(collect(store).blobs) == {layer}
    assert content(store) == []


def test_a_staged_layer_is_held_by_its_diff_id(store: Store) -> None:
    known = stow(store, "a:1", "base")
    remove(store, "a:1")
    for path in (store.path / "snapshots").iterdir():
        path.unlink()
    with store.lease("pull", known.layers):
        assert collect(store).layers == ()
    assert len(collect(store).layers) == 1


def test_a_staged_layer_is_held_by_a_pull_that_has_yet_to_commit(store: Store) -> None:
    known = stow(store, "a:1", "base", "top")
    remove(store, "a:1")
    for path in (store.path / "snapshots").iterdir():
        path.unlink()
    with store.lease("pull", [known.manifest], [known.chain_id]):
        assert collect(store).layers == ()
    assert len(collect(store).layers) == 2
    assert content(store) == []


@pytest.mark.parametrize("what", ["reference", "lease"])
def test_nothing_is_collected_while_a_root_cannot_be_read(store: Store, what: str) -> None:
    known = stow(store, "a:1", "base")
    stray = commit(store, b"stray")
    lease = store.lease("mount", [known.manifest], persistent=True)
    path = record_path(store, "a:1", "linux/amd64") if what == "reference" else lease.path
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="damaged") as caught:
        collect(store)
    assert caught.value.path == str(path)
    assert stray in check_blobs(store.path)
    lease.close()


def test_a_damaged_snapshot_record_goes_and_holds_nothing(store: Store) -> None:
    stow(store, "a:1", "base")
    (path,) = (store.path / "snapshots").iterdir()
    path.write_bytes(b"")
    report = collect(store)
    assert report.snapshots == (path.name,)
    assert len(report.layers) == 1


class TestIngests:
    def partial(self, store: Store, age: float) -> Path:
        digest = Digest.of(pattern(100))
        with store.acquire(digest, 100) or pytest.fail("no ingest") as ingest:
            ingest.write(pattern(50))
        path = store.ingest_path(digest)
        newest = max(entry.stat().st_mtime for entry in path.iterdir())
        for entry in path.iterdir():
            os.utime(entry, (newest - age, newest - age))
        return path

    def test_old_ones_go_when_nobody_writes_them(self, store: Store) -> None:
        path = self.partial(store, age=25 * 3600)
        assert collect(store).ingests == (path.name,)
        assert content(store) == []

    @pytest.mark.parametrize("age", [3600.0, -365 * 86400.0], ids=["young", "clock set back"])
    def test_young_ones_stay(self, store: Store, age: float) -> None:
        path = self.partial(store, age)
        assert collect(store).ingests == ()
        assert path.exists()

    def test_one_with_a_writer_stays_however_old(self, store: Store) -> None:
        path = self.partial(store, age=25 * 3600)
        with store.acquire(Digest.of(pattern(100)), 100) or pytest.fail("no ingest") as ingest:
            for entry in path.iterdir():
                os.utime(entry, (0, 0))
            assert collect(store).ingests == ()
            ingest.write(pattern(100)[50:])
            ingest.commit()
        collect(store, ingest_seconds=0)

    @pytest.mark.parametrize("failpoint", ["ingest-after-record", "ingest-before-unlock"])
    def test_what_a_writer_left_after_its_commit_goes_at_once(
        self, store: Store, failpoint: str
    ) -> None:
        code = """
with Store.open(sys.argv[1]).acquire(Digest.of(b"x"), 1) as ingest:
    ingest.write(b"x")
    ingest.commit()
"""
        run_killed(code, store.path, failpoint=failpoint)
        assert len(leftovers(store.path)) == 1
        with store.lease("test", [Digest.of(b"x")]):
            assert len(collect(store).ingests) == 1
        assert leftovers(store.path) == []
        assert check_blobs(store.path) == {Digest.of(b"x")}

    def test_half_written_documents_go(self, store: Store) -> None:
        code = 'Store.open(sys.argv[1]).put_blob(Digest.of(b"x"), b"x")'
        run_killed(code, store.path, failpoint="put-before-rename")
        assert len(leftovers(store.path)) == 1
        collect(store)
        assert content(store) == []

    def test_workspaces_of_dead_stagers_go_and_live_ones_stay(self, store: Store) -> None:
        (store.path / "layers" / ".tmp-dead" / "tree").mkdir(parents=True)
        with Snapshots(store).trees.workspace() as workspace:
            (workspace.tree / "file").write_text("")
            collect(store)
            assert os.listdir(store.path / "layers") == [workspace.path.name]


class TestLimits:
    def test_the_least_recently_pulled_go_first(self, store: Store) -> None:
        for number, name in enumerate(["c:1", "a:1", "b:1"]):
            stow(store, name, "base", name, created=1000.0 + number)
        total = collect(store).kept
        report = collect(store, max_size=total - 1)
        assert report.references == (("c:1", "linux/amd64"),)
        assert report.kept < total
        assert [known.reference for known in store.references()] == ["a:1", "b:1"]
        report = collect(store, max_size=0)
        assert [reference for reference, _ in report.references] == ["a:1", "b:1"]
        assert content(store) == []

    def test_a_use_makes_an_image_young_again(self, store: Store) -> None:
        oldest = stow(store, "a:1", "a", created=1000.0)
        stow(store, "b:1", "b", created=2000.0)
        total = collect(store).kept
        store.record_reference(oldest)  # as every pull does, also one that finds everything
        report = collect(store, max_size=total - 1)
        assert report.references == (("b:1", "linux/amd64"),)

    @pytest.mark.parametrize(
        "limits", [{}, {"max_size": 6000}, {"max_size": 0}, {"min_free": 1 << 60}]
    )
    def test_a_dry_run_tells_what_the_real_one_does(
        self, store: Store, limits: dict[str, int]
    ) -> None:
        for number, name in enumerate(["c:1", "a:1", "b:1", "d:1"]):
            stow(store, name, "base", name, created=1000.0 + number)
        pin_reference(store, "a:1")
        remove(store, "d:1")
        before = content(store)
        told = collect(store, dry_run=True, **limits)
        assert content(store) == before
        assert collect(store, **limits) == told
        again = collect(store, **limits)
        assert (again.blobs, again.layers, again.references) == ((), (), ())
        assert [known.reference for known in store.references() if known.pinned] == ["a:1"]

    def test_pins_and_leases_stand_above_limits(self, store: Store) -> None:
        stow(store, "pinned:1", "a")
        pin_reference(store, "pinned:1")
        leased = stow(store, "leased:1", "b")
        stow(store, "free:1", "c")
        with store.lease("handle", leased.digests, [leased.chain_id]):
            assert [name for name, _ in collect(store, max_size=0).references] == ["free:1"]
        assert {known.reference for known in store.references()} == {"pinned:1", "leased:1"}

    def test_free_space_is_made(self, store: Store) -> None:
        stow(store, "a:1", "a")
        stow(store, "b:1", "b", created=2.0)
        assert collect(store, min_free=0).references == ()
        report = collect(store, min_free=1 << 60, dry_run=True)
        assert len(report.references) == 2
        assert len(store.references()) == 2


def test_marks_of_earlier_boots_go_with_what_they_vouched_for(workspace: Path) -> None:
    path = workspace / "boots"
    with Store.open(path, boot=FIRST_BOOT) as store:
        stow(store, "old:1", "a")
        store.sync()
    with Store.open(path, boot=OTHER_HOST) as store:
        store.sync()
    with Store.open(path, boot=NEXT_BOOT) as store:
        stow(store, "new:1", "b")
        store.sync()
        assert len(store.trust.marks()) == 3
        collect(store)
        # What was made on the first boot is here and trusted by its mark alone.
        assert len(store.trust.marks()) == 3
        remove(store, "old:1")
        collect(store, dry_run=True)
        collect(store)
        collect(store)
        # Another host's mark is its own affair.
        assert len(store.trust.marks()) == 2
        assert all(store.has(digest) for digest in store.references()[0].digests)


class TestConcurrency:
    def test_a_lease_waits_for_a_collector_and_not_for_its_deletion(self, store: Store) -> None:
        with store.lock(LOCK, wait_seconds=0):
            made = threading.Event()

            def work() -> None:
                with store.lease("pull"):
                    made.set()

            thread = threading.Thread(target=work)
            thread.start()
            with pytest.raises(StorageError, match="was not free"):
                store.lock(LOCK, wait_seconds=0.01, shared=True).__enter__()
            assert not made.is_set()
        thread.join(30)
        assert made.is_set()

    @pytest.mark.parametrize("failpoint", ["collect-while-setting-aside", "collect-before-delete"])
    def test_a_killed_collector_is_finished_by_the_next(self, store: Store, failpoint: str) -> None:
        kept = stow(store, "a:1", "base", "top")
        stow(store, "b:1", "base", "other")
        remove(store, "b:1")
        code = "from stowray.pipeline.collect import collect\ncollect(Store.open(sys.argv[1]))"
        run_killed(code, store.path, failpoint=failpoint)
        assert Snapshots(store).has(Digest(kept.chain_id))
        collect(store)
        assert check_blobs(store.path) == {*kept.layers, kept.config, kept.manifest}
        remove(store, "a:1")
        collect(store)
        assert content(store) == []

    def test_many_collectors_and_pulls_lose_nothing(self, store: Store) -> None:
        problems: list[str] = []
        done = threading.Event()

        def sweep() -> None:
            while not done.is_set():
                collect(store)

        def pull(number: int) -> None:
            for turn in range(10):
                data = pattern(500, seed=number * 100 + turn)
                digest = Digest.of(data)
                with store.lease("pull") as lease:
                    lease.add([digest])
                    commit(store, data)
                    if not store.has(digest) or store.read_blob(digest, 500) != data:
                        problems.append(f"lost {digest}")

        sweepers = [threading.Thread(target=sweep) for _ in range(2)]
        pulls = [threading.Thread(target=pull, args=(number,)) for number in range(3)]
        for thread in (*sweepers, *pulls):
            thread.start()
        for thread in pulls:
            thread.join()
        done.set()
        for thread in sweepers:
            thread.join()
        assert problems == []
        collect(store)
        assert content(store) == []


def test_a_plain_user_collects_trees_that_are_closed_to_himself() -> None:
    code = """
import encodings.ascii, json, msgpack, sys
from pathlib import Path
import stowray.pipeline.probe, stowray.pipeline.layout, stowray.pipeline.references
from stowray.pipeline.collect import collect
from stowray.pipeline.store import Store
become_plain()
store = Store.open(sys.argv[1] + "/store")
tree = store.path / "layers" / "u1-stray" / "tree"
(tree / "closed" / "deep").mkdir(parents=True)
(tree / "closed" / "file").write_text("")
outside = Path(sys.argv[1], "outside")
outside.write_text("canary")
(tree / "closed" / "link").symlink_to(outside)
(tree / "closed").chmod(0)
tree.chmod(0o555)
print(collect(store).layers, list((store.path / "layers").iterdir()), outside.read_text())
"""
    with plain_directory() as folder:
        assert run_plain(code, folder).strip() == "('u1-stray',) [] canary"
