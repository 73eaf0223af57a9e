"""The three standard streams as a command needs them.

Invariant: descriptors 0, 1 and 2 are never a file of the store, also when the caller closed them;
an answer that cannot be written is an error with an exit status, not a traceback. Each line of an
answer is written before anything else is said: both may go to one file (``> log 2>&1``).
"""

from __future__ import annotations

import io
import os
import sys
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.errors import StorageError

if TYPE_CHECKING:
    from collections.abc import Iterator

    from _typeshed import ReadableBuffer


class AnswerError(StorageError):
    """The answer cannot be written to standard output; fields ``(path, reason)``."""


class _Answers(io.FileIO):
    """Standard output; what keeps it from taking bytes is an AnswerError, but for a gone reader."""

    def write(self, data: ReadableBuffer, /) -> int:
        """Write bytes; return how many were taken."""
        with answering():
            return super().write(data)


@contextmanager
def answering() -> Iterator[None]:
    """Class what keeps a block from writing to descriptor 1; a reader that went away stays so."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        # What is left in the buffers would fail once more when the interpreter ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        raise AnswerError(
            "standard output", f"the answer cannot be written: {error.strerror}"
        ) from error


def prepare() -> None:
    """Open what the caller closed as nothing, and class the errors of standard output."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            # The lowest free number is taken, which is this one.
            os.open(os.devnull, os.O_RDONLY if number == 0 else os.O_WRONLY)
    if sys.stderr is None:
        sys.stderr = io.TextIOWrapper(io.FileIO(2, "w", closefd=False))
    before = sys.stdout
    encoding, errors = "utf-8", "surrogateescape"
    if before is not None:
        encoding, errors = before.encoding, before.errors or "strict"
    raw = _Answers(1, "w", closefd=False)
    sys.stdout = io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors=errors, line_buffering=True
    )
