"""The live page while many nodes report, without a cluster: `python -m bench.ui --nodes 1000`.

A made-up run of so many nodes and four images tells events ten times a second and a report twice,
as a driver does; so many browsers follow it over real sockets, one of them hanging. Ends with one
JSON line: how long the run's own calls took, messages and bytes to each browser per second, the
largest message, the document's size, the processor time of the whole process, and how long the end
took.
"""

from __future__ import annotations

import argparse
import http.client
import json
import resource
import socket
import threading
import time
from dataclasses import replace
from urllib.parse import urlsplit

from stowray.pipeline.progress import Event
from stowray.ui import LiveUi
from tests.support.prewarm import MIB, make_report, make_spans

IMAGES = tuple(f"registry.example/team/service-{number}:1.0" for number in range(4))
SIZE = 10 * MIB
LAYERS = 4


class Browser(threading.Thread):
    """One that follows the run to its end."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.sizes: list[int] = []
        self.over = False
        self._address = urlsplit(url)

    def run(self) -> None:
        connection = http.client.HTTPConnection(self._address.netloc)
        connection.request("GET", f"{self._address.path}events")
        stream = connection.getresponse()
        while line := stream.readline():
            if line.startswith(b"data: "):
                self.sizes.append(len(line))
                self.over = json.loads(line[6:])["over"]
        connection.close()


def events_at(names: list[str], fraction: float) -> list[Event]:
    """Return the events of a run that is so far: layers come one after the other."""
    found = []
    for place, name in enumerate(names):
        own = fraction * (1.4 - 0.4 * place / len(names))
        for number, image in enumerate(IMAGES):
            for layer in range(LAYERS):
                done = int(SIZE * min(1.0, max(0.0, own * LAYERS - layer * 0.8)))
                if done:
                    digest = f"sha256:{number * LAYERS + layer:064x}"
                    for kind, last in (("blob", "done"), ("layer", "applied")):
                        status = last if done == SIZE else "downloading"
                        found.append(
                            Event(0.0, image, name, digest, kind, status, done, SIZE, started=1.0)
                        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--nodes", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--browsers", type=int, default=3)
    options = parser.parse_args()
    names = [f"worker-{number:05d}" for number in range(options.nodes)]
    base = make_report(names, IMAGES, status="working", size=SIZE * LAYERS)
    frames = [events_at(names, step / 30) for step in range(1, 31)]
    ui = LiveUi("127.0.0.1:0")
    ui.start()
    address = urlsplit(ui.url)
    browsers = [Browser(ui.url) for _ in range(options.browsers)]
    for browser in browsers:
        browser.start()
    hung = socket.create_connection((address.hostname, address.port))
    hung.sendall(f"GET {address.path}events HTTP/1.1\r\nHost: x\r\n\r\n".encode())
    calls: list[float] = []
    used = resource.getrusage(resource.RUSAGE_SELF)
    began = time.monotonic()
    while (passed := time.monotonic() - began) < options.seconds:
        frame = frames[int(passed / options.seconds * len(frames))]
        # A tenth of the events in each of ten frames a second, and a report twice a second.
        for part in range(5):
            before = time.perf_counter()
            ui.see(frame[part::10])
            calls.append(time.perf_counter() - before)
            time.sleep(0.1)
        before = time.perf_counter()
        ui.take(replace(base, seconds=passed))
        calls.append(time.perf_counter() - before)
    spent = resource.getrusage(resource.RUSAGE_SELF)
    connection = http.client.HTTPConnection(address.netloc)
    connection.request("GET", address.path)
    document = len(connection.getresponse().read())
    connection.close()
    ui.take(make_report(names, IMAGES, size=SIZE, seconds=passed, spans=make_spans(names, 16)))
    before = time.monotonic()
    ui.close()
    ended = time.monotonic() - before
    for browser in browsers:
        browser.join(10)
    hung.close()
    told = {
        "nodes": options.nodes,
        "seconds": round(passed, 1),
        "call_ms_median": round(sorted(calls)[len(calls) // 2] * 1000, 2),
        "call_ms_worst": round(max(calls) * 1000, 2),
        "messages_per_second": [round(len(b.sizes) / passed, 2) for b in browsers],
        "kib_per_second": [round(sum(b.sizes[:-1]) / passed / 1024, 1) for b in browsers],
        "largest_message_kib": round(max(max(b.sizes[:-1]) for b in browsers) / 1024, 1),
        "last_message_kib": round(max(b.sizes[-1] for b in browsers) / 1024, 1),
        "document_kib": round(document / 1024, 1),
        "processor_share": round(
            (spent.ru_utime + spent.ru_stime - used.ru_utime - used.ru_stime) / passed, 3
        ),
        "end_seconds": round(ended, 2),
        "all_saw_the_end": all(b.over for b in browsers),
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
