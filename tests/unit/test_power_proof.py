"""What a record that outlived a power cut may say of bytes that did not."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.store import Store
from tests.support.stores import FIRST_BOOT, NEXT_BOOT, commit, pattern, run_killed

if TYPE_CHECKING:
    from pathlib import Path

SIZE = 50_000
AGAIN = """
boot = Boot(sys.argv[2], sys.argv[3])
data = hashlib.shake_256((0).to_bytes(8, "little")).digest(50_000)
digest = Digest.of(data)
with Store.open(sys.argv[1], boot=boot) as store:
    if sys.argv[4] == "document":
        store.put_blob(digest, data)
    else:
        with store.acquire(digest, len(data)) as ingest:
            ingest.write(data)
            ingest.commit()
"""


@pytest.mark.parametrize(
    ("way", "failpoint"), [("ingest", "ingest-after-rename"), ("document", "put-after-rename")]
)
def test_a_durable_record_does_not_speak_for_bytes_that_came_later(
    workspace: Path, way: str, failpoint: str
) -> None:
    path = workspace / "store"
    with Store.open(path, boot=FIRST_BOOT) as store:
        digest = commit(store, pattern(SIZE))
        store.sync()
        store.quarantine(digest)
        blob = store.blob_path(digest)
    # Fetched again, and the power goes between the blob's rename and its record's: what is left of
    # the second writing is a name and a length.
    boot = (FIRST_BOOT.boot_id, FIRST_BOOT.host)
    run_killed(AGAIN, path, *boot, way, failpoint=failpoint)
    blob.chmod(0o600)
    blob.write_bytes(bytes(SIZE))
    blob.chmod(0o444)
    with Store.open(path, boot=NEXT_BOOT) as store:
        assert not store.has(digest, SIZE)
    assert len(list((path / "quarantine").iterdir())) == 2
