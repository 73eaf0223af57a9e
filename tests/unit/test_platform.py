from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidPlatformError
from stowray.pipeline.image import OCI_CONFIG, OCI_INDEX, OCI_LAYER, OCI_MANIFEST
from stowray.pipeline.platform import Platform, describe, is_image, offered, select, select_os
from tests.support.vectors import label, table

TABLES = table("platforms")
HOST = Platform.host()


def rows(name: str, key: str) -> list[Any]:
    return [
        pytest.param(row, id=f"{number} {label(str(row[key]))}")
        for number, row in enumerate(TABLES[name])
    ]


def entry(text: str | None, number: int = 0, **more: Any) -> Descriptor:
    platform = None if text is None else Platform.parse(text)
    return Descriptor(OCI_MANIFEST, Digest.of(b"%d" % number), 1, platform, **more)


def platform_of(row: dict[str, Any]) -> Platform:
    return Platform(
        row["os"],
        row["architecture"],
        row.get("variant", ""),
        row.get("os.version", ""),
        tuple(row.get("os.features", ())),
    )


@pytest.mark.parametrize("row", rows("parse", "input"))
def test_parse(row: dict[str, Any]) -> None:
    if "error" in row:
        with pytest.raises(InvalidPlatformError):
            Platform.parse(row["input"])
        return
    host = {
        "<defaultOS>": HOST.os,
        "<defaultArch>": HOST.architecture,
        "<defaultVariant>": HOST.variant,
    }
    fields = {
        key: host.get(value, value) if isinstance(value, str) else value
        for key, value in row["expected"].items()
    }
    platform = Platform.parse(row["input"])
    assert platform == platform_of(fields)
    if "host" not in row["formatted"]:
        assert str(platform) == row["formatted"]
    for match in row["matches"]:
        assert platform.accepts(platform_of(match), strict=True)
    assert Platform.parse(str(platform)) == platform
    assert Platform.from_dict(platform.to_dict()) == platform
    assert pickle.loads(pickle.dumps(platform)) == platform


@pytest.mark.parametrize(
    "text", [pytest.param(text, id=label(text)) for text in TABLES["parse_invalid"]]
)
def test_parse_invalid(text: str) -> None:
    with pytest.raises(InvalidPlatformError):
        Platform.parse(text)
    assert set(describe(text)) == {"input", "error"}


@pytest.mark.parametrize("version", ["10;x", "1+2", "a b", "é", "%41", "(1)/2"])
def test_any_version_and_feature_can_be_read_back(version: str) -> None:
    # An image's config may say anything here, and records keep the text.
    platform = Platform("linux", "amd64", os_version=version, os_features=(version,))
    assert Platform.parse(str(platform)) == platform


@pytest.mark.parametrize("row", rows("format", "formatted"))
def test_format(row: dict[str, Any]) -> None:
    assert str(platform_of(row["platform"])) == row["formatted"]
    assert str(Platform.parse(row["formatted"])) == row["formatted"]


@pytest.mark.parametrize("row", rows("normalize", "architecture"))
def test_normalize(row: dict[str, Any]) -> None:
    normalized = platform_of(row).normalized()
    assert [normalized.os, normalized.architecture, normalized.variant] == row["expected"]
    assert normalized.normalized() == normalized


@pytest.mark.parametrize("strict", [False, True], ids=["default", "strict"])
@pytest.mark.parametrize("name", ["only", "only_strict"])
def test_accepts(name: str, strict: bool) -> None:
    if strict != (name == "only_strict"):
        return
    for row in TABLES[name]:
        wanted = Platform.parse(row["want"])
        accepted = {
            text: wanted.accepts(Platform.parse(text), strict=strict)
            for text in row["matches"] + row["not_matches"]
        }
        assert [text for text, yes in accepted.items() if yes] == row["matches"], row["want"]


@pytest.mark.parametrize("row", rows("preferences", "want"))
def test_preferences(row: dict[str, Any]) -> None:
    wanted = Platform.parse(row["want"])
    assert wanted.preferences() == [Platform.parse(text).normalized() for text in row["order"]]
    # An index that lists them worst first is still read best first.
    entries = [entry(text, number) for number, text in enumerate(reversed(row["order"]))]
    assert [str(e.platform) for e in select(entries, wanted)] == row["order"]


@pytest.mark.parametrize("variant", ["v7", "foo", "v9.99", "v10", "v999999999"])
def test_unknown_variants_run_on_themselves(variant: str) -> None:
    wanted = Platform("linux", "arm64", variant)
    assert wanted.preferences() == [wanted.normalized()]
    assert wanted.accepts(wanted)
    assert len(Platform("linux", "amd64", variant).preferences()) < 100


@pytest.mark.parametrize("row", rows("only_os", "want"))
def test_accepts_os(row: dict[str, Any]) -> None:
    wanted = Platform.parse(row["want"])
    assert all(wanted.accepts_os(Platform.parse(text)) for text in row["matches"])
    assert not any(wanted.accepts_os(Platform.parse(text)) for text in row["not_matches"])


@pytest.mark.parametrize("row", rows("only_os_order", "want"))
def test_select_os(row: dict[str, Any]) -> None:
    entries = [entry(text, number) for number, text in enumerate(row["input_order"])]
    wanted = Platform.parse(row["want"])
    chosen = [str(e.platform) for e in select_os(entries, wanted)]
    assert chosen == [text for text in row["expected_order"] if text in chosen]
    assert len(chosen) == sum(wanted.accepts_os(Platform.parse(t)) for t in row["input_order"])


@pytest.mark.parametrize("row", rows("features_order", "want"))
def test_more_of_the_wanted_features_first(row: dict[str, Any]) -> None:
    entries = [entry(text, number) for number, text in enumerate(row["input_order"])]
    chosen = [str(e.platform) for e in select(entries, Platform.parse(row["want"]))]
    assert chosen == row["expected_order"][: len(chosen)]
    assert chosen


@pytest.mark.parametrize("row", rows("windows_match", "match"))
def test_windows_match(row: dict[str, Any]) -> None:
    assert platform_of(row["host"]).accepts(platform_of(row["image"])) is row["match"]


@pytest.mark.parametrize("row", rows("windows_builds", "host"))
def test_windows_builds(row: dict[str, Any]) -> None:
    host = Platform("windows", "amd64", os_version=f"10.0.{row['host']}")
    image = Platform("windows", "amd64", os_version=f"10.0.{row['image']}.1234")
    assert host.accepts(image) is row["runs"]


def test_windows_version_that_is_none() -> None:
    host = Platform("windows", "amd64", os_version="10.0.20348")
    assert not host.accepts(Platform("windows", "amd64", os_version="vista"))


def test_windows_order() -> None:
    row = TABLES["windows_order"]
    entries = [
        Descriptor(
            OCI_MANIFEST, Digest.of(b"%d" % number), 1, Platform("windows", "amd64", "", version)
        )
        for number, version in enumerate(row["input"])
    ]
    wanted = Platform.parse(row["want"])
    chosen = [e.platform.os_version for e in select(entries, wanted) if e.platform]
    assert chosen == row["expected"][:3]


@pytest.mark.parametrize(
    "machine, architecture, variant",
    [pytest.param(*row, id=row[0]) for row in TABLES["machines"]],
)
def test_host(machine: str, architecture: str, variant: str) -> None:
    host = Platform.host(machine, "Linux")
    assert host == Platform("linux", architecture, variant)


class TestSelect:
    def test_first_of_equals(self) -> None:
        entries = [entry("linux/amd64", number) for number in range(3)]
        assert select(entries, Platform.parse("linux/amd64")) == entries

    def test_missing_variant_is_v8(self) -> None:
        for wanted, offer in [("linux/arm64/v8", "linux/arm64"), ("linux/arm64", "linux/arm64/v8")]:
            assert select([entry(offer)], Platform.parse(wanted)) == [entry(offer)]

    def test_newer_level_never_runs_on_an_older_host(self) -> None:
        entries = [entry("linux/amd64/v3", 1), entry("linux/amd64", 2)]
        assert select(entries, Platform.parse("linux/amd64")) == entries[1:]
        assert select(entries, Platform.parse("linux/amd64/v3")) == entries

    def test_386_on_amd64_unless_strict(self) -> None:
        entries = [entry("linux/386")]
        assert select(entries, Platform.parse("linux/amd64")) == entries
        assert select(entries, Platform.parse("linux/amd64"), strict=True) == []

    @pytest.mark.parametrize("first", [True, False], ids=["first", "last"])
    @pytest.mark.parametrize(
        "other",
        [
            pytest.param({"platform": Platform("unknown", "unknown")}, id="unknown platform"),
            pytest.param(
                {
                    "platform": Platform("linux", "amd64"),
                    "annotations": (
                        ("x", "y"),
                        ("vnd.docker.reference.type", "attestation-manifest"),
                    ),
                },
                id="attestation annotation",
            ),
            pytest.param(
                {"platform": Platform("linux", "amd64"), "artifact_type": "application/x"},
                id="artifact",
            ),
            pytest.param({"media_type": OCI_LAYER}, id="no manifest"),
        ],
    )
    def test_what_is_no_image_is_never_selected(self, other: dict[str, Any], first: bool) -> None:
        fields = {"media_type": OCI_MANIFEST, "digest": Digest.of(b"other"), "size": 1, **other}
        alien, image = Descriptor(**fields), entry("linux/amd64")
        entries = [alien, image] if first else [image, alien]
        assert select(entries, Platform.parse("linux/amd64")) == [image]
        assert offered(entries) == "linux/amd64"
        assert not is_image(alien)

    def test_artifact_type_of_an_image_config(self) -> None:
        image = entry("linux/amd64", artifact_type=OCI_CONFIG)
        assert select([image], Platform.parse("linux/amd64")) == [image]

    def test_entries_without_platform_come_last(self) -> None:
        entries = [entry(None, 1), entry("linux/386", 2), entry("linux/arm64", 3)]
        assert select(entries, Platform.parse("linux/amd64")) == [entries[1], entries[0]]

    def test_nested_index(self) -> None:
        nested = Descriptor(OCI_INDEX, Digest.of(b"n"), 1, Platform("linux", "arm64"))
        assert select([nested, entry("linux/amd64")], Platform.parse("linux/arm64")) == [nested]

    def test_nothing_fits(self) -> None:
        entries = [entry("linux/s390x", 1), entry("linux/arm/v6", 2), entry("linux/s390x", 3)]
        assert select(entries, Platform.parse("linux/amd64")) == []
        assert offered(entries) == "linux/s390x, linux/arm/v6"


def test_without_a_name() -> None:
    assert str(Platform("", "")) == "unknown"


def test_documents_write_only_what_is_set() -> None:
    assert Platform("linux", "").to_document() == {"os": "linux", "architecture": ""}
    assert Platform("a", "b", "c", "d", ("e",)).to_document() == {
        "os": "a",
        "architecture": "b",
        "variant": "c",
        "os.version": "d",
        "os.features": ["e"],
    }


def test_describe() -> None:
    assert describe("windows(1+a)/amd64")["os_features"] == ["a"]
    assert describe("linux/ARM64/v8") == {
        "input": "linux/ARM64/v8",
        "os": "linux",
        "architecture": "arm64",
        "variant": "v8",
        "os_version": "",
        "formatted": "linux/arm64/v8",
    }


@pytest.mark.parametrize(
    "text", ["linux(" + "+" * 65536 + ")", "linux(" + "+a" * 32768 + ")", "a" * 65536, "/" * 65536]
)
def test_long_texts_end(text: str) -> None:
    with pytest.raises(InvalidPlatformError) as caught:
        Platform.parse(text)
    assert len(str(caught.value)) < 300


@given(st.builds(Platform, st.just("linux"), st.just("amd64"), st.just(""), st.text(max_size=8)))
def test_any_version_is_written_on_one_line(platform: Platform) -> None:
    assert str(platform).isprintable()


@given(st.text(alphabet="linuxarm64v8/()+%2B._- *\n", max_size=24))
def test_any_text_is_a_platform_or_a_typed_error(text: str) -> None:
    try:
        platform = Platform.parse(text)
    except InvalidPlatformError:
        return
    assert Platform.parse(str(platform)).normalized() == platform.normalized()
