from __future__ import annotations

import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidReferenceError
from stowray.pipeline.reference import Reference, describe, is_loopback, wire_host
from tests.support.vectors import label, table

TABLES = table("references")
HEX = "ab" * 32


def rows(name: str) -> list[Any]:
    return [pytest.param(row, id=label(row["input"])) for row in TABLES[name]]


@pytest.mark.parametrize("row", rows("valid"))
def test_valid(row: dict[str, str | None]) -> None:
    text = row["input"]
    assert text is not None
    reference = Reference.parse(text)
    seen = {
        "registry": reference.registry,
        "repository": reference.repository,
        "tag": reference.tag,
        "digest": reference.digest,
        "familiar": reference.familiar_name,
        "canonical": reference.canonical,
        "name": reference.name,
    }
    expected = {key: value for key, value in row.items() if key != "input"}
    assert {key: seen[key] for key in expected} == expected


@pytest.mark.parametrize("row", rows("valid"))
def test_every_text_of_a_reference_means_the_same(row: dict[str, Any]) -> None:
    reference = Reference.parse(row["input"])
    again = Reference.parse(reference.canonical)
    assert again.canonical == reference.canonical
    assert Reference.parse(reference.familiar).canonical == reference.canonical
    assert Reference.from_dict(reference.to_dict()) == reference
    assert pickle.loads(pickle.dumps(reference)) == reference


@pytest.mark.parametrize("row", rows("invalid"))
def test_invalid(row: dict[str, str]) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.parse(row["input"])
    assert caught.value.reason
    assert len(str(caught.value)) < 600


@pytest.mark.parametrize("host, valid", [pytest.param(*row, id=row[0]) for row in TABLES["hosts"]])
def test_registry_grammar(host: str, valid: bool) -> None:
    fields = {"registry": host, "repository": "x", "tag": None, "digest": None}
    if valid:
        assert Reference.from_dict(fields).registry == host
    else:
        with pytest.raises(InvalidReferenceError):
            Reference.from_dict(fields)


@pytest.mark.parametrize(
    "text, reason",
    [
        pytest.param("docker/Docker", "lower-case", id="upper case"),
        pytest.param("test:5000/Uppercase/x", "lower-case", id="upper case after a port"),
        pytest.param("a" * 64, "image ID", id="identifier"),
        pytest.param("https://docker.io/x", "scheme", id="scheme"),
        pytest.param("x" * 256, "255", id="too long"),
        pytest.param("x:" + "t" * 129, "128", id="long tag"),
        pytest.param("ubuıntu", "ASCII", id="dotless i"),
        pytest.param("x@md5:" + "a" * 32, "unsupported", id="md5"),
        pytest.param("x@sha256:" + "a" * 63, "64", id="63 digits"),
    ],
)
def test_reason_says_what_to_change(text: str, reason: str) -> None:
    with pytest.raises(InvalidReferenceError, match=reason):
        Reference.parse(text)


@pytest.mark.parametrize(
    "text",
    [
        "user:s3cret@host/x",
        "user:s3cret@host:5000/x",
        "user:s3cret@host:5000/x:tag",
        "https://user:s3cret@host/x",
        "user:s3cret@host/x@sha256:" + HEX,
        f"user:s3cret@x@y/sha256:{HEX}",
        "s3cret@host/x",
        "user:s3cret@registry:latest",
        "user:x@s3cret@host/y",
        "host/x?token=s3cret",
    ],
)
def test_credentials_are_not_repeated(text: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.parse(text)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(caught.value)
    answer = describe(text)
    assert "s3cret" not in (answer["error"] or "")


def test_an_error_still_shows_a_digest() -> None:
    with pytest.raises(InvalidReferenceError, match="repo@sha256:abc"):
        Reference.parse("repo@sha256:abc")


def test_tag_and_digest() -> None:
    reference = Reference.parse(f"repo:tag@sha256:{HEX}")
    assert reference.tag == "tag"
    assert reference.target == f"sha256:{HEX}"
    assert reference.canonical == f"docker.io/library/repo@sha256:{HEX}"
    assert reference.familiar == f"repo@sha256:{HEX}"
    assert Reference.parse("repo").target == "latest"


def test_pinned() -> None:
    reference = Reference.parse("x:1").with_digest(Digest(f"sha256:{HEX}"))
    assert str(reference) == f"docker.io/library/x@sha256:{HEX}"
    assert reference.tag == "1"


def test_the_official_prefix_stays_where_it_would_be_missed() -> None:
    assert Reference.parse("docker.io/library/a/b").familiar_name == "library/a/b"


def test_the_familiar_name_never_names_another_registry() -> None:
    assert Reference.parse("docker.io/a.b/c").familiar_name == "docker.io/a.b/c"
    assert Reference.parse("docker.io/docker.io/ff").familiar_name == "docker.io/docker.io/ff"


def test_spellings_of_one_image() -> None:
    texts = ["ubuntu", "library/ubuntu", "docker.io/ubuntu", "index.docker.io/ubuntu"]
    texts += [f"{text}:latest" for text in texts]
    assert {Reference.parse(text) for text in texts} == {Reference.parse("ubuntu")}


def test_describe() -> None:
    assert describe("ubuntu") == {
        "input": "ubuntu",
        "registry": "docker.io",
        "repository": "library/ubuntu",
        "tag": "latest",
        "digest": None,
        "familiar": "ubuntu",
        "canonical": "docker.io/library/ubuntu:latest",
    }
    assert set(describe("-")) == {"input", "error"}


@pytest.mark.parametrize(
    "registry, loopback", [pytest.param(*row, id=row[0]) for row in TABLES["loopback"]]
)
def test_loopback(registry: str, loopback: bool) -> None:
    assert is_loopback(registry) is loopback


def test_wire_host() -> None:
    assert wire_host("docker.io") == "registry-1.docker.io"
    assert wire_host("localhost:5000") == "localhost:5000"


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("a/" * 60_000, id="slashes"),
        pytest.param("a" * 100_000, id="letters"),
        pytest.param("a" + "-" * 100_000 + "!", id="dashes"),
        pytest.param("a." * 50_000 + "/x", id="dotted host"),
        pytest.param("a-" * 50_000 + ".b/x", id="dashed host"),
        pytest.param("a__" * 30_000 + "!", id="underscores"),
        pytest.param("x:" + "a" * 100_000, id="tag"),
        pytest.param("x@sha256:" + "a" * 100_000, id="digest"),
        pytest.param("@" * 100_000, id="at signs"),
        pytest.param("x@" + "sha256+" * 15_000 + ":", id="algorithms"),
    ],
)
def test_long_texts_end(text: str) -> None:
    with pytest.raises(InvalidReferenceError) as caught:
        Reference.parse(text)
    assert len(str(caught.value)) < 1000


@given(
    st.text(
        alphabet=st.sampled_from("abcXYZ019._-:/@[]%? \n\0é") | st.characters(codec="utf-8"),
        max_size=40,
    )
)
def test_any_text_is_a_reference_or_a_typed_error(text: str) -> None:
    try:
        reference = Reference.parse(text)
    except InvalidReferenceError:
        return
    assert reference.canonical.isascii()
    assert not set(reference.canonical) & set(" \n\0%?#")
    assert Reference.parse(reference.canonical).canonical == reference.canonical
