"""Places where a test may kill the process, so that every crash point can be tried for real.

Invariant: without the environment variable ``STOWRAY_FAILPOINT`` a failpoint does nothing.
"""

from __future__ import annotations

import os
import signal

VARIABLE = "STOWRAY_FAILPOINT"


def failpoint(name: str) -> None:
    """Kill this process with SIGKILL when the environment names this failpoint."""
    if os.environ.get(VARIABLE) == name:
        os.kill(os.getpid(), signal.SIGKILL)
