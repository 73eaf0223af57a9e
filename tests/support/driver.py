"""A program that pulls on Ray, for tests that interrupt, kill or watch a driver from outside.

    python -m tests.support.driver ENGINE STORE REFERENCE

Prints ``connected``, then the engine that did the work and what was fetched; exits with the status
that the command would have.
"""

from __future__ import annotations

import signal
import sys


def main(name: str, store: str, text: str) -> int:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    from stowray.api import make_engine
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.errors import StowrayError
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import RegistrySettings, Settings
    from stowray.pipeline.source import parse_source

    settings = Settings(store=store, engine=name, registry=RegistrySettings(attempts=2))
    progress = Progress(node="driver")
    engine = make_engine(settings, progress=progress)
    try:
        connect = getattr(engine, "connect", None)
        if connect is not None:
            connect()
        print("connected", "ray" in sys.modules, flush=True)
        result = engine.pull(parse_source(text), PullOptions())
        print(result.engine, result.fetched_bytes, flush=True)
    except StowrayError as error:
        print(type(error).__name__, error, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    finally:
        engine.close()
        progress.close()
        after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
        print("handlers kept", after == handlers, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
