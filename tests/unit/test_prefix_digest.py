"""The digest of a growing prefix: the one of the bytes, whoever hashes them and from where."""

from __future__ import annotations

import hashlib
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline import prefix_digest
from stowray.pipeline.prefix_digest import PrefixDigest


class Growing:
    """A blob that grows, and what was noted about it."""

    def __init__(self) -> None:
        self.data = bytearray()
        self.reads: list[tuple[int, int]] = []
        self.kept: dict[int, bytes] = {}
        self.digest = PrefixDigest(
            hashlib.sha256(), lambda: len(self.data), self.read, self.kept.__setitem__
        )

    def read(self, offset: int, length: int) -> bytes:
        self.reads.append((offset, length))
        return bytes(self.data[offset : offset + length])


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_digest, "CHECKPOINT_EVERY", 16)
    monkeypatch.setattr(prefix_digest, "_READ_SIZE", 8)


@given(st.lists(st.tuples(st.binary(max_size=50), st.booleans())))
def test_digest_and_checkpoints_are_those_of_the_prefix(pieces: list[tuple[bytes, bool]]) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_digest, "CHECKPOINT_EVERY", 16)
        patch.setattr(prefix_digest, "_READ_SIZE", 8)
        blob = Growing()
        for piece, in_memory in pieces:
            start = len(blob.data)
            blob.data += piece
            if in_memory:
                blob.digest.catch_up(memoryview(piece), start, wait=False)
                assert not blob.reads, "bytes at hand are not read back"
            else:
                blob.digest.catch_up(wait=True)
                blob.reads.clear()
            assert blob.digest.hexdigest() == hashlib.sha256(blob.data).hexdigest()
        assert set(blob.kept) == set(range(16, len(blob.data) + 1, 16))
        blob.digest.note()
        assert set(blob.kept) == set(range(16, len(blob.data) + 1, 16)) | ({len(blob.data)} - {0})
        for offset, digest in blob.kept.items():
            assert digest == hashlib.sha256(blob.data[:offset]).digest()


def test_what_was_written_behind_a_hole_is_read_back() -> None:
    blob = Growing()
    blob.data += b"a" * 20
    blob.digest.catch_up(memoryview(b"a" * 5), 15, wait=False)
    assert blob.reads == [(0, 8), (8, 8), (16, 4)]
    assert blob.digest.hexdigest() == hashlib.sha256(b"a" * 20).hexdigest()


def test_one_thread_hashes_and_the_others_leave_it_to_that_one() -> None:
    blob = Growing()
    reading, go_on = threading.Event(), threading.Event()
    read = blob.read

    def slow(offset: int, length: int) -> bytes:
        reading.set()
        go_on.wait(60)
        return read(offset, length)

    blob.digest = PrefixDigest(
        hashlib.sha256(), lambda: len(blob.data), slow, blob.kept.__setitem__
    )
    blob.data += b"a" * 8
    first = threading.Thread(target=blob.digest.catch_up, kwargs={"wait": True})
    first.start()
    assert reading.wait(60)
    blob.data += b"b" * 8
    blob.digest.catch_up(memoryview(b"b" * 8), 8, wait=False)  # returns at once
    assert not blob.reads
    go_on.set()
    first.join()
    assert blob.digest.hexdigest() == hashlib.sha256(b"a" * 8 + b"b" * 8).hexdigest()


def test_a_read_that_fails_can_be_made_again() -> None:
    blob = Growing()
    blob.data += b"a" * 20

    def broken(_offset: int, _length: int) -> bytes:
        raise OSError("no")

    read, blob.digest = (
        blob.read,
        PrefixDigest(hashlib.sha256(), lambda: len(blob.data), broken, blob.kept.__setitem__),
    )
    with pytest.raises(OSError, match="no"):
        blob.digest.catch_up(wait=True)
    blob.digest._read = read
    blob.digest.catch_up(wait=True)
    assert blob.digest.hexdigest() == hashlib.sha256(b"a" * 20).hexdigest()


def test_it_goes_on_from_a_proven_prefix() -> None:
    blob = Growing()
    blob.data += b"x" * 40
    blob.digest.reset(hashlib.sha256(b"x" * 20), 20, 16)
    blob.digest.catch_up(wait=True)
    assert blob.reads[0][0] == 20
    assert blob.digest.hexdigest() == hashlib.sha256(b"x" * 40).hexdigest()
    assert set(blob.kept) == {32}
