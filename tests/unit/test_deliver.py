"""Archives of images, and running other tools: what they get, and what their failures become."""

from __future__ import annotations

import contextlib
import json
import os
import tarfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.deliver import Target, deliver, image_name, parse_target, write_file
from stowray.pipeline.deliver_archive import ImageArchive
from stowray.pipeline.deliver_program import find_program, run_program
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NodeError,
    NotFoundError,
    StorageError,
    StowrayError,
    UsageError,
)
from stowray.pipeline.platform import Platform
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.image import Image

AMD64, ARM64 = Platform.parse("linux/amd64"), Platform.parse("linux/arm64")
NAME = "example.org/a/b:1"


def never() -> bool:
    return False


@pytest.fixture(scope="module")
def pulled(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, tuple[Store, Image]]]:
    """An index of two platforms, each pulled; the store has both."""
    path = tmp_path_factory.mktemp("deliver") / "store"
    with FakeRegistry() as registry, local_engine(path) as engine:
        # More than a pipe holds.
        layers = [small_tar({"x": os.urandom(300_000)}), small_tar({"y": b"1"})]
        amd64 = registry.add_image("a/b", None, layers)
        arm64 = registry.add_image("a/b", None, layers[1:], architecture="arm64")
        registry.add_index("a/b", "1", {"linux/amd64": amd64, "linux/arm64": arm64})
        source = parse_source(f"{registry.host}/a/b:1")
        images = {}
        for platform in (AMD64, ARM64):
            options = PullOptions(platform=platform, unpack=False)
            engine.pull(source, options)
            images[platform.architecture] = (Store.open(path), engine.image(source, options))
    yield images


@pytest.fixture
def amd64(pulled: dict[str, tuple[Store, Image]]) -> tuple[Store, Image]:
    return pulled["amd64"]


def written(archive: ImageArchive, path: Path) -> dict[str, bytes]:
    """The members of an archive, after a check of its framing."""
    with path.open("wb") as file:
        size = archive.write(file.fileno(), never)
    assert path.stat().st_size == size
    assert size % 10240 == 0
    members = {}
    with tarfile.open(path) as tar:
        for member in tar:
            assert (member.uid, member.gid, member.mtime) == (0, 0, 0)
            assert (member.uname, member.gname) == ("", "")
            if member.isfile():
                file = tar.extractfile(member)
                assert file is not None
                members[member.name] = file.read()
    return members


# Archives


def test_an_archive_is_a_complete_layout(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    store, image = amd64
    members = written(ImageArchive(store, image, NAME), tmp_path / "x.tar")
    assert members.pop("oci-layout") == b'{"imageLayoutVersion":"1.0.0"}'
    index = json.loads(members.pop("index.json"))
    (entry,) = index["manifests"]
    assert entry["digest"] == image.manifest_descriptor.digest
    assert entry["platform"] == {"os": "linux", "architecture": "amd64"}
    assert entry["annotations"] == {
        "io.containerd.image.name": NAME,
        "org.opencontainers.image.ref.name": NAME,
    }
    digests = {image.manifest_descriptor.digest, image.manifest.config.digest}
    digests |= {layer.digest for layer in image.layers}
    assert set(members) == {f"blobs/sha256/{digest.encoded}" for digest in digests}
    for name, data in members.items():
        assert Digest(f"sha256:{name.rpartition('/')[2]}").matches(data)


def test_an_archive_is_the_same_each_time(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    for name in ("one", "two"):
        written(ImageArchive(*amd64, NAME, docker=True), tmp_path / name)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_whole_archive_keeps_the_digest_of_the_index(
    amd64: tuple[Store, Image], tmp_path: Path
) -> None:
    store, image = amd64
    members = written(ImageArchive(store, image, NAME, whole=True), tmp_path / "x.tar")
    (entry,) = json.loads(members["index.json"])["manifests"]
    assert entry["digest"] == image.resolved.digest
    assert image.resolved.digest.matches(members[f"blobs/sha256/{image.resolved.digest.encoded}"])
    assert f"blobs/sha256/{image.manifest_descriptor.digest.encoded}" in members


def test_the_list_for_docker(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    store, image = amd64
    members = written(ImageArchive(store, image, NAME, docker=True), tmp_path / "x.tar")
    (saved,) = json.loads(members["manifest.json"])
    assert saved["RepoTags"] == [NAME]
    assert image.manifest.config.digest.matches(members[saved["Config"]])
    for name, layer in zip(saved["Layers"], image.layers, strict=True):
        assert layer.digest.matches(members[name])
    pinned = ImageArchive(store, image, f"example.org/a@{image.resolved.digest}", docker=True)
    assert json.loads(pinned.docker_list())[0]["RepoTags"] == []


@pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
def test_an_archive_is_read_back(
    pulled: dict[str, tuple[Store, Image]], tmp_path: Path, kind: str
) -> None:
    store, image = pulled["arm64"]
    written(ImageArchive(store, image, NAME, docker=True), tmp_path / "x.tar")
    with local_engine(tmp_path / "other") as engine:
        options = PullOptions(platform=ARM64)
        result = engine.pull(parse_source(f"{kind}:{tmp_path / 'x.tar'}:{NAME}"), options)
    assert result.config == image.manifest.config.digest
    assert result.chain_id == image.chain_id


def test_what_is_not_here_is_not_delivered(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    _, image = amd64
    empty = Store.open(tmp_path / "store")
    target = Target("oci-archive", str(tmp_path / "x.tar"))
    with pytest.raises(NotFoundError):
        deliver(empty, image, target, cancelled=never)
    assert not (tmp_path / "x.tar").exists()


# Files


def test_a_file_is_replaced_whole_or_not_at_all(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    path = folder / "x.tar"
    path.write_bytes(b"old")
    archive = ImageArchive(*amd64, NAME)
    with pytest.raises(CancelledError):
        write_file(archive, path, lambda: True)
    assert path.read_bytes() == b"old"
    assert os.listdir(folder) == ["x.tar"]
    write_file(archive, path, never)
    assert os.listdir(folder) == ["x.tar"]
    assert tarfile.is_tarfile(path)


def test_a_file_has_the_mode_that_the_user_wants(
    amd64: tuple[Store, Image], tmp_path: Path
) -> None:
    before = os.umask(0o027)
    try:
        write_file(ImageArchive(*amd64, NAME), tmp_path / "x.tar", never)
    finally:
        os.umask(before)
    assert (tmp_path / "x.tar").stat().st_mode & 0o777 == 0o640


def test_a_full_disk_leaves_nothing(amd64: tuple[Store, Image]) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("no /dev/full here")
    with full.open("wb") as file, pytest.raises(OSError, match="No space left"):
        ImageArchive(*amd64, NAME).write(file.fileno(), never)


@pytest.mark.parametrize(
    ("place", "error"),
    [("none/x.tar", StorageError), (".", UsageError), ("link", UsageError)],
)
def test_places_that_cannot_be_written(
    amd64: tuple[Store, Image], tmp_path: Path, place: str, error: type[StowrayError]
) -> None:
    (tmp_path / "link").symlink_to("/dev/null")
    with pytest.raises(error):
        write_file(ImageArchive(*amd64, NAME), tmp_path / place, never)
    assert Path("/dev/null").is_char_device()


def test_what_a_link_leads_to_is_replaced(amd64: tuple[Store, Image], tmp_path: Path) -> None:
    (tmp_path / "x.tar").write_bytes(b"old")
    (tmp_path / "link").symlink_to("x.tar")
    write_file(ImageArchive(*amd64, NAME), tmp_path / "link", never)
    assert (tmp_path / "link").is_symlink()
    assert tarfile.is_tarfile(tmp_path / "x.tar")


# Targets and names


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("containerd", Target("containerd")),
        ("podman", Target("podman")),
        ("docker", Target("docker")),
        ("oci-archive:/a/b.tar", Target("oci-archive", "/a/b.tar")),
        ("oci-archive:/a/b.tar:x:1", Target("oci-archive", "/a/b.tar", "x:1")),
    ],
)
def test_targets(text: str, target: Target) -> None:
    assert parse_target(text) == target


def test_a_relative_path_is_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert parse_target("oci-archive:x.tar") == Target("oci-archive", str(tmp_path / "x.tar"))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "Docker",
        "podman:x",
        "oci-archive",
        "oci-archive:",
        "oci-archive:/a/",
        "oci:/a",
        "docker ",
    ],
)
def test_what_is_no_target(text: str) -> None:
    with pytest.raises(UsageError, match="--to"):
        parse_target(text)


@pytest.mark.parametrize(
    ("source", "name", "target", "expected"),
    [
        ("debian:12", None, "containerd", "docker.io/library/debian:12"),
        ("debian", "x", "podman", "docker.io/library/x:latest"),
        ("oci-archive:/a:e.org/b:1", None, "podman", "e.org/b:1"),
        ("oci-archive:/a:b", None, "podman", "docker.io/library/b:latest"),
        ("oci-archive:/a:b", None, "oci-archive:/c", "b"),
        ("oci-archive:/a:b", None, "oci-archive:/c:d", "d"),
        ("oci-archive:/a", None, "oci-archive:/c", ""),
        ("docker-archive:/a:@0", None, "oci-archive:/c", ""),
        ("oci-archive:/a", "e.org/b:1", "docker", "e.org/b:1"),
        ("oci-archive:/a", None, "docker", None),
        ("docker-archive:/a:@0", None, "docker", None),
        ("oci-archive:/a:B", None, "docker", None),
    ],
)
def test_names(
    amd64: tuple[Store, Image], source: str, name: str | None, target: str, expected: str | None
) -> None:
    from dataclasses import replace

    image = replace(amd64[1], reference=parse_source(source))
    if expected is None:
        with pytest.raises(UsageError, match="--name"):
            image_name(image, name, parse_target(target))
    else:
        assert image_name(image, name, parse_target(target)) == expected


# Tools: small programs in their place, found by PATH as the real ones are


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], Path]:
    """Install a shell script under a name; returns the folder that it may write to."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
    monkeypatch.setenv("OUT", str(tmp_path))

    def install(name: str, script: str) -> Path:
        path = folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return tmp_path

    return install


def test_containerd_gets_address_namespace_and_name(
    amd64: tuple[Store, Image],
    program: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = program("ctr", 'echo "$@" >> $OUT/calls; case "$*" in *import*) cat > $OUT/tar;; esac')
    monkeypatch.setenv("CONTAINERD_ADDRESS", "/x/sock")
    monkeypatch.setenv("CONTAINERD_NAMESPACE", "k8s.io")
    store, image = amd64
    delivered = deliver(store, image, Target("containerd"), cancelled=never)
    assert (delivered.digest, delivered.present) == (image.resolved.digest, False)
    check, imported = (out / "calls").read_text().splitlines()
    assert f'-a /x/sock -n k8s.io images check name=="{image.reference}"' in check
    assert "-a /x/sock -n k8s.io images import" in imported
    with tarfile.open(out / "tar") as tar:
        index = json.load(tar.extractfile("index.json"))  # type: ignore[arg-type]
    assert index["manifests"][0]["digest"] == image.resolved.digest


def test_containerd_defaults(
    amd64: tuple[Store, Image],
    program: Callable[[str, str], Path],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = program("ctr", 'echo "$@" >> $OUT/calls; case "$*" in *import*) cat > /dev/null;; esac')
    monkeypatch.delenv("CONTAINERD_ADDRESS", raising=False)
    monkeypatch.delenv("CONTAINERD_NAMESPACE", raising=False)
    deliver(*amd64, Target("containerd"), cancelled=never)
    assert "-a /run/containerd/containerd.sock -n default " in (out / "calls").read_text()


def test_docker_is_not_asked_to_load_twice(
    amd64: tuple[Store, Image], program: Callable[[str, str], Path]
) -> None:
    store, image = amd64
    out = program("docker", f'echo "$1" >> $OUT/calls; echo {image.manifest.config.digest}')
    delivered = deliver(store, image, Target("docker"), cancelled=never)
    assert (delivered.digest, delivered.present) == (image.manifest.config.digest, True)
    assert (out / "calls").read_text() == "image\n"


def test_docker_wants_a_tag(
    amd64: tuple[Store, Image], program: Callable[[str, str], Path]
) -> None:
    program("docker", "exit 1")
    store, image = amd64
    name = f"example.org/a@{image.resolved.digest}"
    with pytest.raises(StowrayError, match="--name"):
        deliver(store, image, Target("docker"), name=name, cancelled=never)


@pytest.mark.parametrize(
    ("target", "said", "error", "advice"),
    [
        ("docker", "Cannot connect to the Docker daemon at x", NodeError, "DOCKER_HOST"),
        ("containerd", "ctr: failed to dial /run/x: timeout", NodeError, "CONTAINERD_ADDRESS"),
        ("containerd", "ctr: failed to dial: permission denied", StorageError, "root"),
        ("podman", "write /x: no space left on device", StorageError, "full"),
        ("podman", "something else", NodeError, "something else"),
        ("podman", "login https://u:secret@e.org/ failed", NodeError, "login"),
    ],
)
def test_failures_of_tools(
    amd64: tuple[Store, Image],
    program: Callable[[str, str], Path],
    target: str,
    said: str,
    error: type[StowrayError],
    advice: str,
) -> None:
    program({"containerd": "ctr"}.get(target, target), f"echo '{said}' >&2; exit 1")
    with pytest.raises(error) as raised:
        deliver(*amd64, Target(target), cancelled=never)
    assert advice in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize("target", ["containerd", "podman", "docker"])
def test_a_tool_that_is_not_installed(
    amd64: tuple[Store, Image], monkeypatch: pytest.MonkeyPatch, target: str, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NodeError, match="not installed"):
        deliver(*amd64, Target(target), cancelled=never)


# Programs


def shell(script: str) -> list[str]:
    return [find_program("sh", ""), "-c", script]


def test_a_program_gets_its_input_and_is_heard() -> None:
    data = os.urandom(1_000_000)

    def feed(pipe: int) -> None:
        with open(pipe, "wb", closefd=False) as file:
            file.write(data)

    ended = run_program(
        shell("wc -c; echo said >&2; exit 3"), seconds=60, cancelled=never, feed=feed
    )
    assert (ended.status, ended.output.strip(), ended.said) == (3, "1000000", "said")


def test_a_program_without_input_does_not_wait_for_any() -> None:
    assert run_program(shell("cat"), seconds=60, cancelled=never).status == 0


def test_a_program_that_hangs_up_says_why() -> None:
    def feed(pipe: int) -> None:
        while True:
            os.write(pipe, bytes(1 << 16))

    ended = run_program(
        shell("exec <&-; echo no >&2; exit 1"), seconds=60, cancelled=never, feed=feed
    )
    assert (ended.status, ended.said) == (1, "no")


def test_a_deadline_ends_a_program(tmp_path: Path) -> None:
    with pytest.raises(DeadlineError):
        run_program(
            shell(f"echo $$ > {tmp_path}/pid; exec sleep 600"), seconds=0.3, cancelled=never
        )
    assert_ended(tmp_path / "pid")


def test_a_cancel_ends_a_program(tmp_path: Path) -> None:
    started = tmp_path / "pid"

    def feed(pipe: int) -> None:
        # It never reads: the pipe fills up, and only its end lets us go.
        os.write(pipe, bytes(1 << 20))

    with pytest.raises(CancelledError):
        run_program(
            shell(f"echo $$ > {started}.new; mv {started}.new {started}; exec sleep 600"),
            seconds=60,
            cancelled=started.exists,
            feed=feed,
        )
    assert_ended(started)
    for thread in threading.enumerate():
        if thread.name == "deliver":
            # The pipe's other end is gone, so its write fails at once; it may still be on its way.
            thread.join(60)
            assert not thread.is_alive()


def test_a_feed_that_fails_is_what_is_raised(tmp_path: Path) -> None:
    """And the program is killed with what it started: its input must not look complete."""
    started = tmp_path / "pid"
    os.mkfifo(started)

    def feed(pipe: int) -> None:
        os.write(pipe, b"half")
        # Waits until the grandchild runs.
        (tmp_path / "seen").write_text(started.read_text())
        raise StorageError("/store", "is damaged")

    script = f"sleep 600 & echo $! > {started}; cat; wait"
    with pytest.raises(StorageError, match="is damaged"):
        run_program(shell(script), seconds=60, cancelled=never, feed=feed)
    assert_ended(tmp_path / "seen")


def assert_ended(path: Path) -> None:
    """A killed orphan may wait for its new parent to take note of its end."""
    status = Path(f"/proc/{int(path.read_text())}/stat")
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        give_up = time.monotonic() + 30
        while status.read_text().rpartition(")")[2].split()[0] != "Z":
            assert time.monotonic() < give_up, "STILL RUNNING"
            time.sleep(0.01)


def test_what_a_program_says_is_escaped() -> None:
    ended = run_program(shell(r"printf 'a\033[31mb\n\nc' >&2; exit 1"), seconds=60, cancelled=never)
    assert ended.said == "a\\x1b[31mb / c"
