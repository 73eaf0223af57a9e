from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.descriptor import Descriptor, Index, Manifest
from stowray.pipeline.digest import Digest
from stowray.pipeline.disk_images import DiskImage, open_disk_image, parse_source
from stowray.pipeline.errors import (
    ContentError,
    DigestMismatchError,
    InvalidReferenceError,
    ManifestError,
    NotFoundError,
    SizeMismatchError,
    StorageError,
    StowrayError,
)
from stowray.pipeline.image import (
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    check_diff_ids,
    check_image,
    parse_config,
    parse_document,
)
from stowray.pipeline.reference import Reference

if TYPE_CHECKING:
    from collections.abc import Mapping

NAME = "org.opencontainers.image.ref.name"
MARKER = b'{"imageLayoutVersion":"1.0.0"}'
Json = dict[str, Any]


def digest_of(data: bytes) -> str:
    return f"sha256:{hashlib.sha256(data).hexdigest()}"


def encode(value: Any) -> bytes:
    return json.dumps(value).encode()


def tar(*members: tuple[str, bytes | str], form: int = tarfile.PAX_FORMAT) -> bytes:
    """Return a tar; a member with text instead of bytes is a symbolic link."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=form) as archive:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                archive.addfile(info)
            else:
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


LAYERS = [tar((f"file{number}", b"hello %d" % number)) for number in range(2)]
CONFIG = encode(
    {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [digest_of(layer) for layer in LAYERS]},
    }
)


class Layout:
    """An OCI layout as a set of named files."""

    def __init__(self) -> None:
        self.files: dict[str, bytes] = {"oci-layout": MARKER}
        self.entries: list[Json] = []

    def blob(self, data: bytes, media_type: str, **more: Any) -> Json:
        digest = digest_of(data)
        self.files[f"blobs/{digest.replace(':', '/')}"] = data
        return {"mediaType": media_type, "digest": digest, "size": len(data), **more}

    def image(self, name: str | None = "v1", *, marker: str = "", **more: Any) -> Json:
        layers = [self.blob(gzip.compress(layer, mtime=0), OCI_LAYER_GZIP) for layer in LAYERS]
        document = {
            "schemaVersion": 2,
            "mediaType": OCI_MANIFEST,
            "config": self.blob(CONFIG, OCI_CONFIG),
            "layers": layers,
            "annotations": {"marker": marker},
        }
        annotations = {} if name is None else {"annotations": {NAME: name}}
        entry = self.blob(encode(document), OCI_MANIFEST, **annotations, **more)
        self.entries.append(entry)
        return entry

    def all_files(self) -> dict[str, bytes]:
        index = {"schemaVersion": 2, "manifests": self.entries}
        return {"index.json": encode(index), **self.files}

    def write(self, directory: Path) -> Path:
        for name, data in self.all_files().items():
            path = directory / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
        return directory

    def archive(self, path: Path, prefix: str = "") -> Path:
        path.write_bytes(tar(*((prefix + name, data) for name, data in self.all_files().items())))
        return path


def saved(**changes: Any) -> dict[str, bytes | str]:
    """Return the members of a docker-archive as older Docker writes it."""
    entry = {
        "Config": "c.json",
        "RepoTags": ["x:1", "host:5000/y:latest"],
        "Layers": ["a/layer.tar", "b/layer.tar"],
        **changes,
    }
    return {
        "a/layer.tar": LAYERS[0],
        "b/layer.tar": LAYERS[1],
        "c.json": CONFIG,
        "manifest.json": encode([entry]),
    }


def archive(path: Path, members: Mapping[str, bytes | str]) -> Path:
    path.write_bytes(tar(*members.items()))
    return path


def read_all(text: str) -> tuple[Descriptor, list[bytes]]:
    """Read a whole image through the origin as a pull does; return what it resolved to."""
    source = parse_source(text)
    assert isinstance(source, DiskImage)
    origin = open_disk_image(source)
    resolved = origin.resolve(source)
    found = resolved.descriptor
    body = origin.manifest(source, found.digest, found.size)
    assert resolved.body in (None, body)
    document = parse_document(body, found.media_type, found.digest)
    assert isinstance(document, Manifest)
    config = parse_config(
        origin.manifest(source, document.config.digest, document.config.size), found.digest
    )
    check_image(document, found.digest)
    check_diff_ids(document, config, found.digest)
    layers = []
    for layer in document.layers:
        with origin.open_blob(source, layer) as stream:
            assert stream.offset == 0
            content = b"".join(iter(lambda: stream.read(1000), b""))
        assert layer.digest.matches(content)
        assert layer.size == len(content)
        layers.append(content)
    return found, layers


def resolve(text: str) -> Descriptor:
    source = parse_source(text)
    assert isinstance(source, DiskImage)
    return open_disk_image(source).resolve(source).descriptor


class TestParseSource:
    @pytest.mark.parametrize(
        "text, kind, path, image",
        [
            ("oci:/a/b", "oci", "/a/b", ""),
            ("oci:/a/b:v1", "oci", "/a/b", "v1"),
            ("oci:/a/b:docker.io/x:1", "oci", "/a/b", "docker.io/x:1"),
            ("oci-archive:/a//b/../c.tar:v1", "oci-archive", "/a/c.tar", "v1"),
            ("docker-archive:/d.tar:x:1", "docker-archive", "/d.tar", "x:1"),
            ("docker-archive:/d.tar:@0", "docker-archive", "/d.tar", "@0"),
            ("oci:/a:", "oci", "/a", ""),
        ],
    )
    def test_on_disk(self, text: str, kind: str, path: str, image: str) -> None:
        source = parse_source(text)
        assert source == DiskImage(kind, path, image)
        assert parse_source(source.canonical) == source
        assert DiskImage.from_dict(source.to_dict()) == source

    def test_relative(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert parse_source("oci:x:1").canonical == f"oci:{tmp_path}/x:1"
        assert parse_source("oci:latest") == DiskImage("oci", f"{tmp_path}/latest")

    def test_words_for_reports(self) -> None:
        source = parse_source("oci:/a:b")
        assert (source.familiar, source.registry, str(source)) == ("oci:/a:b", "oci", "oci:/a:b")

    def test_in_a_registry(self) -> None:
        for text in ["debian", "library/oci:latest", "oci", "ocidir:x", "host:5000/oci"]:
            assert parse_source(text) == Reference.parse(text)

    @pytest.mark.parametrize(
        "text", ["oci:", "oci::x", "docker-archive:", "oci:/a\0b", "oci:/a:\0"]
    )
    def test_invalid(self, text: str) -> None:
        with pytest.raises(InvalidReferenceError):
            parse_source(text)

    def test_a_colon_in_the_working_directory(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        (tmp_path / "a:b").mkdir()
        monkeypatch.chdir(tmp_path / "a:b")
        with pytest.raises(InvalidReferenceError, match="':'"):
            parse_source("oci:x")


@pytest.fixture(params=["oci", "oci-archive", "oci-archive gzip", "oci-archive with ./"])
def write(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Return a function that writes a layout in one of its forms and returns the source's text."""
    kind, _, form = request.param.partition(" ")

    def write_layout(layout: Layout) -> str:
        if kind == "oci":
            return f"oci:{layout.write(tmp_path / 'layout')}"
        path = layout.archive(tmp_path / "layout.tar", "./" if form == "with ./" else "")
        if form == "gzip":
            path.write_bytes(gzip.compress(path.read_bytes()))
        return f"{kind}:{path}"

    return write_layout


class TestLayout:
    def test_the_only_image(self, write: Any) -> None:
        layout = Layout()
        entry = layout.image()
        text = write(layout)
        for name in ["", ":v1"]:
            found, layers = read_all(text + name)
            assert found.digest == entry["digest"]
            assert [gzip.decompress(layer) for layer in layers] == LAYERS

    def test_by_name(self, write: Any) -> None:
        layout = Layout()
        entries = {name: layout.image(name, marker=name) for name in ["a", "b:1", "host/c:2"]}
        text = write(layout)
        for name, entry in entries.items():
            assert resolve(f"{text}:{name}").digest == entry["digest"]
        with pytest.raises(NotFoundError, match="which holds a, b:1, host/c:2"):
            resolve(f"{text}:d")
        with pytest.raises(NotFoundError, match="append :NAME"):
            resolve(text)

    def test_by_the_name_that_containerd_writes(self, write: Any) -> None:
        layout = Layout()
        entry = layout.image(None, marker="x")
        entry["annotations"] = {NAME: "1", "io.containerd.image.name": "docker.io/library/x:1"}
        layout.image("other")
        assert resolve(f"{write(layout)}:docker.io/library/x:1").digest == entry["digest"]

    def test_one_image_under_two_names(self, write: Any) -> None:
        layout = Layout()
        assert layout.image("a")["digest"] == layout.image("b")["digest"]
        resolve(write(layout))

    def test_platforms_of_one_name_are_an_index(self, write: Any) -> None:
        layout = Layout()
        platforms = [
            {"os": "linux", "architecture": "amd64"},
            {"os": "linux", "architecture": "arm", "variant": "v7", "os.features": ["f"]},
        ]
        entries = [layout.image("v1", marker=str(p), platform=p) for p in platforms]
        layout.image("other")
        source = parse_source(write(layout) + ":v1")
        assert isinstance(source, DiskImage)
        origin = open_disk_image(source)
        resolved = origin.resolve(source)
        assert resolved.descriptor.media_type == OCI_INDEX
        # Another process, which has only the descriptor, gets the same bytes.
        body = open_disk_image(source).manifest(source, resolved.descriptor.digest)
        assert body == resolved.body
        document = parse_document(body, OCI_INDEX, resolved.descriptor.digest)
        assert isinstance(document, Index)
        assert [entry.digest for entry in document.manifests] == [e["digest"] for e in entries]
        assert [str(entry.platform) for entry in document.manifests] == [
            "linux/amd64",
            "linux(+f)/arm/v7",
        ]

    def test_two_images_of_one_name_and_platform(self, write: Any) -> None:
        layout = Layout()
        for marker in "ab":
            layout.image("v1", marker=marker, platform={"os": "linux", "architecture": "amd64"})
        with pytest.raises(NotFoundError, match="one image named v1"):
            resolve(f"{write(layout)}:v1")

    def test_offsets(self, write: Any) -> None:
        layout = Layout()
        entry = layout.blob(b"0123456789", OCI_LAYER)
        layout.image()
        source = parse_source(write(layout))
        assert isinstance(source, DiskImage)
        origin = open_disk_image(source)
        blob = Descriptor(OCI_LAYER, Digest(entry["digest"]), 10)
        for offset, expected in [(0, b"0123456789"), (7, b"789"), (10, b""), (99, b"")]:
            with origin.open_blob(source, blob, offset) as stream:
                assert stream.offset == min(offset, 10)
                assert source.path in stream.source
                assert b"".join(iter(lambda: stream.read(2), b"")) == expected
                stream.close()

    def test_absent_blob(self, write: Any) -> None:
        layout = Layout()
        layout.image()
        source = parse_source(write(layout))
        assert isinstance(source, DiskImage)
        origin = open_disk_image(source)
        absent = Digest.of(b"absent")
        with pytest.raises(NotFoundError):
            origin.open_blob(source, Descriptor(OCI_LAYER, absent, 1))
        with pytest.raises(NotFoundError):
            origin.manifest(source, absent)

    def test_wrong_bytes(self, write: Any) -> None:
        layout = Layout()
        entry = layout.image()
        layout.files[f"blobs/{entry['digest'].replace(':', '/')}"] += b" "
        source = parse_source(write(layout))
        assert isinstance(source, DiskImage)
        origin = open_disk_image(source)
        with pytest.raises(DigestMismatchError):
            origin.manifest(source, Digest(entry["digest"]))
        with pytest.raises(SizeMismatchError):
            origin.manifest(source, Digest(entry["digest"]), entry["size"])

    @pytest.mark.parametrize(
        "name, body",
        [
            pytest.param("oci-layout", None, id="no marker"),
            pytest.param("oci-layout", b"{", id="broken marker"),
            pytest.param("oci-layout", b'{"imageLayoutVersion":"2.0.0"}', id="version 2"),
            pytest.param("oci-layout", b"{}", id="no version"),
            pytest.param("oci-layout", b" " * 70_000, id="endless marker"),
            pytest.param("index.json", None, id="no index"),
            pytest.param("index.json", b"[]", id="index an array"),
            pytest.param("index.json", b'{"schemaVersion":2,"layers":[]}', id="index a manifest"),
            pytest.param("index.json", b'{"manifests":[{}]}', id="entry without fields"),
        ],
    )
    def test_broken(self, write: Any, name: str, body: bytes | None) -> None:
        layout = Layout()
        layout.image()
        files = layout.all_files()
        if body is None:
            del files[name]
        else:
            files[name] = body
        layout.all_files = lambda: files  # type: ignore[method-assign]
        with pytest.raises(ManifestError):
            resolve(write(layout))

    def test_nothing_in_it(self, write: Any) -> None:
        with pytest.raises(NotFoundError):
            resolve(write(Layout()))

    def test_more_than_a_thousand_images(self, write: Any) -> None:
        layout = Layout()
        entry = layout.image("last")
        others = [
            {**entry, "annotations": {NAME: f"n{n}"}, "digest": digest_of(b"%d" % n)}
            for n in range(1500)
        ]
        layout.entries = [*others, entry]
        assert resolve(f"{write(layout)}:last").digest == entry["digest"]


@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
class TestPaths:
    def test_nothing_there(self, kind: str, tmp_path: Path) -> None:
        with pytest.raises(NotFoundError):
            resolve(f"{kind}:{tmp_path}/absent")

    def test_a_fifo(self, kind: str, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "fifo")
        with pytest.raises(StorageError):
            resolve(f"{kind}:{tmp_path}/fifo")

    def test_the_wrong_kind(self, kind: str, tmp_path: Path) -> None:
        path = tmp_path / "wrong"
        if kind == "oci":
            path.write_bytes(b"x")
        else:
            path.mkdir()
        with pytest.raises(StorageError):
            resolve(f"{kind}:{path}")


def test_a_fifo_in_a_layout(tmp_path: Path) -> None:
    layout = Layout()
    layout.image()
    directory = layout.write(tmp_path)
    (directory / "index.json").unlink()
    os.mkfifo(directory / "index.json")
    with pytest.raises(StorageError, match="regular"):
        resolve(f"oci:{directory}")


def test_a_layout_of_links(tmp_path: Path) -> None:
    layout = Layout()
    entry = layout.image()
    real = layout.write(tmp_path / "real")
    (tmp_path / "blobs").symlink_to(real / "blobs")
    for name in ["oci-layout", "index.json"]:
        (tmp_path / name).symlink_to(real / name)
    assert read_all(f"oci:{tmp_path}")[0].digest == entry["digest"]


def test_a_replaced_archive_is_read_anew(tmp_path: Path) -> None:
    first, second = Layout(), Layout()
    entries = [first.image(marker="1"), second.image(marker="2")]
    path = first.archive(tmp_path / "a.tar")
    source = parse_source(f"oci-archive:{path}")
    assert isinstance(source, DiskImage)
    origin = open_disk_image(source)
    assert origin.resolve(source).descriptor.digest == entries[0]["digest"]
    blob = Descriptor(OCI_CONFIG, Digest.of(CONFIG), len(CONFIG))
    with origin.open_blob(source, blob) as stream:
        second.archive(tmp_path / "b.tar").replace(path)
        assert origin.resolve(source).descriptor.digest == entries[1]["digest"]
        assert stream.read(1 << 20) == CONFIG


class TestDockerArchive:
    def test_the_only_image(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "d.tar", saved())
        texts = ["", ":x:1", ":docker.io/library/x:1", ":host:5000/y", ":@0"]
        found = [read_all(f"docker-archive:{path}{text}") for text in texts]
        assert len({str(entry.digest) for entry, _ in found}) == 1
        assert found[0][1] == LAYERS

    def test_the_same_image_in_another_shape(self, tmp_path: Path) -> None:
        """Digests depend on config and layers alone, not on names, order or links of members."""
        names = [f"blobs/{digest_of(layer).replace(':', '/')}" for layer in LAYERS]
        config = f"blobs/{digest_of(CONFIG).replace(':', '/')}"
        entry = {"Config": config, "RepoTags": None, "Layers": names}
        newer = {
            "manifest.json": encode([entry]),
            "oci-layout": MARKER,
            config: CONFIG,
            **dict(zip(names, LAYERS, strict=True)),
        }
        linked = {**saved(), "a/layer.tar": "../l.tar", "b/layer.tar": "x/../../m.tar"}
        linked |= {"l.tar": LAYERS[0], "m.tar": LAYERS[1]}
        paths = [
            archive(tmp_path / "older.tar", saved()),
            archive(tmp_path / "newer.tar", newer),
            archive(tmp_path / "linked.tar", linked),
        ]
        compressed = tmp_path / "older.tar.gz"
        compressed.write_bytes(gzip.compress(paths[0].read_bytes()))
        assert len({read_all(f"docker-archive:{p}")[0].digest for p in [*paths, compressed]}) == 1

    def test_compressed_layers(self, tmp_path: Path) -> None:
        members = saved()
        members["b/layer.tar"] = gzip.compress(LAYERS[1])
        named = gzip.compress(LAYERS[0], mtime=5)
        name = f"blobs/{digest_of(named).replace(':', '/')}"
        members |= saved(Layers=[name, "b/layer.tar"])
        members |= {name: named, "b/layer.tar": gzip.compress(LAYERS[1])}
        path = archive(tmp_path / "d.tar", members)
        _, layers = read_all(f"docker-archive:{path}")
        assert [gzip.decompress(layer) for layer in layers] == LAYERS

    def test_several_images(self, tmp_path: Path) -> None:
        entries = [
            {"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["a/layer.tar", "b/layer.tar"]},
            {"Config": "e.json", "RepoTags": ["y:1"], "Layers": []},
        ]
        empty = encode({"rootfs": {"type": "layers", "diff_ids": []}})
        members = {**saved(), "manifest.json": encode(entries), "e.json": empty}
        path = archive(tmp_path / "d.tar", members)
        assert read_all(f"docker-archive:{path}:y:1")[1] == []
        assert read_all(f"docker-archive:{path}:@0")[1] == LAYERS
        for text, reason in [
            ("", "append :NAME"),
            (":z", "x:1, y:1"),
            (":@2", "@2"),
            (":@x", "@x"),
        ]:
            with pytest.raises(NotFoundError, match=reason):
                resolve(f"docker-archive:{path}{text}")

    @pytest.mark.parametrize(
        "changes",
        [
            pytest.param({"manifest.json": b"{}"}, id="list an object"),
            pytest.param({"manifest.json": b"[[]]"}, id="image an array"),
            pytest.param({"manifest.json": b"[{}]"}, id="no config named"),
            pytest.param({"manifest.json": b"["}, id="no JSON"),
            pytest.param(saved(Layers=["a/layer.tar"]), id="fewer layers than diff IDs"),
            pytest.param(saved(Layers=["a/layer.tar", "z"]), id="layer missing"),
            pytest.param(saved(Layers=["a/layer.tar", "../../etc/passwd"]), id="layer outside"),
            pytest.param(saved(Layers=["a/layer.tar", "/etc/passwd"]), id="layer absolute"),
            pytest.param(saved(Layers="a/layer.tar"), id="layers a string"),
            pytest.param(saved(Config="z.json"), id="config missing"),
            pytest.param(saved(layers=[]), id="layers in another case"),
            pytest.param({"c.json": b"{}"}, id="config without rootfs"),
            pytest.param({"b/layer.tar": "../b/layer.tar"}, id="link to itself"),
            pytest.param({"b/layer.tar": "../../../etc/passwd"}, id="link outside"),
            pytest.param({"b/layer.tar": "/etc/passwd"}, id="absolute link"),
            pytest.param({"b/layer.tar": "../absent"}, id="link to nothing"),
            pytest.param({"../x": b""}, id="member outside"),
            pytest.param({"/x": b""}, id="absolute member"),
            pytest.param({"./a/layer.tar": b""}, id="two layers of one name"),
        ],
    )
    def test_broken(self, tmp_path: Path, changes: dict[str, bytes | str]) -> None:
        path = archive(tmp_path / "d.tar", {**saved(), **changes})
        with pytest.raises(ManifestError) as caught:
            read_all(f"docker-archive:{path}")
        assert len(str(caught.value)) < 500

    def test_documents_by_digest(self, tmp_path: Path) -> None:
        source = parse_source(f"docker-archive:{archive(tmp_path / 'd.tar', saved())}")
        assert isinstance(source, DiskImage)
        origin = open_disk_image(source)
        with pytest.raises(NotFoundError):
            origin.manifest(source, Digest.of(b"absent"))
        with pytest.raises(NotFoundError):
            origin.open_blob(source, Descriptor(OCI_LAYER, Digest.of(b"absent"), 1))
        found = origin.resolve(source).descriptor
        with pytest.raises(SizeMismatchError):
            origin.manifest(source, found.digest, found.size + 1)

    def test_a_tag_that_docker_would_refuse_is_matched_as_it_is(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "d.tar", saved(RepoTags=["No Reference"]))
        read_all(f"docker-archive:{path}:No Reference")

    def test_archives_older_than_manifests(self, tmp_path: Path) -> None:
        path = archive(tmp_path / "d.tar", {"repositories": b"{}"})
        with pytest.raises(ManifestError, match=r"manifest\.json"):
            resolve(f"docker-archive:{path}")


class TestArchives:
    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
    def test_long_names(self, tmp_path: Path, form: int) -> None:
        name = "d" * 120 + "/" + "ü" * 100 + "/layer.tar"
        members = {**saved(Layers=["a/layer.tar", name]), name: LAYERS[1]}
        path = tmp_path / "d.tar"
        path.write_bytes(tar(*members.items(), form=form))
        assert read_all(f"docker-archive:{path}")[1] == LAYERS

    @pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
    @pytest.mark.parametrize("form", ["v7", "ustar", "gnu", "posix"])
    def test_every_format_of_tar(self, tmp_path: Path, form: str, kind: str) -> None:
        layout = Layout()
        layout.image()
        files = layout.all_files() if kind == "oci-archive" else saved()
        for name, content in files.items():
            (tmp_path / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "files" / name).write_bytes(content)  # type: ignore[arg-type]
        path = tmp_path / "x.tar"
        command = ["tar", f"--format={form}", "-C", str(tmp_path / "files"), "-cf", str(path), "."]
        subprocess.run(command, check=True, timeout=60)
        assert len(read_all(f"{kind}:{path}")[1]) == len(LAYERS)

    @pytest.mark.parametrize("flag", [b"0", b"\0", b"7"])
    def test_type_flags_of_regular_files(self, tmp_path: Path, flag: bytes) -> None:
        path = tmp_path / "d.tar"
        members = [
            self.header(name, flag, content)  # type: ignore[arg-type]
            for name, content in saved().items()
        ]
        path.write_bytes(b"".join(members) + bytes(1024))
        assert read_all(f"docker-archive:{path}")[1] == LAYERS

    @pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
    def test_hard_links(self, tmp_path: Path, form: int) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=form) as writer:
            for name, content in saved().items():
                if name != "b/layer.tar":
                    info = tarfile.TarInfo(name)
                    info.size = len(content)
                    writer.addfile(info, io.BytesIO(content))  # type: ignore[arg-type]
            info = tarfile.TarInfo("l.tar")
            info.size = len(LAYERS[1])
            writer.addfile(info, io.BytesIO(LAYERS[1]))
            info = tarfile.TarInfo("b/layer.tar")
            info.type, info.linkname = tarfile.LNKTYPE, "l.tar"
            writer.addfile(info)
        path = tmp_path / "d.tar"
        path.write_bytes(stream.getvalue())
        assert read_all(f"docker-archive:{path}")[1] == LAYERS

    def test_every_truncation_is_an_error(self, tmp_path: Path) -> None:
        whole = tar(*saved().items())
        end = whole.rstrip(b"\0")
        path = tmp_path / "d.tar"
        for size in range(0, len(end), 211):
            path.write_bytes(whole[:size])
            with pytest.raises((ContentError, NotFoundError)):
                read_all(f"docker-archive:{path}")

    def test_any_flipped_byte_of_a_header_is_an_error(self, tmp_path: Path) -> None:
        whole = bytearray(tar(*saved().items()))
        path = tmp_path / "d.tar"
        for position in range(0, 512, 7):
            whole[position] ^= 0x01
            path.write_bytes(whole)
            with pytest.raises(ManifestError):
                read_all(f"docker-archive:{path}")
            whole[position] ^= 0x01

    @pytest.mark.parametrize(
        "records",
        [
            pytest.param({"size": "99999999999"}, id="size beyond the file"),
            pytest.param({"size": "-1"}, id="negative size"),
            pytest.param({"size": "1e3"}, id="size no number"),
            pytest.param({"path": "../x"}, id="path outside"),
            pytest.param({"path": "a\0b"}, id="NUL in a path"),
            pytest.param({"GNU.sparse.major": "1"}, id="sparse"),
        ],
    )
    def test_hostile_records(self, tmp_path: Path, records: dict[str, str]) -> None:
        stream = io.BytesIO()
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as writer:
            info = tarfile.TarInfo("x")
            info.pax_headers = records
            writer.addfile(info)
        path = tmp_path / "d.tar"
        path.write_bytes(stream.getvalue())
        with pytest.raises(ManifestError):
            resolve(f"docker-archive:{path}")

    def header(self, name: str, kind: bytes, payload: bytes = b"", link: str = "") -> bytes:
        info = tarfile.TarInfo(name)
        info.type, info.size, info.linkname = kind, len(payload), link
        return info.tobuf(tarfile.USTAR_FORMAT) + payload + bytes(-len(payload) % 512)

    @pytest.mark.parametrize(
        "kinds",
        [
            pytest.param(((b"0", ""), (b"2", "y")), id="file, link"),
            pytest.param(((b"2", "y"), (b"0", "")), id="link, file"),
            pytest.param(((b"2", "y"), (b"2", "z")), id="two links"),
        ],
    )
    def test_names_with_two_meanings(
        self, tmp_path: Path, kinds: tuple[tuple[bytes, str], ...]
    ) -> None:
        path = tmp_path / "d.tar"
        members = b"".join(self.header("x", kind, link=link) for kind, link in kinds)
        path.write_bytes(members + tar(*saved().items()))
        with pytest.raises(ManifestError, match="more than one member named x"):
            resolve(f"docker-archive:{path}")

    @pytest.mark.parametrize(
        "before, reason",
        [
            pytest.param(("g", b"13 path=abcd\n"), "global header", id="global path"),
            pytest.param(("x", b"9 path=ab\n"), "PAX record", id="record too long"),
            pytest.param(("x", b"x" * ((1 << 20) + 1)), "more than 1048576", id="endless header"),
        ],
    )
    def test_metadata(self, tmp_path: Path, before: tuple[str, bytes], reason: str) -> None:
        path = tmp_path / "d.tar"
        kind, payload = before
        path.write_bytes(self.header("m", kind.encode(), payload) + tar(*saved().items()))
        with pytest.raises(ManifestError, match=reason):
            resolve(f"docker-archive:{path}")

    def test_what_git_writes_first_is_no_harm(self, tmp_path: Path) -> None:
        path = tmp_path / "d.tar"
        comment = self.header("pax_global_header", b"g", b"13 comment=a\n")
        device = self.header("null", b"3")
        path.write_bytes(comment + device + tar(*saved().items()))
        assert read_all(f"docker-archive:{path}")[1] == LAYERS

    def test_metadata_for_nothing(self, tmp_path: Path) -> None:
        path = tmp_path / "d.tar"
        path.write_bytes(self.header("m", b"x", b"9 path=a\n"))
        with pytest.raises(ManifestError, match="ends after a header"):
            resolve(f"docker-archive:{path}")

    def test_damaged_compression(self, tmp_path: Path) -> None:
        path = tmp_path / "d.tar.gz"
        path.write_bytes(gzip.compress(tar(*saved().items()))[:-20])
        with pytest.raises(ManifestError):
            resolve(f"docker-archive:{path}")

    def test_nowhere_to_unpack(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("TMPDIR", f"{tmp_path}/absent")
        path = tmp_path / "d.tar.gz"
        path.write_bytes(gzip.compress(tar(*saved().items())))
        with pytest.raises(StorageError, match="TMPDIR"):
            resolve(f"docker-archive:{path}")

    @pytest.mark.parametrize("kind", ["oci-archive", "docker-archive"])
    @pytest.mark.parametrize("content", [b"", b"x" * 2000, b"\0" * 10240, b"\x1f\x8b"])
    def test_no_archive(self, tmp_path: Path, kind: str, content: bytes) -> None:
        path = tmp_path / "x"
        path.write_bytes(content)
        with pytest.raises(ManifestError):
            resolve(f"{kind}:{path}")


def test_no_descriptor_is_left_open(tmp_path: Path) -> None:
    layout = Layout()
    layout.image()
    texts = [
        f"oci:{layout.write(tmp_path / 'layout')}",
        f"oci-archive:{layout.archive(tmp_path / 'a.tar')}",
        f"docker-archive:{archive(tmp_path / 'd.tar', saved())}",
        f"docker-archive:{archive(tmp_path / 'broken.tar', saved(Config='z'))}",
    ]
    before = len(list(Path("/proc/self/fd").iterdir()))
    for text in texts:
        try:
            read_all(text)
        except StowrayError:
            assert "broken" in text
    assert len(list(Path("/proc/self/fd").iterdir())) == before


@pytest.mark.peers("skopeo")
@pytest.mark.parametrize("kind", ["oci", "oci-archive", "docker-archive"])
def test_what_skopeo_writes(kind: str, tmp_path: Path) -> None:
    layout = Layout()
    entry = layout.image("v1")
    start = f"oci:{layout.write(tmp_path / 'layout')}:v1"
    name = "docker.io/library/x:1" if kind == "docker-archive" else "v1"
    text = f"{kind}:{tmp_path}/copy:{name}"
    command = ["skopeo", "--insecure-policy", "copy", "--quiet", start, text]
    subprocess.run(command, check=True, timeout=60)
    found, layers = read_all(text)
    assert found == read_all(f"{kind}:{tmp_path}/copy")[0]
    if kind == "docker-archive":
        assert layers == LAYERS
        assert read_all(f"{kind}:{tmp_path}/copy:x:1")[0] == found
    else:
        assert found.digest == entry["digest"]
