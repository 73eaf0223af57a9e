"""``stowray serve``: the store as a read-only registry for other runtimes."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from typing import TYPE_CHECKING

import click

from stowray.cli.context import command

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from types import FrameType

    from stowray.cli.context import Context
    from stowray.log import Log
    from stowray.pipeline.serve_limits import Served

_POLL_SECONDS = 3600.0


@command("serve", short_help="Serve the store as a read-only registry.")
@click.option(
    "--listen",
    metavar="HOST:PORT",
    default="127.0.0.1:5001",
    show_default=True,
    help="Port 0 takes a free one. Whoever reaches HOST can read every image in the store.",
)
def serve_command(context: Context, listen: str) -> int:
    """Serve the images in the store to containerd, podman, skopeo and others, until interrupted.

    A mirror: /v2/REPOSITORY/... answers for the registry named by ?ns= (containerd sends it), or
    for any registry that has the repository. Layers that are still being pulled are passed on as
    they arrive. /metrics has figures for Prometheus. Ends with 0 on SIGTERM and with 130 on Ctrl-C.
    """
    from stowray.metrics import Metrics
    from stowray.pipeline.serve import BlobServer, is_loopback_host, parse_listen

    host, port = parse_listen(listen)
    # A mirror may be there before the first image is; a store on a read-only disk can be served.
    store = context.open_store(create=not os.path.lexists(context.store_path()))
    asked: list[int] = []
    log, metrics = context.log, Metrics()

    def report(served: Served) -> None:
        metrics.served(served)
        _tell(log, served)

    def figures() -> str:
        metrics.measure(store)
        return metrics.text()

    server = BlobServer(store, host=host, port=port, report=report, metrics=figures)
    with _noting_signals(asked, server.interrupt), server:
        address = server.address
        if context.json:
            answer = {"url": server.url, "address": address, "store": str(store.path)}
            print(json.dumps(answer), flush=True)  # noqa: T201
        log("info", "serving", f"serving {store.path} at {server.url}", url=server.url)
        if not is_loopback_host(address.rpartition(":")[0]):
            log(
                "warning",
                "open",
                "anybody who reaches this address can read every image in this store",
            )
        while not asked and not server.wait(_POLL_SECONDS):
            continue
    if not asked:
        from stowray.pipeline.errors import NodeError

        raise NodeError(address, "the server ended by itself")
    return 130 if asked[0] == signal.SIGINT else 0


@contextlib.contextmanager
def _noting_signals(asked: list[int], act: Callable[[], None]) -> Iterator[None]:
    """Note SIGINT and SIGTERM and ``act``, instead of dying of them, for a block."""

    def note(number: int, _frame: FrameType | None) -> None:
        if asked:
            # Asked twice: leave now, whatever a thread still waits for. Nothing here is half done.
            os._exit(130 if number == signal.SIGINT else 0)
        asked.append(number)
        act()

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _tell(log: Log, served: Served) -> None:
    cut = "" if served.complete else " (cut off)"
    log(
        "debug",
        "request",
        f"{served.method} {served.path} {served.status} {served.length} B{cut} "
        f"{served.seconds:.3f} s",
        method=served.method,
        status=served.status,
        bytes=served.length,
        seconds=round(served.seconds, 6),
    )
