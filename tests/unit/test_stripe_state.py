from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.stripe_state import StripeState

if TYPE_CHECKING:
    from pathlib import Path


def test_a_reader_sees_position_source_and_pace_as_the_writer_tells_them(tmp_path: Path) -> None:
    writer = StripeState.create(tmp_path, generation=3, count=2, unit=8 << 20)
    reader = StripeState.follow(tmp_path)
    assert reader is not None
    try:
        assert (reader.generation, reader.pace) == (3, 0.0)
        assert [reader.upstream(index) for index in range(2)] == [None, None]
        writer.advance(1, 12345)
        writer.tell(1, "node-7")
        writer.tell_pace(52.5e6)
        assert [reader.position(index) for index in range(2)] == [0, 12345]
        assert [reader.upstream(index) for index in range(2)] == [None, "node-7"]
        assert reader.pace == 52.5e6
    finally:
        reader.close()
        writer.close()
