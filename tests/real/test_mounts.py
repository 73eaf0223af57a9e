"""Mounts by the command: any number of layers, equal layers, and what a plain user has instead."""

from __future__ import annotations

import os
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support import judge, peers
from tests.support.command import Stowray
from tests.support.entries import directory, file, whiteout
from tests.support.images import Layer, Layout
from tests.support.plain_user import PLAIN_UID, plain_directory
from tests.unit.test_bundle import SHELL

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.entries import Entry


def numbered(number: int) -> list[Entry]:
    """A layer of many: it adds a file, replaces one, and removes one of the layer below."""
    parts = [
        directory("./", 0o711),
        directory("d", mtime=number),
        file(f"d/{number}", b"%d" % number, mode=0o640, mtime=number),
        file("d/last", b"%d" % number, mtime=number),
        file(f"d/gone-{number}"),
    ]
    return [*parts, whiteout(f"d/gone-{number - 1}")] if number else parts


def image(folder: Path, layers: list[list[Entry]]) -> str:
    """Make an image in a layout; return its reference."""
    layout = Layout(folder / "layout")
    made: dict[int, Layer] = {}
    parts = [made.setdefault(id(layer), layout.add_layer(layer, "none")) for layer in layers]
    layout.tag("it", layout.add_image(parts))
    return f"oci:{layout.path}:it"


@pytest.mark.root
@pytest.mark.parametrize(
    "count", [1, 2, 128, pytest.param(700, marks=pytest.mark.slow, id="more than the kernel takes")]
)
def test_any_number_of_layers(
    local: Stowray, workspace: Path, mount_point: Path, count: int
) -> None:
    reference = image(workspace, [numbered(number) for number in range(count)])
    local.run("mount", reference, mount_point)
    tree = judge.read_tree(mount_point)
    assert set(tree) == {
        b".",
        b"d",
        b"d/last",
        b"d/gone-%d" % (count - 1),
        *(b"d/%d" % number for number in range(count)),
    }
    assert (mount_point / "d" / "last").read_bytes() == b"%d" % (count - 1)
    assert (tree[b"."].mode, tree[b"d"].mtime_ns) == ("0711", (count - 1) * 10**9)
    for number in range(count):
        assert (mount_point / "d" / str(number)).read_bytes() == b"%d" % number
    local.run("rootfs", reference, workspace / "flat")
    assert judge.differences(judge.read_tree(workspace / "flat"), tree) == []
    local.run("umount", mount_point)
    assert os.listdir(mount_point) == []


@pytest.mark.root
def test_the_same_layer_twice(local: Stowray, workspace: Path, mount_point: Path) -> None:
    twice = [directory("d"), file("d/a", b"twice"), whiteout("d/b")]
    between = [directory("d", 0o700), whiteout("d/a"), file("d/b", b"between"), file("d/c", b"c")]
    reference = image(workspace, [twice, between, twice])
    local.run("mount", reference, mount_point)
    tree = judge.read_tree(mount_point)
    assert set(tree) == {b".", b"d", b"d/a", b"d/c"}
    assert tree[b"d"].mode == "0755"
    local.run("rootfs", reference, workspace / "flat")
    assert judge.differences(judge.read_tree(workspace / "flat"), tree) == []
    local.run("umount", mount_point)


class PlainStowray(Stowray):
    """The command as a plain user runs it, in an interpreter that he can run."""

    def __init__(self, home: Path, python: str) -> None:
        super().__init__(home / "store", home)
        self.python = python

    def environment(self) -> dict[str, str]:
        # Another interpreter of the same version finds what is installed for the tests' own.
        paths = [str(Path(__file__).parents[2]), sysconfig.get_path("purelib")]
        return {**super().environment(), "PYTHONPATH": ":".join(paths)}

    def as_user(self) -> list[str]:
        """What a command begins with to be run by him."""
        if os.getuid() != 0:
            return []
        return ["setpriv", f"--reuid={PLAIN_UID}", f"--regid={PLAIN_UID}", "--clear-groups"]

    def command(self, name: str, *arguments: str | Path) -> list[str]:
        _, *rest = super().command(name, *arguments)
        return [*self.as_user(), self.python, "-m", "stowray", *rest]


@pytest.fixture
def plain() -> Iterator[PlainStowray]:
    """A plain user's command and home, or a skip where he cannot run it."""
    peers.require("setpriv", "unshare")
    if peers.attempt(["unshare", "--user", "true"]).status:
        pytest.skip("this kernel gives no user namespaces to plain users")
    with plain_directory() as home:
        here = sys.version_info[:2]
        for python in (sys.executable, f"/usr/bin/python{here[0]}.{here[1]}"):
            command = PlainStowray(home, python)
            trial = [*command.as_user(), "env", python, "-m", "stowray", "--help"]
            if not peers.attempt(trial, env=command.environment()).status:
                yield command
                return
        pytest.skip("a plain user can run no interpreter of this version")


SEEN = r"""
id -u
cd "$1"
find . -mindepth 1 -printf '%P %y %#m %T@\n' | sort
"""


@pytest.mark.parametrize("count", [1, 2, 128])
def test_a_plain_user_sees_what_root_sees(plain: PlainStowray, count: int) -> None:
    home = plain.home
    reference = image(home, [numbered(number) for number in range(count)])
    (home / "tree").mkdir(mode=0o777)
    (home / "tree").chmod(0o777)
    plain.run("rootfs", reference, home / "flat")
    script = ["sh", "-c", SEEN, "sh"]
    answer = plain.run("unshare", reference, home / "tree", "--", *script, home / "tree")
    who, *seen = answer.text.splitlines()
    assert who == "0"
    flat = peers.run([*script, str(home / "flat")]).stdout.splitlines()[1:]
    assert seen == flat
    assert len(seen) == count + 3
    assert os.listdir(home / "tree") == []


def test_the_status_of_a_plain_users_command_is_the_commands(plain: PlainStowray) -> None:
    home = plain.home
    reference = image(home, [numbered(0)])
    (home / "tree").mkdir()
    arguments = (reference, home / "tree", "--")
    assert plain.attempt("unshare", *arguments, "sh", "-c", "exit 7").status == 7
    failed = plain.attempt("unshare", *arguments, "touch", home / "tree" / "new")
    assert failed.status == 1
    assert "Read-only file system" in failed.stderr


@pytest.mark.peers("runc")
def test_a_plain_users_bundle_starts_with_runc(plain: PlainStowray) -> None:
    home = plain.home
    layout = Layout(home / "layout")
    run = {"User": "1000", "Cmd": ["/bin/sh", "-c", "id -u; exit 6"]}
    layout.tag("it", layout.add_image([layout.add_layer(SHELL)], run=run))
    made = plain.run("bundle", f"oci:{layout.path}:it", home / "bundle")
    assert "user 1000:0 is not mapped" in made.stderr
    runc = ["runc", "--root", str(home / "state"), "run", "--bundle", str(home / "bundle")]
    identity = f"stowray-plain-{os.getpid()}"
    ran = peers.attempt([*plain.as_user(), *runc, identity], env={"XDG_RUNTIME_DIR": str(home)})
    assert (ran.status, ran.stdout) == (6, "0\n"), ran.stderr
