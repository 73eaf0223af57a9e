from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import threading
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stowray.pipeline.clock import Boot
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import (
    CancelledError,
    DigestMismatchError,
    LayerError,
    NodeError,
    NotFoundError,
    StorageError,
    StowrayError,
)
from stowray.pipeline.ingest_home import GenerationChanged
from stowray.pipeline.layer_tasks import LayerTasks
from stowray.pipeline.mount import mount, umount
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.snapshot_record import chain_id_of
from stowray.pipeline.store import Store
from tests.support.chains import Layer, commit_chain, reader
from tests.support.plain_user import plain_directory, run_plain
from tests.support.tars import archive, directory, entry, file, hardlink

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

FIRST = Boot("boot-1", "host")
LATER = Boot("boot-2", "host")

# Complete in itself: nothing in it depends on a layer below.
WHOLE = archive(directory("./"), directory("d"), file("d/f", b"one"))
# Its parent directory has no entry: the tree needs what lies below.
IMPLIED = archive(file("d/g", b"two"))
WHITEOUT = archive(directory("./"), directory("d"), file("d/.wh.f"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store", boot=FIRST) as store:
        yield store


@pytest.fixture
def snapshots(store: Store) -> Snapshots:
    return Snapshots(store)


def names(snapshots: Snapshots, chain_id: Digest) -> dict[bytes, bytes | None]:
    """Return what is visible: contents of files, None for directories."""
    with ChainView(snapshots.lowers(chain_id), snapshots.privileged) as view:
        found: dict[bytes, bytes | None] = {}
        for node in view.walk():
            if node.is_file:
                with open(view.open(node), "rb") as content:
                    found[node.path] = content.read()
            elif node.path:
                found[node.path] = None
        return found


def leftovers(store: Store) -> list[str]:
    return [name for name in os.listdir(store.path / "layers") if name.startswith(".")]


def test_a_layer_stops_at_the_room_kept_in_reserve(store: Store, snapshots: Snapshots) -> None:
    layer = Layer(archive(*(file(str(number), bytes(1 << 20)) for number in range(12))))
    small = Layer(WHOLE)
    store.reserve_bytes = 1 << 60
    with pytest.raises(StorageError, match=f"{1 << 60} stay in reserve"):
        snapshots.stage(layer.diff_id, layer.open_read)
    assert leftovers(store) == []
    # What is small is let through: it is what may free the rest.
    snapshots.stage(small.diff_id, small.open_read)
    store.reserve_bytes = 0
    assert snapshots.stage(layer.diff_id, layer.open_read).entries == 12


def test_copies_of_files_below_stop_at_the_room_kept_in_reserve(
    store: Store, snapshots: Snapshots, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Shared blocks take no room.
    monkeypatch.setattr("stowray.pipeline.file_content.clone", lambda *_: False)
    size = 3 << 20
    numbers = range(4)
    below = archive(*(file(f"f{number}", os.urandom(size)) for number in numbers))
    links = archive(*(hardlink(f"l{number}", f"f{number}") for number in numbers))
    few = archive(hardlink("l0", "f0"))
    store.reserve_bytes = 0
    commit_chain(snapshots, [below])
    store.reserve_bytes = 1 << 60
    with pytest.raises(StorageError, match=f"f2 needs .*{1 << 60} stay in reserve"):
        commit_chain(snapshots, [below, links])
    assert leftovers(store) == []
    commit_chain(snapshots, [below, few])
    store.reserve_bytes = 0
    commit_chain(snapshots, [below, links])


def test_a_chain_is_committed_in_order(snapshots: Snapshots) -> None:
    first, second, third = commit_chain(snapshots, [WHOLE, IMPLIED, WHITEOUT])
    assert first.chain_id == Digest.of(WHOLE)
    assert second.chain_id == Digest.of(f"{Digest.of(WHOLE)} {Digest.of(IMPLIED)}".encode())
    assert [link.chain_id for link in snapshots.chain(third.chain_id)] == [
        first.chain_id,
        second.chain_id,
        third.chain_id,
    ]
    assert third.parent == second.chain_id
    assert snapshots.blob_mapping()[second.chain_id] == Digest.of(IMPLIED)
    assert names(snapshots, second.chain_id) == {b"d": None, b"d/f": b"one", b"d/g": b"two"}
    assert names(snapshots, third.chain_id) == {b"d": None, b"d/g": b"two"}


def test_has_needs_all_below(snapshots: Snapshots, store: Store) -> None:
    first, second = commit_chain(snapshots, [WHOLE, IMPLIED])
    assert snapshots.has(second.chain_id)
    snapshots.trees.drop(first.layer)
    assert not snapshots.has(second.chain_id)
    with pytest.raises(NotFoundError):
        snapshots.lowers(second.chain_id)


def test_staging_again_finds_the_tree(snapshots: Snapshots) -> None:
    layer = Layer(WHOLE)
    assert not snapshots.stage(layer.diff_id, layer.open_read).existed
    again = snapshots.stage(layer.diff_id, layer.open_read)
    assert again.existed
    assert (again.tar_size, again.unpacked_size, again.entries) == (len(WHOLE), 3, 3)
    assert layer.opened == 1


def test_warnings_are_kept_for_whoever_finds_the_tree(snapshots: Snapshots) -> None:
    odd = archive(directory("./"), entry("f", records={"SCHILY.xattr.trusted.overlay.opaque": "y"}))
    layer = Layer(odd)
    first = snapshots.stage(layer.diff_id, layer.open_read)
    assert first.warnings
    assert snapshots.stage(layer.diff_id, layer.open_read).warnings == first.warnings


def test_an_independent_tree_serves_every_chain(snapshots: Snapshots) -> None:
    other = archive(directory("./"), file("other", b"3"))
    layer = Layer(WHOLE)
    (alone,) = commit_chain(snapshots, [layer])
    _, above = commit_chain(snapshots, [other, layer])
    assert alone.layer == above.layer
    assert alone.chain_id != above.chain_id
    assert layer.opened == 1


def test_a_dependent_tree_is_kept_for_its_parent_alone(snapshots: Snapshots) -> None:
    private = archive(directory("./"), directory("d", mode=0o700))
    public = archive(directory("./"), directory("d", mode=0o755))
    layer = Layer(IMPLIED)
    on_private = commit_chain(snapshots, [private, layer])[-1]
    on_public = commit_chain(snapshots, [public, layer])[-1]
    on_nothing = commit_chain(snapshots, [layer])[-1]
    assert len({on_private.layer, on_public.layer, on_nothing.layer}) == 3
    for snapshot, mode in ((on_private, 0o700), (on_public, 0o755), (on_nothing, 0o755)):
        with ChainView(snapshots.lowers(snapshot.chain_id), snapshots.privileged) as view:
            assert view.lookup(b"d").mode == mode
    # What was settled onto one parent is never taken for the layer alone.
    assert layer.opened == 3


def test_a_tree_with_notes_serves_every_chain_that_it_fits(snapshots: Snapshots) -> None:
    one = archive(directory("./"), file("one", b"1"))
    two = archive(directory("./"), file("two", b"2"))
    layer = Layer(IMPLIED)
    on_nothing = commit_chain(snapshots, [layer])[-1]
    on_one = commit_chain(snapshots, [one, layer])[-1]
    on_two = commit_chain(snapshots, [two, layer])[-1]
    assert on_nothing.layer == on_one.layer == on_two.layer
    assert layer.opened == 1
    assert names(snapshots, on_two.chain_id) == {b"two": b"2", b"d": None, b"d/g": b"two"}


def test_a_shared_tree_is_not_settled_onto_a_chain_that_it_does_not_fit(
    snapshots: Snapshots,
) -> None:
    private = archive(directory("./"), directory("d", mode=0o700))
    layer = Layer(IMPLIED)
    on_nothing = commit_chain(snapshots, [layer])[-1]
    on_private = commit_chain(snapshots, [private, layer])[-1]
    assert on_nothing.layer != on_private.layer
    for snapshot, mode in ((on_private, 0o700), (on_nothing, 0o755)):
        with ChainView(snapshots.lowers(snapshot.chain_id), snapshots.privileged) as view:
            assert view.lookup(b"d").mode == mode
    assert layer.opened == 2
    assert snapshots.depends(on_nothing)


def test_a_whiteout_in_an_implied_directory_fits_nothing_but_is_gone(snapshots: Snapshots) -> None:
    gone = Layer(archive(file("d/.wh.f"), file("e", b"e")))
    on_nothing = commit_chain(snapshots, [gone])[-1]
    assert names(snapshots, on_nothing.chain_id) == {b"e": b"e"}
    on_whole = commit_chain(snapshots, [WHOLE, gone])[-1]
    assert names(snapshots, on_whole.chain_id) == {b"d": None, b"e": b"e"}
    assert on_nothing.layer != on_whole.layer


def test_staging_finds_what_was_settled_onto_the_same_parent(snapshots: Snapshots) -> None:
    layer = Layer(IMPLIED)
    below, _ = commit_chain(snapshots, [WHOLE, layer])
    opened = layer.opened
    again = snapshots.stage(layer.diff_id, layer.open_read, parent=below.chain_id)
    assert again.existed
    assert layer.opened == opened
    # Alone it is not there any more.
    assert not snapshots.stage(layer.diff_id, layer.open_read).existed


def test_pulls_at_the_same_time_stage_a_layer_with_notes_once(
    snapshots: Snapshots, store: Store
) -> None:
    (base,) = commit_chain(snapshots, [WHOLE])
    layer = Layer(IMPLIED)
    chain_id = chain_id_of(base.chain_id, layer.diff_id)
    failures: list[StowrayError] = []

    def pull() -> None:
        own = Snapshots(store)
        try:
            own.stage(layer.diff_id, layer.open_read, parent=base.chain_id)
            own.commit(chain_id, base.chain_id, layer.diff_id, layer.diff_id, layer.open_read)
        except StowrayError as error:
            failures.append(error)

    for _ in range(20):
        layer.opened = 0
        threads = [threading.Thread(target=pull) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not failures
        assert layer.opened == 1
        assert snapshots.has(chain_id)
        assert snapshots.remove(chain_id)


def test_a_kill_after_sharing_loses_nothing(store: Store, snapshots: Snapshots) -> None:
    layer = Layer(IMPLIED)
    snapshots.stage(layer.diff_id, layer.open_read)
    name = snapshots.trees.alone(layer.diff_id)
    record = snapshots.trees.find(name)
    assert record is not None
    # What a commit does before it writes its snapshot.
    snapshots.trees.share(name, record)
    assert commit_chain(snapshots, [layer])[-1].layer == name
    on_whole = commit_chain(snapshots, [WHOLE, layer])[-1]
    assert on_whole.layer != name
    assert names(snapshots, on_whole.chain_id) == {b"d": None, b"d/f": b"one", b"d/g": b"two"}


def test_a_tree_taken_by_another_chain_is_staged_again(snapshots: Snapshots) -> None:
    layer = Layer(IMPLIED)
    snapshots.stage(layer.diff_id, layer.open_read)
    with snapshots.trees.take(snapshots.trees.alone(layer.diff_id)) as taken:
        assert taken is not None
        snapshot = snapshots.commit(
            layer.diff_id, None, layer.diff_id, layer.diff_id, layer.open_read
        )
    assert snapshots.has(snapshot.chain_id)
    assert layer.opened == 2


def test_the_same_layer_twice_is_two_snapshots_and_one_lower(snapshots: Snapshots) -> None:
    first, _, third = commit_chain(snapshots, [WHOLE, WHITEOUT, WHOLE])
    assert first.layer == third.layer
    assert first.chain_id != third.chain_id
    lowers = snapshots.lowers(third.chain_id)
    assert lowers == [
        snapshots.trees.tree(third.layer),
        snapshots.trees.tree(snapshots.chain(third.chain_id)[1].layer),
    ]
    assert names(snapshots, third.chain_id) == {b"d": None, b"d/f": b"one"}


def test_a_link_to_a_lower_file_is_copied_up(snapshots: Snapshots) -> None:
    link = archive(directory("./"), directory("d"), hardlink("d/h", "d/f"))
    done = commit_chain(snapshots, [WHOLE, link])
    assert names(snapshots, done[-1].chain_id) == {b"d": None, b"d/f": b"one", b"d/h": b"one"}


def test_a_link_to_nothing_is_refused_and_leaves_nothing(
    snapshots: Snapshots, store: Store
) -> None:
    with pytest.raises(LayerError):
        commit_chain(snapshots, [archive(directory("./"), hardlink("h", "missing"))])
    assert snapshots.all() == []
    assert leftovers(store) == []


def test_the_chain_id_is_checked(snapshots: Snapshots) -> None:
    layer = Layer(WHOLE)
    with pytest.raises(DigestMismatchError) as caught:
        snapshots.commit(Digest.of(b"other"), None, layer.diff_id, layer.diff_id, layer.open_read)
    assert caught.value.expected == layer.diff_id


def test_a_wrong_diff_id_leaves_nothing(snapshots: Snapshots, store: Store) -> None:
    promised = Digest.of(b"something else")
    with pytest.raises(DigestMismatchError) as caught:
        snapshots.stage(promised, Layer(WHOLE).open_read)
    assert caught.value.what == f"layer {promised}"
    assert caught.value.actual == Digest.of(WHOLE)
    assert os.listdir(store.path / "layers") == []


def test_a_sha512_diff_id_is_held_to_its_own_algorithm(snapshots: Snapshots) -> None:
    diff_id = Digest.of(WHOLE, "sha512")
    snapshot = commit_chain(snapshots, [Layer(WHOLE, diff_id), WHOLE])[0]
    assert snapshot.chain_id == snapshot.diff_id == diff_id
    assert snapshots.has(diff_id)
    with pytest.raises(DigestMismatchError) as caught:
        wrong = Digest.of(b"other", "sha512")
        snapshots.stage(wrong, Layer(WHOLE).open_read)
    assert caught.value.actual == diff_id


def test_a_bad_layer_is_reported_while_its_download_stands_still(store: Store) -> None:
    blob = archive(file("../climbs")) + bytes(1 << 20)
    digest = Digest.of(blob)
    arguments = {
        "store": str(store.path),
        "boot": [store.boot.boot_id, store.boot.host],
        "digest": digest,
        "size": len(blob),
        "diff_id": digest,
        "limits": {},
    }
    ingest = store.acquire(digest, len(blob))
    assert ingest is not None
    with ingest:
        ingest.write(blob[:2048])
        # No more comes: without an end to the read in flight this would wait for a day.
        with pytest.raises(LayerError, match="climbs"):
            LayerTasks().run("stage", arguments, lambda *_: None, lambda: False)
    assert os.listdir(store.path / "layers") == []


def test_names_of_our_own_mean_nothing_in_a_layer(snapshots: Snapshots, store: Store) -> None:
    ours = ["layer.json", "tree", "tree.entries", "tree.copies", "work", "fs", ".complete"]
    content = archive(*(file(name, b"forged") for name in ours))
    top = commit_chain(snapshots, [content])[-1]
    assert names(snapshots, top.chain_id) == {name.encode(): b"forged" for name in ours}
    assert snapshots.has(top.chain_id)
    assert leftovers(store) == []


def test_after_a_malicious_layer_the_store_serves_at_once(snapshots: Snapshots) -> None:
    layer = Layer(archive(directory("./"), file("ok"), file("../escape")))
    for _ in range(2):
        with pytest.raises(LayerError):
            snapshots.stage(layer.diff_id, layer.open_read, wait_seconds=0)
    commit_chain(snapshots, [WHOLE])
    assert snapshots.has(Digest.of(WHOLE))


def test_a_missing_parent_is_named(snapshots: Snapshots) -> None:
    parent, layer = Digest.of(b"parent"), Layer(WHOLE)
    with pytest.raises(NotFoundError, match=str(parent)):
        snapshots.commit(
            chain_id_of(parent, layer.diff_id),
            parent,
            layer.diff_id,
            layer.diff_id,
            layer.open_read,
        )


class Changing(Layer):
    """A blob whose first bytes prove wrong a number of times."""

    def __init__(self, data: bytes, times: int) -> None:
        super().__init__(data)
        self.times = times

    @contextmanager
    def open_read(self) -> Iterator[Callable[[], bytes]]:
        self.opened += 1
        if self.opened > self.times:
            yield reader(self.data)
            return
        pieces = iter([self.data[:1024]])

        def read() -> bytes:
            for piece in pieces:
                return piece
            raise GenerationChanged

        yield read


def test_a_new_generation_begins_anew(snapshots: Snapshots, store: Store) -> None:
    layer = Changing(WHOLE, times=2)
    snapshots.stage(layer.diff_id, layer.open_read)
    assert layer.opened == 3
    assert leftovers(store) == []


def test_endless_generations_end(snapshots: Snapshots, store: Store) -> None:
    layer = Changing(WHOLE, times=1000)
    with pytest.raises(NodeError, match="wrong bytes"):
        snapshots.stage(layer.diff_id, layer.open_read)
    assert os.listdir(store.path / "layers") == []


def test_a_cancelled_stage_leaves_nothing(snapshots: Snapshots, store: Store) -> None:
    layer = Layer(WHOLE)
    with pytest.raises(CancelledError):
        snapshots.stage(layer.diff_id, layer.open_read, cancelled=lambda: True)
    assert os.listdir(store.path / "layers") == []


def test_who_waits_finds_the_tree_of_the_other(store: Store) -> None:
    layer = Layer(WHOLE)
    begun, go_on = threading.Event(), threading.Event()

    @contextmanager
    def slow() -> Iterator[Callable[[], bytes]]:
        begun.set()
        go_on.wait()
        with layer.open_read() as read:
            yield read

    first = threading.Thread(target=Snapshots(store).stage, args=(layer.diff_id, slow))
    first.start()
    begun.wait()
    with pytest.raises(StorageError, match="was not free"):
        Snapshots(store).stage(layer.diff_id, layer.open_read, wait_seconds=0)
    found = []
    second = threading.Thread(
        target=lambda: found.append(Snapshots(store).stage(layer.diff_id, layer.open_read))
    )
    second.start()
    go_on.set()
    first.join()
    second.join()
    assert found[0].existed
    assert layer.opened == 1


def test_after_a_reboot_only_what_was_synced_is_trusted(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with Store.open(path, boot=FIRST) as store:
        (synced,) = commit_chain(Snapshots(store), [WHOLE])
        store.sync()
        lost = commit_chain(Snapshots(store), [WHOLE, IMPLIED])[-1]
    with Store.open(path, boot=LATER) as store:
        snapshots = Snapshots(store)
        assert snapshots.has(synced.chain_id)
        assert not snapshots.has(lost.chain_id)
        # The tree may be anything after a power cut: it is made anew, not looked at.
        (snapshots.trees.tree(lost.layer) / "d" / "g").write_bytes(b"")
        layer = Layer(IMPLIED)
        again = snapshots.commit(
            lost.chain_id, synced.chain_id, layer.diff_id, layer.diff_id, layer.open_read
        )
        assert layer.opened == 1
        assert names(snapshots, again.chain_id)[b"d/g"] == b"two"


def test_a_damaged_record_counts_as_absent(snapshots: Snapshots, store: Store) -> None:
    (first,) = commit_chain(snapshots, [WHOLE])
    record = next((store.path / "snapshots").iterdir())
    record.write_bytes(record.read_bytes()[:-1])
    assert not snapshots.has(first.chain_id)
    commit_chain(snapshots, [WHOLE])
    assert snapshots.has(first.chain_id)


def test_a_tree_that_somebody_deleted_is_made_anew(snapshots: Snapshots) -> None:
    (first,) = commit_chain(snapshots, [WHOLE])
    remove_tree(snapshots.trees.tree(first.layer))
    assert not snapshots.has(first.chain_id)
    commit_chain(snapshots, [WHOLE])
    assert names(snapshots, first.chain_id) == {b"d": None, b"d/f": b"one"}


def test_a_snapshot_with_children_stays(snapshots: Snapshots) -> None:
    first, second = commit_chain(snapshots, [WHOLE, IMPLIED])
    with pytest.raises(StorageError, match="stands on it"):
        snapshots.remove(first.chain_id)
    assert snapshots.remove(second.chain_id)
    assert not snapshots.trees.tree(second.layer).exists()
    assert snapshots.remove(first.chain_id)
    assert not snapshots.remove(first.chain_id)


def test_a_snapshot_in_use_stays(snapshots: Snapshots, store: Store) -> None:
    (first,) = commit_chain(snapshots, [WHOLE])
    with snapshots.held(first.chain_id, "test"), pytest.raises(StorageError, match="in use"):
        snapshots.remove(first.chain_id)
    with store.lease("m", chain_ids=[first.chain_id], persistent=True, mount_point="/m"):
        pass
    with pytest.raises(StorageError, match="mounted at /m"):
        snapshots.remove(first.chain_id)
    assert snapshots.has(first.chain_id)


def test_a_tree_in_use_by_another_chain_stays(snapshots: Snapshots) -> None:
    (alone,) = commit_chain(snapshots, [WHOLE])
    above = commit_chain(snapshots, [WHITEOUT, WHOLE])[-1]
    assert snapshots.remove(alone.chain_id)
    assert snapshots.has(above.chain_id)


def test_other_users_reach_nothing(snapshots: Snapshots, store: Store) -> None:
    (first,) = commit_chain(snapshots, [WHOLE])
    above = snapshots.trees.tree(first.layer).parent
    assert stat.S_IMODE(above.stat().st_mode) == 0o700


KILLED = """
import sys
from pathlib import Path
from stowray.pipeline.clock import Boot
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.chains import commit_chain
from tests.unit.test_snapshot import FIRST, IMPLIED, WHOLE
commit_chain(Snapshots(Store.open(Path(sys.argv[1]), boot=FIRST)), [WHOLE, IMPLIED])
"""
POINTS = [
    "layer-before-rename",
    "layer-after-rename",
    "settle-before",
    "settle-after",
    "snapshot-before-record",
    "snapshot-after-record",
]


@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_the_next_run_completes(tmp_path: Path, point: str) -> None:
    path = tmp_path / "store"
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, str(path)],
        env={**os.environ, "STOWRAY_FAILPOINT": point},
        cwd=Path(__file__).parents[2],
        check=False,
    )
    assert killed.returncode == -signal.SIGKILL
    with Store.open(path, boot=FIRST) as store:
        snapshots = Snapshots(store)
        for snapshot in snapshots.all():
            # What is visible is complete.
            assert names(snapshots, snapshot.chain_id)
        second = commit_chain(snapshots, [WHOLE, IMPLIED])[-1]
        assert names(snapshots, second.chain_id) == {b"d": None, b"d/f": b"one", b"d/g": b"two"}
        snapshots.trees.sweep()
        assert leftovers(store) == []
        assert snapshots.has(second.chain_id)


def test_many_processes_commit_one_chain(tmp_path: Path) -> None:
    path = tmp_path / "store"
    processes = [
        subprocess.Popen([sys.executable, "-c", KILLED, str(path)], cwd=Path(__file__).parents[2])
        for _ in range(4)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    with Store.open(path, boot=FIRST) as store:
        snapshots = Snapshots(store)
        assert len(snapshots.all()) == 2
        assert leftovers(store) == []
        # Whoever came late staged the dependent layer for himself; gc takes that away.
        names_left = {link.layer for link in snapshots.all()}
        assert names_left <= set(snapshots.trees.names())


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="mounts a small tmpfs: needs root")
def test_a_full_disk_leaves_nothing_and_a_larger_one_goes_on(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "none", str(small)], check=True)
    try:
        with Store.open(small / "store", boot=FIRST) as store:
            snapshots = Snapshots(store)
            large = archive(directory("./"), file("large", bytes(3 << 20)))
            with pytest.raises(StorageError, match="disk is full"):
                commit_chain(snapshots, [large])
            assert os.listdir(store.path / "layers") == []
            subprocess.run(["mount", "-o", "remount,size=8m", str(small)], check=True)
            (done,) = commit_chain(snapshots, [large])
            assert snapshots.has(done.chain_id)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_layer_that_somebody_published_meanwhile_wins(snapshots: Snapshots) -> None:
    trees = snapshots.trees
    commit_chain(snapshots, [archive(directory("./"), file("f", b"1"))])
    (name,) = trees.names()
    record = trees.find(name)
    assert record is not None
    inode = trees.tree(name).stat().st_ino
    with trees.workspace() as workspace:
        (workspace.tree / "f").write_bytes(b"late")
        trees.publish(workspace, name, record)
    assert trees.tree(name).stat().st_ino == inode
    assert [entry for entry in os.listdir(trees.directory) if entry.startswith(".")] == []


def test_sweep_spares_live_writers(snapshots: Snapshots, store: Store) -> None:
    with snapshots.trees.workspace() as workspace:
        assert snapshots.trees.sweep() == 0
        assert workspace.tree.is_dir()
    (store.path / "layers" / ".tmp-dead" / "tree").mkdir(parents=True)
    assert snapshots.trees.sweep() == 1
    assert leftovers(store) == []


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support.chains import commit_chain
from tests.support.tars import archive, directory, file
from stowray.pipeline.overlay import ChainView
become_plain()
snapshots = Snapshots(Store.open(Path(sys.argv[1]) / "store"))
base = archive(directory("./"), directory("d", mode=0o500, uid=7), file("d/f", b"1", uid=8))
done = commit_chain(snapshots, [base, archive(file("d/.wh.f"), file("d/g", b"2", mode=0))])
with ChainView(snapshots.lowers(done[-1].chain_id), False) as view:
    for node in view.walk():
        print(node.path.decode(), oct(node.mode), node.uid)
print(snapshots.trees.format, snapshots.has(done[-1].chain_id))
"""


def test_a_plain_user_commits_in_his_own_format() -> None:
    with plain_directory() as work:
        lines = run_plain(PLAIN, work).splitlines()
        assert lines[1:3] == ["d 0o500 7", "d/g 0o0 0"]
        format_name, has = lines[-1].split()
        assert format_name.startswith("u1.")
        assert has == "True"


def test_formats_are_never_shared(store: Store) -> None:
    mine = Snapshots(store)
    other = Snapshots(store, privileged=not mine.privileged)
    (first,) = commit_chain(mine, [WHOLE])
    assert mine.has(first.chain_id)
    assert not other.has(first.chain_id)
    assert other.all() == []


# A model of the specification: whiteouts and opaque markers act on lower content only, the other
# entries follow in their order.
NAMES = ["a", "b", "c"]
Step = tuple[str, str, str]
steps = st.tuples(
    st.sampled_from(["file", "directory", "whiteout", "opaque"]),
    st.sampled_from(NAMES),
    st.sampled_from(["", *NAMES]),
)
layers = st.lists(steps, min_size=1, max_size=4, unique_by=lambda step: step[1:])


def entries(layer: list[Step]) -> list[tuple[str, str]]:
    """Return kind and path of each entry; parents have entries of their own.

    So each layer is complete in itself, and the same tree wherever it appears in the chain.
    """
    found: list[tuple[str, str]] = []
    made: set[str] = set()
    for kind, top, below in layer:
        if (below or kind == "opaque") and top not in made:
            found.append(("directory", top))
            made.add(top)
        if kind == "opaque":
            found.append((kind, top))
            continue
        found.append((kind, f"{top}/{below}" if below else top))
        if kind == "directory" and not below:
            made.add(top)
        elif kind == "file" and not below:
            made.discard(top)
    return found


def model(tree: dict[str, bytes | None], layer: list[Step], content: bytes) -> None:
    for kind, path in entries(layer):
        if kind == "whiteout":
            tree.pop(path, None)
        if kind in ("whiteout", "opaque"):
            for name in [name for name in tree if name.startswith(f"{path}/")]:
                del tree[name]
    for kind, path in entries(layer):
        if kind == "directory":
            tree[path] = None
        elif kind == "file":
            for name in [name for name in tree if name.startswith(f"{path}/")]:
                del tree[name]
            tree[path] = content


def encode(layer: list[Step], content: bytes) -> bytes:
    parts = [directory("./")]
    for kind, path in entries(layer):
        above, _, name = path.rpartition("/")
        prefix = f"{above}/" if above else ""
        if kind == "directory":
            parts.append(directory(path))
        elif kind == "file":
            parts.append(file(path, content))
        elif kind == "whiteout":
            parts.append(file(f"{prefix}.wh.{name}"))
        else:
            parts.append(file(f"{path}/.wh..wh..opq"))
    return archive(*parts)


def visible(root: Path) -> dict[bytes, bytes | None]:
    base = os.fsencode(root)
    found: dict[bytes, bytes | None] = {}
    for where, directories, files in os.walk(base):
        for name in directories:
            found[os.path.relpath(os.path.join(where, name), base)] = None
        for name in files:
            path = Path(os.fsdecode(os.path.join(where, name)))
            found[os.path.relpath(os.fsencode(path), base)] = path.read_bytes()
    return found


@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="compares with a real overlay mount: needs root")
@given(
    pool=st.lists(layers, min_size=2, max_size=3),
    order=st.lists(st.integers(0, 2), min_size=2, max_size=6),
)
@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_equal_trees_in_one_chain_equal_sequential_application(
    tmp_path: Path, pool: list[list[Step]], order: list[int]
) -> None:
    remove_tree(tmp_path / "store")
    expected: dict[str, bytes | None] = {}
    chain = []
    for number in order:
        steps_of_layer, content = pool[number % len(pool)], b"%d" % (number % len(pool))
        model(expected, steps_of_layer, content)
        chain.append(encode(steps_of_layer, content))
    with Store.open(tmp_path / "store", boot=FIRST) as store:
        snapshots = Snapshots(store)
        top = commit_chain(snapshots, chain)[-1]
        lowers = snapshots.lowers(top.chain_id)
        assert len(lowers) == len(set(lowers))
        wanted = {name.encode(): content for name, content in expected.items()}
        assert names(snapshots, top.chain_id) == wanted
        point = mount(store, top.chain_id, tmp_path / "mounted")
        try:
            assert visible(point) == wanted
        finally:
            umount(store, point)
