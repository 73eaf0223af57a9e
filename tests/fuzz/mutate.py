"""Makes inputs from seeds, and runs a target over them: reproducible, without any other program.

Invariant: the same target, seed and count give the same inputs. Each execution has an alarm (a hang
is a finding like a crash) and the process a bound on its memory.
"""

from __future__ import annotations

import random
import resource
import signal
import zlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from tests.fuzz.targets import Target

HANG_SECONDS = 10.0
MEMORY_BYTES = 512 << 20  # how much a target may make the process grow
MENDED = 0.7  # of the mutations the share whose checksums are set right


class Hang(BaseException):
    """An execution took longer than it may; no reader catches it."""


@dataclass
class Finding:
    """An input that a target did not answer as it should."""

    data: bytes
    error: str


@dataclass
class Outcome:
    """How many executions there were, what they found, and how much the process grew (bytes)."""

    executions: int = 0
    findings: list[Finding] = field(default_factory=list)
    grown: int = 0


def inputs(target: Target, seed: int) -> Iterator[bytes]:
    """Yield the seeds and then mutations of them without end."""
    known = target.inputs()
    yield from known
    # Not hash(): that differs from process to process.
    choice = random.Random(zlib.crc32(target.name.encode()) ^ seed)
    while True:
        data = bytearray(choice.choice(known) if known else b"")
        for _ in range(choice.choice((1, 1, 1, 2, 3, 8))):
            _mutate(data, choice, target.words, known)
        made = bytes(data[: target.longest])
        if target.mend is not None and choice.random() < MENDED:
            made = target.mend(made)
        yield made


def run(target: Target, seed: int, executions: int) -> Outcome:
    """Run the target over so many inputs."""
    outcome = Outcome()
    before = _peak()
    old = signal.signal(signal.SIGALRM, _hang)
    try:
        for data in inputs(target, seed):
            if outcome.executions >= executions:
                break
            outcome.executions += 1
            error = attempt(target, data)
            if error:
                outcome.findings.append(Finding(data, error))
    finally:
        signal.signal(signal.SIGALRM, old)
    outcome.grown = _peak() - before
    if outcome.grown > MEMORY_BYTES:
        outcome.findings.append(Finding(b"", f"the process grew by {outcome.grown} bytes"))
    return outcome


def attempt(target: Target, data: bytes) -> str:
    """Run the target over one input; return what was wrong, empty for nothing."""
    signal.setitimer(signal.ITIMER_REAL, HANG_SECONDS)
    try:
        target.run(data)
    except (Exception, Hang) as error:  # noqa: BLE001 - whatever escapes is the finding
        signal.setitimer(signal.ITIMER_REAL, 0)
        import traceback

        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"{type(error).__name__} in {where.name} ({where.lineno}): {str(error)[:200]}"
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return ""


def _hang(_number: int, _frame: FrameType | None) -> None:
    raise Hang


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


_INTERESTING = (b"\0", b"\xff", b"\x7f", b"\x80", b"\n", b" ", b"0", b"9", b"-", b"\xc2\xa0")


def _mutate(
    data: bytearray, choice: random.Random, words: tuple[bytes, ...], known: list[bytes]
) -> None:
    at = choice.randrange(len(data) + 1)
    match choice.randrange(10):
        case 0 if data:
            data[at % len(data)] ^= 1 << choice.randrange(8)
        case 1:
            data[at:at] = choice.choice(_INTERESTING)
        case 2 if words:
            data[at:at] = choice.choice(words)
        case 3 if words:
            word = choice.choice(words)
            data[at : at + len(word)] = word
        case 4:
            del data[at : at + choice.choice((1, 2, 4, 16, 64, 512))]
        case 5:
            part = data[at : at + choice.choice((1, 4, 16, 64, 512))]
            data[at:at] = part * choice.choice((1, 2, 10))
        case 6 if known:
            other = choice.choice(known)
            start = choice.randrange(len(other) + 1)
            data[at:] = other[start:]
        case 7 if data:
            data[at % len(data)] = choice.randrange(256)
        case 8:
            del data[at:]
        case _:
            # A number somewhere becomes another one.
            digits = [i for i, byte in enumerate(data[:2048]) if 48 <= byte <= 57]
            if digits:
                spot = choice.choice(digits)
                numbers = (b"0", b"-1", b"8589934592", b"7", b"65536", b"99999999999999999999")
                data[spot : spot + 1] = choice.choice(numbers)
