"""How many messages a second a simulated run costs its driver and its progress actor.

Of the driver: two calls and their answers for each node when the bytes begin (its part, its work),
of which the last answer comes when the node is ready, and the beats of ``actors/prewarm_pulse.py``.
What went before (begin, survey: two calls a node) is not in the time that is measured. Of the
progress actor: one frame per node and interval (``actors/frames.py``) until the node is ready.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

# As in actors/prewarm_pulse.py and actors/frames.py, which need Ray.
BEAT_SECONDS, BEATS_PER_SECOND = 2.0, 500
FRAME_SECONDS, SECONDS_PER_NODE = 0.1, 0.001


def driver_messages(nodes: int, ready: Sequence[float]) -> Counter[int]:
    """Return the messages to and from the driver in each second; ``ready`` are of all nodes."""
    found: Counter[int] = Counter({0: 3 * nodes})
    beats = min(nodes / BEAT_SECONDS, BEATS_PER_SECOND)
    for second in range(math.ceil(max(ready, default=0.0))):
        found[second] += round(2 * beats)
    found.update(int(at) for at in ready)
    return found


def progress_messages(nodes: int, ready: Sequence[float]) -> Counter[int]:
    """Return the frames that reach the progress actor in each second."""
    interval = max(FRAME_SECONDS, nodes * SECONDS_PER_NODE)
    working = sorted(ready)
    found: Counter[int] = Counter()
    for second in range(math.ceil(max(ready, default=0.0))):
        # Each node's time of work within this second, one frame for each interval of it.
        worked = sum(min(1.0, max(0.0, at - second)) for at in working)
        found[second] = round(worked / interval)
    return found


def told(counts: Counter[int], seconds: float) -> str:
    """Return the mean and the peak of a second, as a cell of the table."""
    return f"{sum(counts.values()) / max(seconds, 1.0):.0f} / {max(counts.values(), default=0)}"
