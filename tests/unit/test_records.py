from __future__ import annotations

import json
import tracemalloc
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.digest import Digest
from stowray.pipeline.entry_list import read_entry_list
from stowray.pipeline.errors import StorageError
from stowray.pipeline.journal import Journal
from stowray.pipeline.recordfile import (
    decode_record,
    encode_record,
    read_record_file,
    require_record_file,
)
from stowray.pipeline.records import BlobRecord, ReferenceRecord
from stowray.pipeline.store import Store
from stowray.pipeline.trust import Stamp
from tests.support.stores import FIRST_BOOT, NEXT_BOOT, record

if TYPE_CHECKING:
    from pathlib import Path

PAYLOADS = st.dictionaries(
    st.text(max_size=5),
    st.one_of(st.none(), st.booleans(), st.integers(), st.text(max_size=8)),
    min_size=1,
    max_size=4,
)


@settings(max_examples=50, deadline=None)
@given(PAYLOADS)
def test_records_come_back_and_are_plain_json(payload: dict[str, Any]) -> None:
    payload.pop("checksum", None)
    payload["x"] = 1
    data = encode_record(payload)
    assert decode_record(data) == payload
    assert {"checksum": json.loads(data)["checksum"], **payload} == json.loads(data)


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_no_damage_goes_unnoticed(data: st.DataObject) -> None:
    whole = encode_record({"digests": ["a" * 20], "size": 12})
    position = data.draw(st.integers(0, len(whole) - 1))
    flip = data.draw(st.integers(1, 255))
    damaged = bytearray(whole)
    damaged[position] ^= flip
    assert decode_record(bytes(damaged)) is None
    assert decode_record(whole[:position]) is None
    assert decode_record(whole + bytes([flip])) is None
    assert decode_record(bytes(len(whole))) is None


def test_a_required_record_says_what_to_do_when_it_is_damaged(workspace: Path) -> None:
    path = workspace / "record"
    assert require_record_file(path, "call home") is None
    path.write_bytes(b"")
    with pytest.raises(StorageError, match="damaged: call home") as caught:
        require_record_file(path, "call home")
    assert caught.value.path == str(path)
    assert read_record_file(path) is None


def test_records_of_the_store_say_whether_to_trust_them(workspace: Path) -> None:
    with Store.open(workspace / "store", boot=FIRST_BOOT) as store:
        path = store.path / "snapshots" / "deep" / "one.json"
        store.write_record(path, {"layer": "x"})
        found = store.read_record(path)
        assert found is not None
        assert (found.payload, found.trusted) == ({"layer": "x"}, True)
        with Store.open(store.path, boot=NEXT_BOOT) as other:
            later = other.read_record(path)
            assert later is not None
            assert not later.trusted
            # The old stamp can be kept when only the words about a thing change.
            other.write_record(path, {"layer": "y"}, stamp=later.stamp)
            again = other.read_record(path)
            assert again is not None
            assert (again.payload, again.trusted) == ({"layer": "y"}, False)
        path.write_bytes(path.read_bytes()[:-1])
        assert store.read_record(path) is None
        assert store.read_record(store.path / "snapshots" / "none.json") is None


@pytest.mark.parametrize(
    "payload",
    [
        {},
        {"size": "1", "repositories": "a/b", "verified": 5},
        {"size": True, "repositories": [1, None], "verified": {}},
    ],
)
def test_a_blob_record_of_another_form_says_nothing(payload: dict[str, Any]) -> None:
    assert BlobRecord.parse(payload) == BlobRecord()


def test_blob_records_come_back() -> None:
    known = BlobRecord(5, ("a/b",), Stamp("b", "h", 1)).with_repository("A/b")
    assert known.repositories == ("A/b", "a/b")
    assert BlobRecord.parse(known.payload()) == known


def test_reference_records_come_back() -> None:
    one, two = Digest.of(b"1"), Digest.of(b"2", "sha512")
    known = record(one, config=two, layers=[one, two, one], chain_id=str(two), pinned=True)
    assert ReferenceRecord.parse(json.loads(json.dumps(known.payload()))) == known
    assert known.digests == (one, one, two, one, two, one)


@pytest.mark.parametrize("key", sorted(record(Digest.of(b"1")).payload()))
@pytest.mark.parametrize("value", [None, "nonsense", [7]])
def test_reference_records_of_another_form_are_none(key: str, value: object) -> None:
    payload = record(Digest.of(b"1"), layers=[Digest.of(b"2")]).payload()
    payload[key] = value
    parsed = ReferenceRecord.parse(payload)
    if key in ("resolved", "manifest", "config", "layers", "manifest_size", "created", "others"):
        assert parsed is None
    del payload[key]
    # Records that were written before there were others lack them.
    assert (ReferenceRecord.parse(payload) is None) is (key != "others")


@pytest.mark.parametrize(
    "claim", [b"\xdd\x03\xff\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff"]
)
def test_a_length_that_a_damaged_file_claims_is_not_believed(tmp_path: Path, claim: bytes) -> None:
    (tmp_path / "journal").write_bytes(claim)
    (tmp_path / "tree.entries").write_bytes(claim)
    tracemalloc.start()
    try:
        assert Journal(tmp_path / "journal").read().checkpoints == []
        with pytest.raises(StorageError, match="damaged"):
            read_entry_list(tmp_path / "tree")
        assert tracemalloc.get_traced_memory()[1] < 4 << 20
    finally:
        tracemalloc.stop()
