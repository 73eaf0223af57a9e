"""``stowray verify`` as a person meets it: exit status, what is named, and what repairs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.cli.app import run
from stowray.pipeline.foundation import FORMAT
from stowray.pipeline.store import Store
from tests.support.invariants import check_store, trees_of
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

LAYERS = [small_tar({"etc/a": b"one" * 100}), small_tar({"etc/b": b"two" * 100, "etc/c": b""})]


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as made:
        made.add_image("a/b", "1", LAYERS)
        yield made


@pytest.fixture
def store(registry: FakeRegistry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    """A store with one image, pulled by the command."""
    path = tmp_path / "store"
    words = ["--store", str(path), "--engine", "local", "-q", "pull", f"{registry.host}/a/b:1"]
    assert run(words) == 0
    capsys.readouterr()
    return path


@pytest.fixture
def verify(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, dict[str, Any]]]:
    def call(*options: str) -> tuple[int, dict[str, Any]]:
        words = ["--store", str(store), "--engine", "local", "-q", "verify", "--json", *options]
        status = run(words)
        # Before it stand the errors of references that cannot be pulled again.
        return status, json.loads(capsys.readouterr().out.splitlines()[-1])

    return call


def one(folder: Path, pattern: str) -> Path:
    """Return the largest file of a kind."""
    found = [path for path in folder.glob(pattern) if path.is_file() and not path.is_symlink()]
    return max(found, key=lambda path: (path.stat().st_size, str(path)))


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0x10
    overwrite(path, bytes(data))


def cut(path: Path) -> None:
    overwrite(path, path.read_bytes()[:-1])


def empty(path: Path) -> None:
    overwrite(path, b"")


def overwrite(path: Path, data: bytes) -> None:
    """Change a file as a failing disk does: its owner, mode and times stay."""
    before = path.stat()
    path.chmod(0o600)
    path.write_bytes(data)
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


KINDS = {
    "blob": "blobs/sha256/*",
    "reference": "refs/**/*",
    "snapshot": "snapshots/**/*",
    "source": "sources/sha256/*",
    "layer": "layers/**/layer.json",
    "file of a tree": "layers/**/tree/etc/b",
    "index": "index.json",
    "layout": "oci-layout",
}


@pytest.mark.parametrize("how", [flip, cut, empty], ids=["flipped", "cut", "emptied"])
@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_each_kind_is_exit_5_until_it_is_mended(
    store: Path,
    verify: Callable[..., tuple[int, dict[str, Any]]],
    kind: str,
    how: Callable[[Path], None],
) -> None:
    trees = trees_of(store)
    path = one(store, KINDS[kind])
    how(path)
    status, report = verify("--deep")
    assert status == 5
    named = [found["path"] for found in report["damaged"]]
    assert any(name.startswith(str(path)) for name in named), named
    assert report["repaired"] is None
    status, report = verify("--deep", "--repair")
    # Who served a blob is noted anew as soon as the blob has been proven again.
    assert report["repaired"] or (kind, report["damaged"]) == ("source", [])
    assert (status, report["left"]) == (0, [])
    status, report = verify("--deep")
    assert (status, report["damaged"]) == (0, [])
    assert trees_of(store) == trees
    check_store(store)


def test_damage_that_cannot_be_mended_stays_exit_5(
    store: Path, registry: FakeRegistry, verify: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    blob = one(store, KINDS["blob"])
    flip(blob)
    registry.close()
    status, report = verify("--repair")
    assert (status, report["repaired"]) == (5, False)
    assert {found["digest"] for found in report["damaged"]} == {f"sha256:{blob.name}"}


@pytest.mark.parametrize("content", [b"\x71\n", b"1", b"1\n\n", b"x" * 64, b"-1\n"], ids=repr)
def test_a_damaged_version_is_named_and_mended(
    store: Path,
    verify: Callable[..., tuple[int, dict[str, Any]]],
    capsys: pytest.CaptureFixture[str],
    content: bytes,
) -> None:
    version = store / "version"
    overwrite(version, content)
    # Every other command refuses, and says what mends it; doctor too.
    assert run(["--store", str(store), "images"]) == 7
    assert "verify --repair" in capsys.readouterr().err
    assert run(["--store", str(store), "doctor", "--json"]) == 1
    findings = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    (told,) = [finding for finding in findings if finding["check"] == "store"]
    assert told["state"] == "problem"
    assert "verify --repair" in told["advice"]
    assert version.read_bytes() == content
    status, report = verify()
    assert status == 5
    assert [found["path"] for found in report["damaged"]] == [str(version)]
    status, report = verify("--repair")
    assert (status, report["repaired"]) == (0, True)
    assert version.read_bytes() == f"{FORMAT}\n".encode()
    assert verify("--deep")[0] == 0
    check_store(store)


def test_a_damaged_version_hides_no_other_damage(
    store: Path, verify: Callable[..., tuple[int, dict[str, Any]]]
) -> None:
    overwrite(store / "version", b"?\n")
    blob = one(store, KINDS["blob"])
    flip(blob)
    status, report = verify("--repair")
    assert (status, report["repaired"]) == (0, True)
    assert {Path(found["path"]).name for found in report["damaged"]} >= {"version", blob.name}
    assert verify()[0] == 0


@pytest.mark.parametrize("other", ["nonce", "oci-layout", "snapshots"])
def test_a_version_is_not_guessed_where_more_is_amiss(
    store: Path, capsys: pytest.CaptureFixture[str], other: str
) -> None:
    overwrite(store / "version", b"?\n")
    if (store / other).is_dir():
        shutil.rmtree(store / other)
    else:
        flip(store / other)
    assert run(["--store", str(store), "verify", "--repair"]) == 7
    assert other in capsys.readouterr().err
    assert (store / "version").read_bytes() == b"?\n"


def test_the_store_of_a_newer_program_is_left_alone(
    store: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    newer = f"{FORMAT + 1}\n".encode()
    overwrite(store / "version", newer)
    assert run(["--store", str(store), "verify", "--repair"]) == 7
    assert "newer stowray" in capsys.readouterr().err
    assert run(["--store", str(store), "doctor", "--json"]) == 1
    assert "upgrade" in capsys.readouterr().out
    assert (store / "version").read_bytes() == newer


def test_a_directory_that_is_no_store_is_not_made_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "version").write_text("3.2 beta")
    (tmp_path / "mine" / "nonce").write_text("x")
    assert run(["--store", str(tmp_path / "mine"), "verify", "--repair"]) == 7
    assert (tmp_path / "mine" / "version").read_text() == "3.2 beta"
    assert capsys.readouterr().err
    with pytest.raises(Exception, match="damaged"):
        Store.open(tmp_path / "mine", create=False)
