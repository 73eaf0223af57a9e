from __future__ import annotations

import pytest

from stowray.pipeline import ustar
from stowray.pipeline.errors import LayerError
from tests.support.tars import GNU, V7, base256, header


@pytest.mark.parametrize(
    ("field", "value"),
    [
        pytest.param(b"0000644\0", 0o644, id="usual"),
        pytest.param(b"0000644 ", 0o644, id="space at the end"),
        pytest.param(b"00644 \0\0", 0o644, id="space and NULs at the end"),
        pytest.param(b"   644\0 ", 0o644, id="spaces in front"),
        pytest.param(b"\0\x30\x30\x30644\0", 0o644, id="NULs in front"),
        pytest.param(b"12345670", 0o12345670, id="full width"),
        pytest.param(b"644\0junk", 0o644, id="what follows a NUL is not looked at"),
        pytest.param(bytes(8), 0, id="empty"),
        pytest.param(b" " * 8, 0, id="blank"),
        pytest.param(b"\x80" + bytes(6) + b"\x07", 7, id="base-256"),
        pytest.param(b"\xff" * 8, -1, id="base-256, -1"),
        pytest.param(b"\xff" * 7 + b"\0", -256, id="base-256, -256"),
        pytest.param(base256(2**62, 12), 2**62, id="base-256, 2^62"),
        pytest.param(base256(2**63 - 1, 12), 2**63 - 1, id="base-256, largest"),
        pytest.param(base256(-(2**63), 12), -(2**63), id="base-256, smallest"),
        pytest.param(base256(2**63, 12), None, id="base-256, 2^63"),
        pytest.param(base256(-(2**63) - 1, 12), None, id="base-256, below 64 bits"),
        pytest.param(b"0000648\0", None, id="digit 8"),
        pytest.param(b"8000000 ", None, id="digit 8 first"),
        pytest.param(b"+000644\0", None, id="plus sign"),
        pytest.param(b"-000644\0", None, id="minus sign"),
        pytest.param(b"000_644\0", None, id="underscore"),
        pytest.param(b"0o00644\0", None, id="prefix"),
        pytest.param(b"64 4\0\0\0\0", None, id="space inside"),
        pytest.param(b"644x\0\0\0\0", None, id="letter behind"),
        pytest.param(b"\t000644\0", None, id="tab"),
        pytest.param(b"000644\n\0", None, id="newline"),
    ],
)
def test_numbers(field: bytes, value: int | None) -> None:
    if value is not None:
        assert ustar.number(field, "mode") == value
    else:
        with pytest.raises(LayerError, match="mode"):
            ustar.number(field, "mode")


def signed_checksum(block: bytes) -> bytes:
    total = sum(byte - 256 * (byte > 127) for byte in block[:148] + b" " * 8 + block[156:])
    return block[:148] + b"%06o\0 " % total + block[156:]


def test_checksums() -> None:
    plain = header("name", size=7)
    assert ustar.checksum_fits(plain)
    assert not ustar.checksum_fits(b"N" + plain[1:])
    assert not ustar.checksum_fits(header("name", checksum=0))
    high = header("näme".encode() * 10)
    assert ustar.checksum_fits(high)
    assert ustar.checksum_fits(signed_checksum(high))
    assert ustar.checksum_fits(signed_checksum(plain))
    assert not ustar.checksum_fits(b"N" + signed_checksum(high)[1:])
    with pytest.raises(LayerError, match="checksum"):
        ustar.checksum_fits(header("name", checksum=b"notoctal"))
    with pytest.raises(LayerError, match="checksum"):
        ustar.checksum_fits(header("name", checksum=base256(sum(plain), 8)))


@pytest.mark.parametrize(
    ("block", "prefix"),
    [
        pytest.param(header("f", prefix="some/dir"), b"some/dir", id="ustar"),
        pytest.param(header("f", prefix="p" * 155), b"p" * 155, id="ustar, full width"),
        pytest.param(header("f"), b"", id="ustar without"),
        pytest.param(
            header("f", prefix=b"p" * 131 + b"00000000001\0", patches={508: b"tar\0"}),
            b"p" * 131,
            id="star has times behind its prefix",
        ),
        pytest.param(
            header("f", magic=GNU, patches={345: b"14000000000\0", 357: b"14000000001\0"}),
            b"",
            id="GNU has times in its place",
        ),
        pytest.param(header("f", magic=GNU, prefix="some/dir"), b"some/dir", id="GNU of old Go"),
        pytest.param(header("f", magic=GNU, prefix="sömé"), b"", id="GNU with other bytes"),
        pytest.param(header("f", magic=V7, prefix="some/dir"), b"", id="v7 has none"),
    ],
)
def test_prefixes(block: bytes, prefix: bytes) -> None:
    assert ustar.prefix(block) == prefix


@pytest.mark.parametrize("value", [0, 1, 65536, 2**32 - 2])
def test_owners(value: int) -> None:
    assert ustar.owner(value, "user ID") == value


@pytest.mark.parametrize("value", [-1, 2**32 - 1, 2**32, 2**32 + 5])
def test_owners_that_chown_would_misread(value: int) -> None:
    with pytest.raises(LayerError, match="user ID"):
        ustar.owner(value, "user ID")


@pytest.mark.parametrize("numbers", [(0, 0), (1, 3), (4095, 2**20 - 1)])
def test_devices(numbers: tuple[int, int]) -> None:
    ustar.check_device(*numbers)


@pytest.mark.parametrize("numbers", [(4096, 0), (0, 2**20), (0, 2097151), (-1, 0), (0, -1)])
def test_devices_that_mknod_would_misread(numbers: tuple[int, int]) -> None:
    with pytest.raises(LayerError, match="device number"):
        ustar.check_device(*numbers)
