from __future__ import annotations

import hashlib
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.digest import Digest, is_unsupported
from stowray.pipeline.errors import InvalidDigestError
from tests.support.vectors import label, table

TABLES = table("digests")


@pytest.mark.parametrize("text", [pytest.param(text, id=label(text)) for text in TABLES["valid"]])
def test_valid(text: str) -> None:
    digest = Digest(text)
    assert digest == text
    assert f"{digest.algorithm}:{digest.encoded}" == text
    assert digest.hasher().digest_size * 2 == len(digest.encoded)


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=label(row["input"])) for row in TABLES["invalid"]]
)
def test_invalid(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidDigestError) as caught:
        Digest(row["input"])
    assert len(str(caught.value)) < 1000
    # The distinction decides whether a document is broken or only ahead of us.
    assert is_unsupported(row["input"]) == row["unsupported"]


@pytest.mark.parametrize(
    "row", [pytest.param(row, id=label(row["text"])) for row in TABLES["content"]]
)
def test_content(row: dict[str, Any]) -> None:
    data = row["text"].encode()
    assert Digest.of(data) == row["digest"]
    assert Digest(row["digest"]).matches(data)
    assert not Digest(row["digest"]).matches(data + b"x")
    if "sha512" in row:
        assert Digest.of(data, "sha512") == row["sha512"]


def test_of_an_algorithm_that_cannot_be_verified() -> None:
    with pytest.raises(InvalidDigestError, match="unsupported"):
        Digest.of(b"", "md5")


def test_trailing_newline_is_no_digest() -> None:
    with pytest.raises(InvalidDigestError):
        Digest("sha256:" + "a" * 64 + "\n")


def test_pickles_as_itself() -> None:
    digest = Digest.of(b"x")
    copy = pickle.loads(pickle.dumps(digest))
    assert copy == digest
    assert type(copy) is Digest
    assert copy.encoded == hashlib.sha256(b"x").hexdigest()


@given(st.text(max_size=90))
def test_nothing_that_could_leave_a_directory(text: str) -> None:
    try:
        digest = Digest(text)
    except InvalidDigestError:
        return
    assert set(digest) <= set("abcdefghijklmnopqrstuvwxyz0123456789:")
