from __future__ import annotations

import hashlib
import json
import pickle
from typing import Any

import pytest

from stowray.pipeline import image
from stowray.pipeline.descriptor import Descriptor, ImageConfig, Index, Manifest
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import ManifestError, PlatformError
from stowray.pipeline.image import (
    DOCKER_CONFIG,
    DOCKER_INDEX,
    DOCKER_MANIFEST,
    OCI_CONFIG,
    OCI_INDEX,
    OCI_LAYER_GZIP,
    OCI_MANIFEST,
    Image,
    chain_ids,
    manifest_key,
    parse_config,
    parse_document,
)
from stowray.pipeline.platform import Platform
from stowray.pipeline.reference import Reference
from stowray.pipeline.source import DiskImage, Source
from tests.support.vectors import label, table

TABLES = table("descriptors_manifests")
DIGEST = Digest.of(b"document")
EMPTY = Digest.of(b"")
DIFF_ID = Digest.of(b"tar")


def encode(document: Any) -> bytes:
    return json.dumps(document).encode()


def descriptor(**changes: Any) -> dict[str, Any]:
    fields = {"mediaType": OCI_LAYER_GZIP, "digest": EMPTY, "size": 0, **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def manifest(**changes: Any) -> dict[str, Any]:
    fields = {
        "schemaVersion": 2,
        "mediaType": OCI_MANIFEST,
        "config": descriptor(mediaType=OCI_CONFIG),
        "layers": [descriptor()],
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not ...}


def index(*entries: Any, **changes: Any) -> dict[str, Any]:
    fields = {"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": list(entries), **changes}
    return {key: value for key, value in fields.items() if value is not ...}


def config(**changes: Any) -> dict[str, Any]:
    fields = {
        "os": "linux",
        "architecture": "amd64",
        "rootfs": {"type": "layers", "diff_ids": [DIFF_ID]},
        **changes,
    }
    return {key: value for key, value in fields.items() if value is not ...}


def parse(document: Any, media_type: str = "") -> Index | Manifest:
    body = document if isinstance(document, bytes) else encode(document)
    return parse_document(body, media_type, Digest.of(body))


def parse_manifest(document: Any, media_type: str = "") -> Manifest:
    parsed = parse(document, media_type)
    assert isinstance(parsed, Manifest)
    return parsed


def parse_index(document: Any, media_type: str = "") -> Index:
    parsed = parse(document, media_type)
    assert isinstance(parsed, Index)
    return parsed


def rows(name: str) -> list[Any]:
    return [
        pytest.param(row, id=f"{number} {label(row['note'])}")
        for number, row in enumerate(TABLES[name])
    ]


# Valid by practice though not by the schema: every peer pulls such images.
LOOSER = ("urls does not match format", "empty layer", "Env is invalid")


def expected(row: dict[str, Any]) -> bool:
    return bool(row["valid"]) or row["note"].startswith(LOOSER)


@pytest.mark.parametrize("row", rows("descriptor"))
def test_descriptor(row: dict[str, Any]) -> None:
    body = b'{"schemaVersion":2,"manifests":[%s]}' % row["doc"].encode()
    if expected(row):
        parsed = parse_index(body)
        text = json.loads(row["doc"])["digest"]
        digests = [str(entry.digest) for entry in parsed.manifests]
        # A digest that nobody can verify makes an entry that nobody can select.
        assert digests + list(parsed.unsupported) == [text]
    else:
        with pytest.raises(ManifestError, match=r"manifests\[0\]"):
            parse(body)


@pytest.mark.parametrize("row", [*rows("manifest"), *rows("index")])
def test_document(row: dict[str, Any]) -> None:
    body = row["doc"].encode()
    if expected(row):
        parsed = parse(body, json.loads(body)["mediaType"])
        assert parsed.media_type == json.loads(body)["mediaType"]
    else:
        with pytest.raises(ManifestError):
            parse(body)


@pytest.mark.parametrize("row", rows("config"))
def test_config(row: dict[str, Any]) -> None:
    body = row["doc"].encode()
    if expected(row):
        parsed = parse_config(body, DIGEST)
        assert parsed.raw == body
        assert list(parsed.diff_ids) == json.loads(body)["rootfs"]["diff_ids"]
    else:
        with pytest.raises(ManifestError):
            parse_config(body, DIGEST)


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(row, id=f"{row['fetched_as'][16:]} {label(str(row['body']), 40)} {number}")
        for number, row in enumerate(TABLES["served_as"])
    ],
)
def test_content_type_against_body(row: dict[str, Any]) -> None:
    is_index = "manifests" in row["body"] or (
        "mediaType" in row["body"] and image.INDEX_TYPES.issuperset({row["body"]["mediaType"]})
    )
    whole = index() if is_index else manifest()
    whole["mediaType"] = row["body"].get("mediaType", ...)
    body = encode({key: value for key, value in whole.items() if value is not ...})
    if row["valid"]:
        assert isinstance(parse(body, row["fetched_as"]), Index if is_index else Manifest)
    else:
        with pytest.raises(ManifestError):
            parse(body, row["fetched_as"])


@pytest.mark.parametrize(
    "row", TABLES["ambiguous"], ids=lambda row: f"{row['kind']} {row['extra']}"
)
@pytest.mark.parametrize("spell", [str, str.upper, str.title], ids=["same", "upper", "title"])
def test_fields_of_another_kind(row: dict[str, Any], spell: Any) -> None:
    whole = manifest() if row["kind"] == OCI_MANIFEST else index()
    with pytest.raises(ManifestError):
        parse({**whole, spell(row["extra"]): []})


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({**manifest(), **index()}, id="layers and manifests"),
        pytest.param(manifest(Layers=[]), id="Layers"),
        pytest.param({**manifest(layers=...), "LAYERS": []}, id="only LAYERS"),
        pytest.param(manifest(config=descriptor(Digest=EMPTY)), id="Digest in a descriptor"),
        pytest.param(manifest(mediatype=OCI_INDEX), id="mediatype"),
        pytest.param(
            index(descriptor(platform={"OS": "x", "os": "y", "architecture": "z"})), id="OS"
        ),
        pytest.param(manifest(mediaType=OCI_INDEX), id="index by type, manifest by fields"),
        pytest.param(index(mediaType=OCI_MANIFEST), id="manifest by type, index by fields"),
        pytest.param(index(mediaType="application/x"), id="unknown media type"),
        pytest.param(index(mediaType=5), id="media type is a number"),
        pytest.param(manifest(schemaVersion=1), id="version 1 with layers"),
        pytest.param(manifest(schemaVersion=42), id="version 42"),
        pytest.param(manifest(schemaVersion="2"), id="version is a string"),
        pytest.param(manifest(schemaVersion=True), id="version is true"),
        pytest.param({"schemaVersion": 2}, id="nothing in it"),
        pytest.param(manifest(layers=...), id="no layers"),
        pytest.param(manifest(layers=None, config=...), id="layers null and no config"),
        pytest.param(manifest(layers=None, manifests=[]), id="layers null in an index"),
        pytest.param(manifest(layers={}), id="layers an object"),
        pytest.param(manifest(layers=[None]), id="null layer"),
        pytest.param(manifest(layers=["x"]), id="text layer"),
        pytest.param(manifest(config=[]), id="config an array"),
        pytest.param(manifest(config=None), id="config null"),
        pytest.param(manifest(config=...), id="no config"),
        pytest.param(index(manifests=None), id="manifests null"),
        pytest.param(index(manifests=...), id="no manifests"),
        pytest.param(index(manifests={}), id="manifests an object"),
        pytest.param(index(descriptor(size=True)), id="size true"),
        pytest.param(index(descriptor(size=2**63)), id="size 2^63"),
        pytest.param(index(descriptor(size=7682.0)), id="size 7682.0"),
        pytest.param(index(descriptor(digest=5)), id="digest a number"),
        pytest.param(index(descriptor(digest="sha256:../../x")), id="digest a path"),
        pytest.param(index(descriptor(digest=EMPTY.upper())), id="digest upper case"),
        pytest.param(index(descriptor(platform=[])), id="platform an array"),
        pytest.param(index(descriptor(platform={"os": "linux"})), id="no architecture"),
        pytest.param(index(descriptor(platform={"os": False})), id="os false"),
        pytest.param(index(descriptor(platform={"os": 1, "architecture": "x"})), id="os a number"),
        pytest.param(
            index(descriptor(platform={"os": None, "architecture": "amd64"})), id="os null"
        ),
        pytest.param(
            index(descriptor(platform={"os": "a", "architecture": "b", "os.features": "c"})),
            id="features a string",
        ),
        pytest.param(
            index(descriptor(platform={"os": "a", "architecture": "b", "variant": 8})),
            id="variant a number",
        ),
        pytest.param(index(descriptor(annotations=[])), id="annotations an array"),
        pytest.param(index(descriptor(annotations={"a": 1})), id="annotation a number"),
        pytest.param(index(descriptor(urls="x")), id="urls a string"),
        pytest.param(index(descriptor(data="!!")), id="data no base64"),
        pytest.param(index(descriptor(artifactType=[])), id="artifactType an array"),
        pytest.param(index(*[descriptor()] * 1001), id="1001 entries"),
        pytest.param(manifest(layers=[descriptor()] * 1001), id="1001 layers"),
        pytest.param(manifest(config=descriptor(digest="blake3:" + "a" * 64)), id="blake3 config"),
        pytest.param(b"null", id="null"),
        pytest.param(b"[]", id="array"),
        pytest.param(b'"x"', id="string"),
        pytest.param(b"7", id="number"),
        pytest.param(b"", id="nothing"),
        pytest.param(b"<html>", id="HTML"),
        pytest.param(b'{"a":' * 100_000, id="deep"),
        pytest.param(encode(manifest())[:-1] + b',"layers":[]}', id="duplicate layers"),
        pytest.param(encode(manifest()) + b" " * image.MANIFEST_LIMIT, id="longer than 4 MiB"),
    ],
)
def test_refused(document: Any) -> None:
    with pytest.raises(ManifestError) as caught:
        parse(document)
    assert len(str(caught.value)) < 400


def test_exactly_the_limit() -> None:
    body = encode(manifest())
    parse(body + b" " * (image.MANIFEST_LIMIT - len(body)))


@pytest.mark.parametrize(
    "document",
    [
        pytest.param({"schemaVersion": 1, "fsLayers": [], "history": []}, id="plain"),
        pytest.param({"schemaVersion": 1, "signatures": [], "fsLayers": []}, id="signed"),
        pytest.param({"fsLayers": []}, id="without version"),
        pytest.param({"schemaVersion": 1}, id="by version only"),
        pytest.param(
            {"mediaType": "application/vnd.docker.distribution.manifest.v1+json"}, id="type"
        ),
    ],
)
def test_schema_1_is_named(document: Any) -> None:
    with pytest.raises(ManifestError, match="schema 1"):
        parse(document)


def test_schema_1_by_content_type() -> None:
    with pytest.raises(ManifestError, match="schema 1"):
        parse(manifest(), "application/vnd.docker.distribution.manifest.v1+prettyjws")


@pytest.mark.parametrize(
    "header",
    [
        f"{OCI_MANIFEST}; charset=utf-8",
        OCI_MANIFEST.upper(),
        f" {OCI_MANIFEST} ",
        "application/json",
        "text/plain; charset=utf-8",
        "",
        "application/octet-stream",
        DOCKER_MANIFEST,
    ],
)
def test_content_types_let_pass(header: str) -> None:
    assert parse_manifest(manifest(), header).media_type == OCI_MANIFEST


@pytest.mark.parametrize("header", ["text/html", OCI_INDEX, OCI_CONFIG, "x"])
def test_content_types_refused(header: str) -> None:
    with pytest.raises(ManifestError):
        parse(manifest(), header)


@pytest.mark.parametrize(
    "platform",
    [{}, {"os": "", "architecture": ""}, {"os": None}, {"architecture": ""}, {"variant": "v8"}],
)
def test_a_platform_that_names_nothing_is_none(platform: dict[str, Any]) -> None:
    known = descriptor(platform={"os": "linux", "architecture": "amd64"})
    parsed = parse_index(index(descriptor(platform=platform), known))
    assert [str(entry.platform) for entry in parsed.manifests] == ["None", "linux/amd64"]


def test_labels_and_annotations_that_are_null_are_empty() -> None:
    pairs = (("a", ""), ("b", "c"))
    written = {"a": None, "b": "c"}
    assert parse_manifest(manifest(annotations=written)).annotations == pairs
    assert parse_index(index(descriptor(annotations=written))).manifests[0].annotations == pairs
    body = encode(config(config={"Labels": written}))
    assert parse_config(body, DIGEST).raw == body


def test_layers_that_are_null_are_none() -> None:
    # Go writes an empty list that nobody made as null.
    assert parse_manifest(manifest(layers=None)).layers == ()


def test_what_is_unknown_is_ignored() -> None:
    extra = {
        "x": [{"y": None}],
        "z": 1.5e300,
        "n": 10**50,
        "annotations": {"a": "b\n%s $(c)"},
        "artifactType": "application/x",
        "subject": None,
    }
    parsed = parse_manifest(manifest(**extra))
    assert parsed.annotations == (("a", "b\n%s $(c)"),)
    assert parsed.artifact_type == "application/x"
    entry = descriptor(
        mediaType=OCI_MANIFEST, new={"a": 1}, platform={"os": "", "architecture": ""}
    )
    assert parse_index(index(entry, schemaVersion=...)).manifests[0].platform is None


def test_embedded_data_is_used_only_when_it_is_the_blob() -> None:
    good = descriptor(digest=Digest.of(b"{}"), size=2, data="e30=")
    wrong = [descriptor(digest=EMPTY, size=2, data="e30="), descriptor(data="e30="), descriptor()]
    parsed = parse_index(index(good, *wrong, descriptor(data="")))
    assert [entry.data for entry in parsed.manifests] == [b"{}", None, None, None, b""]


@pytest.mark.parametrize(
    "document, media_type",
    [
        pytest.param(manifest(), OCI_MANIFEST, id="own word"),
        pytest.param(manifest(mediaType=...), OCI_MANIFEST, id="OCI manifest"),
        pytest.param(index(mediaType=...), OCI_INDEX, id="index"),
        pytest.param(index(mediaType=DOCKER_INDEX), DOCKER_INDEX, id="docker list"),
        pytest.param(
            manifest(mediaType=..., config=descriptor(mediaType=DOCKER_CONFIG)),
            DOCKER_MANIFEST,
            id="docker manifest",
        ),
        pytest.param(
            {"schemaVersion": 1, "signatures": []},
            "application/vnd.docker.distribution.manifest.v1+prettyjws",
            id="signed schema 1",
        ),
        pytest.param(
            {"schemaVersion": 1},
            "application/vnd.docker.distribution.manifest.v1+json",
            id="schema 1",
        ),
        pytest.param({"schemaVersion": 42, "layers": []}, "", id="version 42"),
        pytest.param({}, "", id="nothing"),
        pytest.param([], "", id="array"),
    ],
)
def test_detect_media_type(document: Any, media_type: str) -> None:
    assert image.detect_media_type(encode(document)) == media_type


def test_detect_media_type_of_no_json() -> None:
    assert image.detect_media_type(b"\x1f\x8b") == ""


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(config(rootfs=...), id="no rootfs"),
        pytest.param(config(rootfs=[]), id="rootfs an array"),
        pytest.param(config(rootfs={"diff_ids": []}), id="no type"),
        pytest.param(config(rootfs={"type": "layers+base", "diff_ids": []}), id="layers+base"),
        pytest.param(config(rootfs={"type": "layers", "diff_ids": {}}), id="diff_ids an object"),
        pytest.param(config(rootfs={"type": "layers", "diff_ids": [1]}), id="diff_id a number"),
        pytest.param(config(rootfs={"type": "layers", "diff_ids": ["x"]}), id="diff_id a word"),
        pytest.param(
            config(rootfs={"type": "layers", "diff_ids": [DIFF_ID.upper()]}), id="diff_id upper"
        ),
        pytest.param(
            config(rootfs={"type": "layers", "diff_ids": ["sha256:../../../etc/passwd"]}), id="path"
        ),
        pytest.param(
            config(rootfs={"type": "layers", "diff_ids": [], "Diff_IDs": [DIFF_ID]}), id="Diff_IDs"
        ),
        pytest.param(config(Rootfs={}), id="Rootfs"),
        pytest.param(config(config=[]), id="config an array"),
        pytest.param(config(config={"Env": "x"}), id="Env a string"),
        pytest.param(config(config={"Env": [1]}), id="Env of numbers"),
        pytest.param(config(config={"Labels": {"a": 1}}), id="label a number"),
        pytest.param(config(history="x"), id="history a string"),
        pytest.param([], id="array"),
        pytest.param(None, id="null"),
    ],
)
def test_config_refused(document: Any) -> None:
    with pytest.raises(ManifestError):
        parse_config(encode(document), DIGEST)


def test_config_longer_than_the_limit() -> None:
    body = encode(config())
    parse_config(body + b" " * (image.CONFIG_LIMIT - len(body)), DIGEST)
    with pytest.raises(ManifestError, match="longer"):
        parse_config(body + b" " * (image.CONFIG_LIMIT - len(body) + 1), DIGEST)


def test_config_is_carried_verbatim() -> None:
    process = {
        "User": "4294967296:../x",
        "Env": ["no equals sign", "A=$(b)\n"],
        "Labels": {"l": "x" * 1_000_000},
        "Entrypoint": None,
    }
    histories: list[dict[str, Any]] = [
        {},
        {"history": None},
        {"history": [{"empty_layer": True}] * 9},
    ]
    for history in histories:
        body = encode(config(config=process, **history, unknown=[1.5]))
        parsed = parse_config(body, DIGEST)
        assert parsed.raw == body
        assert parsed.document()["config"] == process
        assert parsed.diff_ids == (DIFF_ID,)


def parts(layers: int = 1, **changes: Any) -> tuple[Manifest, ImageConfig]:
    diff_ids = [Digest.of(b"layer %d" % number) for number in range(layers)]
    return (
        parse_manifest(manifest(layers=[descriptor() for _ in range(layers)])),
        parse_config(
            encode(config(rootfs={"type": "layers", "diff_ids": diff_ids}, **changes)), DIGEST
        ),
    )


class TestChecks:
    @pytest.mark.parametrize(
        "media_type",
        [
            "application/vnd.oci.image.layer.v1.tar",
            "application/vnd.oci.image.layer.v1.tar+gzip",
            "application/vnd.oci.image.layer.v1.tar+zstd",
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
            "application/vnd.docker.image.rootfs.diff.tar",
            "application/vnd.docker.image.rootfs.diff.tar.gzip",
            "application/vnd.docker.image.rootfs.diff.tar.zstd",
            "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        ],
    )
    def test_layers(self, media_type: str) -> None:
        image.check_image(
            parse_manifest(manifest(layers=[descriptor(mediaType=media_type)])), DIGEST
        )
        assert image.is_layer(media_type)
        wanted = {"gzip": "gzip", "zstd": "zstd"}.get(media_type[-4:], "")
        assert image.layer_compression(media_type) == wanted

    @pytest.mark.parametrize(
        "media_type, reason",
        [
            pytest.param("application/vnd.example.data+type", "unsupported", id="unknown"),
            pytest.param(f"{OCI_LAYER_GZIP}+encrypted", "encrypted", id="encrypted"),
            pytest.param("application/vnd.oci.image.layer.v1.tar+bzip2", "unsupported", id="bzip2"),
        ],
    )
    def test_unknown_layers_are_named(self, media_type: str, reason: str) -> None:
        parsed = parse_manifest(manifest(layers=[descriptor(), descriptor(mediaType=media_type)]))
        with pytest.raises(ManifestError) as caught:
            image.check_layers(parsed)
        assert media_type in str(caught.value)
        assert reason in str(caught.value)
        assert not image.is_layer(media_type)
        assert image.layer_compression(media_type) is None

    def test_an_artifact_is_no_image(self) -> None:
        empty = descriptor(mediaType="application/vnd.oci.empty.v1+json")
        parsed = parse_manifest(manifest(config=empty, artifactType="application/vnd.example"))
        with pytest.raises(ManifestError, match=r"artifact of type application/vnd\.example"):
            image.check_image(parsed, DIGEST)

    @pytest.mark.parametrize("layers, diff_ids", [(1, 2), (2, 1), (0, 1), (1, 0)])
    def test_as_many_diff_ids_as_layers(self, layers: int, diff_ids: int) -> None:
        with pytest.raises(ManifestError, match=f"{layers} layers.*{diff_ids} diff IDs"):
            image.check_diff_ids(parts(layers)[0], parts(diff_ids)[1], DIGEST)

    @pytest.mark.parametrize("count", [0, 1, 500])
    def test_any_number_of_layers(self, count: int) -> None:
        pair = parts(count)
        image.check_diff_ids(*pair, DIGEST)
        image.check_image(pair[0], DIGEST)

    def test_platform_of_the_config(self) -> None:
        linux = parts()[1]
        image.check_platform(linux, Platform.parse("linux/amd64"))
        with pytest.raises(PlatformError, match=r"linux/arm64.*offered: linux/amd64"):
            image.check_platform(linux, Platform.parse("linux/arm64"))
        nameless = parts(os=..., architecture=...)[1]
        image.check_platform(nameless, Platform.parse("linux/amd64"), explicit=False)
        with pytest.raises(PlatformError, match="names no platform"):
            image.check_platform(nameless, Platform.parse("linux/amd64"))


class TestChainIDs:
    @pytest.mark.parametrize("row", table("chainid")["cases"], ids=lambda row: row["name"])
    def test_table(self, row: dict[str, Any]) -> None:
        if "count" in row:
            texts = [f"layer {number}".encode() for number in range(row["count"])]
            chain = chain_ids([Digest.of(text) for text in texts])
            assert chain[0] == row["first_chain_id"]
            assert chain[-1] == row["last_chain_id"]
            assert len(chain) == row["count"]
        else:
            given = tuple(row["digests"])
            assert list(chain_ids(given)) == row["chain_ids"]

    def test_takes_an_iterator(self) -> None:
        assert chain_ids(iter([DIFF_ID])) == (DIFF_ID,)


def test_manifest_key() -> None:
    def key(text: str) -> str:
        return f"sha256:{hashlib.sha256(text.encode()).hexdigest()}"

    start = f'{{"Digest":"{DIGEST}","OS":"linux","Arch":"arm"'
    assert manifest_key(DIGEST, Platform("linux", "arm")) == key(start + "}")
    assert manifest_key(DIGEST, Platform("linux", "arm", "v7")) == key(start + ',"Variant":"v7"}')
    whole = Platform("linux", "arm", "v7", "1.2", ("b", "a"))
    text = start + ',"Variant":"v7","OSVersion":"1.2","OSFeatures":["b","a"]}'
    assert manifest_key(DIGEST, whole) == key(text)


SOURCES = [
    pytest.param(Reference.parse("host/x:1"), id="tag"),
    pytest.param(Reference.parse(f"host/x:1@{DIGEST}"), id="tag and digest"),
    pytest.param(DiskImage("oci", "/srv/layout", "a:b"), id="on disk"),
]


def make_image(reference: Source, layers: int = 3) -> Image:
    body = encode(
        manifest(
            layers=[
                descriptor(
                    digest=Digest.of(b"%d" % (number % 2)),
                    size=10,
                    annotations={"a": "b"},
                    urls=["https://x"],
                )
                for number in range(layers)
            ],
            annotations={"m": "n"},
        )
    )
    found = Descriptor(
        OCI_MANIFEST,
        Digest.of(body),
        len(body),
        platform=Platform("linux", "arm", "v7", "1", ("f",)),
        data=body,
        artifact_type="application/x",
    )
    return Image(
        reference=reference,
        resolved=Descriptor(OCI_INDEX, DIGEST, 5),
        manifest_descriptor=found,
        manifest=parse_manifest(body),
        config=parts(layers, variant="v7")[1],
        platform=Platform("linux", "amd64"),
    )


@pytest.mark.parametrize("reference", SOURCES)
def test_image_travels(reference: Source) -> None:
    whole = make_image(reference)
    whole.check()
    assert pickle.loads(pickle.dumps(whole)) == whole
    assert Image.from_dict(json.loads(json.dumps(whole.to_dict()))) == whole


def test_image() -> None:
    whole = make_image(Reference.parse("x"))
    assert whole.diff_ids == whole.config.diff_ids
    assert whole.chain_ids == chain_ids(whole.diff_ids)
    assert whole.chain_id == whole.chain_ids[-1]
    # The first and the third layer are one blob.
    assert whole.size == whole.manifest_descriptor.size + 20
    assert whole.key() == manifest_key(DIGEST, whole.platform)
    assert make_image(Reference.parse("x"), 0).chain_id == ""
