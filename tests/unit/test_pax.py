from __future__ import annotations

import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline import pax
from stowray.pipeline.errors import LayerError
from stowray.pipeline.limits import LayerLimits
from tests.support.tars import record

LIMITS = LayerLimits()
KEYS = st.binary(min_size=1, max_size=40).filter(
    lambda key: (
        b"=" not in key
        and b"\0" not in key
        and not key.startswith(b"GNU.sparse.")
        and key != b"hdrcharset"
    )
)


@given(st.dictionaries(KEYS, st.binary(max_size=200), max_size=8))
def test_records_are_read_as_written(records: dict[bytes, bytes]) -> None:
    payload = b"".join(record(key, value) for key, value in records.items())
    assert pax.parse(payload) == records


@pytest.mark.parametrize(
    ("payload", "records"),
    [
        pytest.param(b"", {}, id="empty"),
        pytest.param(b"6 k=1\n6 k=2\n", {b"k": b"2"}, id="the last of equal keys counts"),
        pytest.param(b"5 k=\n", {b"k": b""}, id="empty value"),
        pytest.param(b"11 k=a=b=\n\n", {b"k": b"a=b=\n"}, id="value with = and newline"),
        pytest.param(b"8 k=\xff\0x\n", {b"k": b"\xff\0x"}, id="value of any bytes"),
        pytest.param(b"006 k=1\n", None, id="zero-filled length counts its zeros"),
        pytest.param(b"008 k=1\n", {b"k": b"1"}, id="zero-filled length"),
        pytest.param(
            b"21 hdrcharset=BINARY\n", {b"hdrcharset": b"BINARY"}, id="binary character set"
        ),
        pytest.param(b"6 k=1", None, id="cut off"),
        pytest.param(b"6 k=1\n7 k=2\n", None, id="length one too long"),
        pytest.param(b"5 k=1\n", None, id="length one too short"),
        pytest.param(b"60 k=1\n", None, id="length beyond the header"),
        pytest.param(b"6 k=1x", None, id="no newline"),
        pytest.param(b"0 k=1\n", None, id="length zero"),
        pytest.param(b"2 k=1\n", None, id="length of nothing"),
        pytest.param(b"-6 k=1\n", None, id="negative length"),
        pytest.param(b"+6 k=1\n", None, id="signed length"),
        pytest.param(b" 6 k=1\n", None, id="leading space"),
        pytest.param(b"0_6 k=1\n", None, id="underscore"),
        pytest.param(b"6k=1\n", None, id="no space"),
        pytest.param(b"k=1\n", None, id="no length"),
        pytest.param(b"99999999999999999999 k=1\n", None, id="length of twenty digits"),
        pytest.param(b"5 =1\n", None, id="no key"),
        pytest.param(b"6 kv1\n", None, id="no equals sign"),
        pytest.param(b"7 k\0=1\n", None, id="NUL in the key"),
        pytest.param(b"6 k=1\n\0\0\0", None, id="NULs behind the records"),
        pytest.param(b"20 hdrcharset=EBCDI\n", None, id="unknown character set"),
    ],
)
def test_record_grammar(payload: bytes, records: dict[bytes, bytes] | None) -> None:
    if records is not None:
        assert pax.parse(payload) == records
    else:
        with pytest.raises(LayerError):
            pax.parse(payload)


def test_work_is_linear_in_the_header() -> None:
    """A quadratic parser (CVE-2024-6232) would take minutes for these and hit the time limit."""
    assert len(pax.parse(b"".join(record(f"k{n}", b"") for n in range(60_000)))) == 60_000
    digits = b"1" * (1 << 20)
    with pytest.raises(LayerError):
        pax.parse(digits)
    with pytest.raises(LayerError):
        pax.parse(b"6 k=1\n" * 150_000 + digits)


@pytest.mark.parametrize(
    ("value", "nanoseconds"),
    [
        ("0", 0),
        ("1", 1_000_000_000),
        ("1700000000.123456789", 1_700_000_000_123_456_789),
        ("1700000000.1", 1_700_000_000_100_000_000),
        ("1700000000.000000001", 1_700_000_000_000_000_001),
        ("1700000000.1234567899999", 1_700_000_000_123_456_789),
        ("1.", 1_000_000_000),
        ("000000000000000000000001", 1_000_000_000),
        ("-1", -1_000_000_000),
        ("-1.5", -1_500_000_000),
        ("-0.5", -500_000_000),
        ("9223372036854775807", (2**63 - 1) * 10**9),
        ("9223372036854775808", None),
        ("9" * 5000, None),
        ("", None),
        (".5", None),
        ("-", None),
        ("--1", None),
        ("+1", None),
        (" 1", None),
        ("1_0", None),
        ("1e3", None),
        ("1.-5", None),
        ("1.5.5", None),
        ("1.5 ", None),
        ("١", None),
        ("nan", None),
    ],
)
def test_times_are_exact(value: str, nanoseconds: int | None) -> None:
    if nanoseconds is not None:
        assert pax.time_ns(value.encode()) == nanoseconds
    else:
        with pytest.raises(LayerError):
            pax.time_ns(value.encode())


@pytest.mark.parametrize(
    ("value", "number"),
    [
        ("0", 0),
        ("0012", 12),
        ("000000000000000000000999", 999),
        ("9223372036854775807", 2**63 - 1),
        ("9223372036854775808", None),
        ("1" * 5000, None),
        ("", None),
        ("-1", None),
        ("+1", None),
        (" 1", None),
        ("1\n", None),
        ("1_0", None),
        ("0x10", None),
        ("1.0", None),
        ("٣", None),
    ],
)
def test_integers(value: str, number: int | None) -> None:
    if number is not None:
        assert pax.integer(value.encode(), "size") == number
    else:
        with pytest.raises(LayerError, match="size"):
            pax.integer(value.encode(), "size")


def test_xattrs_of_both_writers() -> None:
    capability = b"\x01\0\0\x02\0\x20\0\0"
    records = {
        b"SCHILY.xattr.security.capability": capability,
        b"LIBARCHIVE.xattr.user.na%C3%AFve%3D": base64.b64encode(b"value").rstrip(b"="),
        b"LIBARCHIVE.xattr.user.padded": base64.b64encode(b"v"),
        b"LIBARCHIVE.xattr.user.both": base64.b64encode(b"libarchive"),
        b"SCHILY.xattr.user.both": b"star",
        b"SCHILY.acl.access": b"user::rwx",
        b"mtime": b"1",
    }
    assert pax.xattrs(records, LIMITS) == {
        b"security.capability": capability,
        "user.naïve=".encode(): b"value",
        b"user.padded": b"v",
        b"user.both": b"star",
    }
    assert pax.xattrs({b"mtime": b"1"}, LIMITS) is None


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param(b"SCHILY.xattr.", b"v", id="no name"),
        pytest.param(b"SCHILY.xattr.user." + b"n" * 251, b"v", id="name of 256 bytes"),
        pytest.param(
            b"SCHILY.xattr.user.n", bytes((64 << 10) + 1), id="value of 64 KiB and a byte"
        ),
        pytest.param(b"LIBARCHIVE.xattr.user%00n", b"", id="NUL in the name"),
        pytest.param(b"LIBARCHIVE.xattr.user.n", b"!!!!", id="no base64"),
        pytest.param(b"LIBARCHIVE.xattr.user.n", b"A", id="base64 cut off"),
    ],
)
def test_impossible_xattrs_are_refused(key: bytes, value: bytes) -> None:
    with pytest.raises(LayerError, match="extended attribute"):
        pax.xattrs({key: value}, LIMITS)


def test_largest_xattr_is_accepted() -> None:
    key = b"SCHILY.xattr.user." + b"n" * 250
    assert pax.xattrs({key: bytes(64 << 10)}, LIMITS) == {key[13:]: bytes(64 << 10)}


def test_paths_keep_their_bytes_and_hold_no_nul() -> None:
    for name in (b"\xff\xfe", b"new\nline", b"back\\slash", b"-dash", "é".encode(), b"p" * 5000):
        assert pax.path(name, "name", LIMITS) == name
    with pytest.raises(LayerError, match="NUL in its name"):
        pax.path(b"a\0b", "name", LIMITS)
    with pytest.raises(LayerError, match="link target of more than"):
        pax.path(b"p" * 65537, "link target", LIMITS)
