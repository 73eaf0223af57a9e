"""Pull in a process that has done so before, and print how long that took.

    python -m bench.inside REFERENCE STORE

The first pull, of the same image into a store of its own, is what starts and imports everything;
it is not measured.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path

import stowray


def main() -> None:
    reference, store = sys.argv[1], Path(sys.argv[2])
    warm = store.with_name("warm")
    stowray.pull(reference, store=warm, engine="local")
    shutil.rmtree(warm)
    begun = time.perf_counter()
    stowray.pull(reference, store=store, engine="local")
    print(json.dumps({"seconds": time.perf_counter() - begun}))


if __name__ == "__main__":
    main()
