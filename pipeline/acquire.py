"""Becoming the one writer of a blob.

Invariant: who holds ``flock`` on the ``lock`` file that the ingest's directory has now is the
writer; a lock file that was removed with its directory counts for nothing.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from stowray.pipeline.files import make_directory, translated
from stowray.pipeline.ingest import Ingest
from stowray.pipeline.locks import is_current, open_lock, try_lock

if TYPE_CHECKING:
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.ingest_home import IngestHome


def acquire(home: IngestHome, digest: Digest, size: int, *, bare: bool = False) -> Ingest | None:
    """Become the writer of ``digest`` without waiting; None when another live writer is.

    ``bare``: see :meth:`Ingest.open`.
    """
    directory = home.ingest_path(digest)
    with translated(directory, "begin an ingest"):
        while True:
            try:
                make_directory(directory)
                lock = open_lock(directory / "lock")
            except FileNotFoundError:
                if not directory.parent.is_dir():
                    raise  # the store itself is gone
                continue  # another writer has just committed and removed the directory
            try:
                is_ours = try_lock(lock)
                if is_ours and is_current(lock, directory / "lock"):
                    break
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)
            if not is_ours:
                return None
        try:
            ingest = Ingest(home, digest, size, directory, lock)
        except BaseException:
            os.close(lock)
            raise
    try:
        alive = ingest.open(bare=bare)
    except BaseException:
        ingest.close()
        raise
    if alive:
        return ingest
    # Its lock with it, else this process itself would keep everybody out for as long as it lives.
    ingest.close()
    return None
