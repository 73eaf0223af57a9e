from __future__ import annotations

import os
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import NotFoundError, StorageError, UsageError
from stowray.pipeline.leases import leases
from stowray.pipeline.mount import is_mounted
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.unshare import run_unshared
from tests.support import peers
from tests.support.chains import commit_chain
from tests.support.plain_user import plain_directory, run_plain
from tests.support.tars import archive, directory, file

if TYPE_CHECKING:
    from collections.abc import Iterator

BASE = archive(directory("./"), directory("d"), file("d/f", b"one"))
UPPER = archive(file("d/.wh.f"), file("d/g", b"two"))


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


@pytest.fixture
def target(tmp_path: Path) -> Path:
    target = tmp_path / "target"
    target.mkdir()
    return target


def commit(store: Store, *layers: bytes) -> Digest:
    return commit_chain(Snapshots(store), layers)[-1].chain_id


def test_the_command_alone_sees_the_image(store: Store, target: Path, tmp_path: Path) -> None:
    chain_id = commit(store, BASE, UPPER)
    script = f"(cat {target}/d/g; ls {target}/d; pwd) > {tmp_path}/seen"
    assert run_unshared(store, chain_id, target, ["sh", "-c", script]) == 0
    assert (tmp_path / "seen").read_text() == f"twog\n{Path.cwd()}\n"
    assert not is_mounted(target)
    assert os.listdir(store.path / "mounts") == []
    assert leases(store) == []


def test_what_the_command_mounts_stays_inside(target: Path) -> None:
    script = f"mount -t tmpfs none {target} && touch {target}/inside"
    assert run_unshared(None, None, None, ["sh", "-c", script]) == 0
    assert list(target.iterdir()) == []


def test_the_tree_is_read_only_without_an_upper_directory(
    store: Store, target: Path, tmp_path: Path
) -> None:
    chain_id = commit(store, BASE)
    touch = ["sh", "-c", f"touch {target}/new 2> /dev/null"]
    assert run_unshared(store, chain_id, target, touch) != 0
    assert run_unshared(store, chain_id, target, touch, rw_upper=tmp_path / "upper") == 0
    assert (tmp_path / "upper" / "new").exists()


@pytest.mark.parametrize(
    ("script", "status"),
    [
        pytest.param("exit 0", 0, id="success"),
        pytest.param("exit 7", 7, id="failure"),
        pytest.param("kill -9 $$", 137, id="killed by a signal"),
        # The shell would not die of it if the signal were still ignored, as Python has it.
        pytest.param("kill -PIPE $$; exit 3", 141, id="a broken pipe is deadly again"),
    ],
)
def test_the_status_is_the_commands(script: str, status: int) -> None:
    assert run_unshared(None, None, None, ["sh", "-c", script]) == status


def test_arguments_and_names_arrive_as_they_are(tmp_path: Path) -> None:
    odd = "a b'c\"\udcff\n$(false)"
    assert run_unshared(None, None, None, ["touch", "--", str(tmp_path / odd)]) == 0
    assert os.listdir(os.fsencode(tmp_path)) == [os.fsencode(odd)]


def test_the_environment_is_the_callers(tmp_path: Path) -> None:
    assert run_unshared(None, None, None, ["sh", "-c", f"env > {tmp_path}/env"]) == 0
    seen = (tmp_path / "env").read_text().splitlines()
    ours = [f"{name}={value}" for name, value in os.environ.items() if name.startswith("PYTHON")]
    assert sorted(line for line in seen if line.startswith("PYTHON")) == sorted(ours)
    assert f"PATH={os.environ['PATH']}" in seen


def test_a_command_that_is_not_there_is_named() -> None:
    with pytest.raises(StorageError) as caught:
        run_unshared(None, None, None, ["no-such-command"])
    assert caught.value.path == "no-such-command"
    with pytest.raises(UsageError):
        run_unshared(None, None, None, [])


def test_what_is_missing_is_named(store: Store, target: Path) -> None:
    with pytest.raises(NotFoundError):
        run_unshared(store, Digest.of(b"other"), target, ["true"])
    with pytest.raises(StorageError, match="no such directory"):
        run_unshared(store, None, target / "missing", ["true"])
    assert leases(store) == []


def test_it_works_beside_other_threads(store: Store, target: Path) -> None:
    # A process with several threads may not enter a user namespace: the child has one.
    chain_id = commit(store, BASE)
    stop = threading.Event()
    other = threading.Thread(target=stop.wait)
    other.start()
    try:
        results: list[int] = []
        command = ["test", "-e", f"{target}/d/f"]
        worker = threading.Thread(
            target=lambda: results.append(run_unshared(store, chain_id, target, command))
        )
        worker.start()
        worker.join()
        assert results == [0]
    finally:
        stop.set()
        other.join()


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.unshare import run_unshared
from tests.support.chains import commit_chain
from tests.unit.test_unshare import BASE, UPPER
from tests.support.tars import archive, directory, opaque, file
become_plain()
work = Path(sys.argv[1])
store = Store.open(work / "store")
OPAQUE = archive(directory("d"), opaque("d"), file("d/only", b"3"))
done = commit_chain(Snapshots(store), [BASE, UPPER, OPAQUE])
(work / "target").mkdir()
for snapshot in done:
    script = f"id -u; ls {work}/target/d"
    sys.stdout.flush()
    run_unshared(store, snapshot.chain_id, work / "target", [sys.argv[2], "-c", script])
"""


ORACLE = """
import sys
from base64 import b64decode
from pathlib import Path
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from stowray.pipeline.unshare import run_unshared
from tests.support.chains import Layer, commit_chain
from tests.support.vectors import table
oracle = table("layer_oracle")
become_plain()
sys.executable = sys.argv[2]
work = Path(sys.argv[1])
store = Store.open(work / "store")
(work / "target").mkdir()
for case in oracle["cases"]:
    if case.get("error") or len(case["layers"]) < 2:
        continue
    layers = [
        Layer(b64decode(oracle["blobs"][digest]), diff_id)
        for digest, diff_id in zip(case["layers"], case["diff_ids"])
    ]
    top = commit_chain(Snapshots(store), layers)[-1].chain_id
    script = f"find {work}/target -mindepth 1 -printf '%P %y\\n' > {work}/seen"
    assert run_unshared(store, top, work / "target", ["sh", "-c", script]) == 0
    seen = sorted(work.joinpath("seen").read_text().splitlines())
    wanted = sorted(f"{name} {text[0]}" for name, text in case["tree"].items())
    print(case["name"], "right" if seen == wanted else f"{seen} for {wanted}")
"""


def plain_python() -> str:
    """Return an interpreter that the plain user can run, or skip where he gets no namespaces."""
    # Root's own interpreter may lie where the plain user cannot run it for the child process.
    python = sys.executable if os.getuid() else "/usr/bin/python3"
    peers.require(python, "unshare")
    if peers.attempt(["unshare", "--user", "true"]).status:
        pytest.skip("this kernel gives no user namespaces to plain users")
    return python


def test_a_plain_user_needs_no_rights() -> None:
    python = plain_python()
    with plain_directory() as work:
        code = PLAIN.replace("become_plain()", "become_plain()\nsys.executable = sys.argv[3]")
        lines = run_plain(code, work, "/bin/sh", python).split()
        assert lines == ["0", "f", "0", "g", "0", "only"]


def test_a_plain_user_sees_what_the_fields_tools_agree_on() -> None:
    python = plain_python()
    with plain_directory() as work:
        lines = run_plain(ORACLE, work, python).splitlines()
        assert len(lines) > 10
        assert [line for line in lines if not line.endswith(" right")] == []
