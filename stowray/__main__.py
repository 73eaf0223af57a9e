"""The ``stowray`` command."""

from __future__ import annotations

import gc
import sys

# A command's start makes some ten thousand objects that stay; looking through them for garbage each
# time 700 more are there costs a twentieth of it.
GC_THRESHOLD = 50_000


def main() -> None:
    """Run the command line and exit with the status that contract and errors give."""
    gc.set_threshold(GC_THRESHOLD)
    from stowray.cli.app import run
    from stowray.cli.streams import prepare

    prepare()
    leave(run(sys.argv[1:]))


def leave(status: int) -> None:
    """Exit, without taking every module apart first where nothing is waited for.

    What asked to be called at the end of the process is called, and all output is written.
    """
    import atexit
    import os
    import threading

    if any(not thread.daemon for thread in threading.enumerate()[1:]):
        sys.exit(status)
    atexit._run_exitfuncs()
    try:
        sys.stdout.flush()
        sys.stderr.flush()
    except OSError:
        # The interpreter has a way of its own of telling that its output found no room.
        sys.exit(status)
    os._exit(status)


if __name__ == "__main__":
    main()
