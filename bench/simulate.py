"""A simulated cluster that pre-warms one image, with the product's own planner.

Decisions are made by ``pipeline/spread.py``, ``source_choice.py`` and ``origin_leases.py``
themselves; only links, clocks and deaths are made up. Links are queues: a transfer of one unit
occupies its sender's uplink and its receiver's downlink for as long as its bytes take there, in the
order of asking, and each stream asks for one unit at a time, so that streams share a link evenly.
A node passes a unit on while it receives it (cut-through), never faster than it gets it.

    python -m bench.simulate --nodes 1 4 100 1000 10000
"""

from __future__ import annotations

import argparse
import gc
import heapq
import json
import random
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from bench.simulate_messages import driver_messages, progress_messages, told
from stowray.pipeline.origin_leases import Elsewhere, Granted, Later, OriginLeases
from stowray.pipeline.registry_permits import RegistryPermits
from stowray.pipeline.source_actions import (
    ORIGIN,
    Action,
    AskLease,
    Fetch,
    GiveUp,
    Patience,
    Pause,
    Probe,
)
from stowray.pipeline.source_choice import SourceChoice
from stowray.pipeline.source_standing import Pace, Standing
from stowray.pipeline.spread import Blob, NodeState, spread

GB = 1_000_000_000
MB = 1_000_000
NEVER = float("inf")
SOON = 0.02
# 10 GB; the largest layer has 6 GB.
LAYERS = tuple(int(size * GB) for size in (6, 1.6, 0.9, 0.6, 0.4, 0.25, 0.15, 0.08, 0.02))


@dataclass(frozen=True)
class World:
    """What is assumed; bytes per second and seconds."""

    nodes: int = 100
    layers: tuple[int, ...] = LAYERS
    link: float = 1.25 * GB
    origin: float = 1.25 * GB
    origin_connection: float = 250 * MB
    origin_connections: int = 32
    origin_latency: float = 0.05
    hop_latency: float = 0.001
    owner_latency: float = 0.005
    detection: float = 2.0
    health_check: float = 10.0
    lease: float = 3.0
    look: float = 0.5
    slow_share: float = 0.01
    slow_factor: float = 5.0
    death_share: float = 0.005
    death_within: float = 0.0
    unpack: float = 0.0
    fan_out: int = 4
    stripes: int = 16
    held: int = 64
    seed: int = 1
    limit: float = 600.0


@dataclass
class Outcome:
    """What came of it; ``ready`` are the seconds of all living nodes, those not slow first."""

    world: World
    ready: list[float] = field(default_factory=list)
    slow_ready: list[float] = field(default_factory=list)
    unready: int = 0
    slow_unready: int = 0
    dead: int = 0
    origin_bytes: int = 0
    image_bytes: int = 0
    owner_messages: int = 0
    owner_peak: int = 0
    reports: dict[str, int] = field(default_factory=dict)
    events: int = 0
    plan_seconds: float = 0.0
    cpu_seconds: float = 0.0

    def after(self, share: float) -> float:
        """Return when ``share`` of the living nodes that are not slow were ready."""
        need = max(1, -(-int(share * 1000 * (len(self.ready) + self.unready)) // 1000))
        return self.ready[need - 1] if need <= len(self.ready) else NEVER

    def after_all(self, share: float) -> float:
        """Return when ``share`` of all nodes were ready, slow and dead ones counted."""
        everyone = sorted(self.ready + self.slow_ready)
        need = max(1, int(share * self.world.nodes))
        return everyone[need - 1] if need <= len(everyone) else NEVER


class Stream:
    """One stripe on its way to one node."""

    __slots__ = (
        "begin",
        "begin_told",
        "choice",
        "early",
        "finish",
        "node",
        "partial",
        "reading",
        "requested",
        "sent",
        "served",
        "serves",
        "source",
        "token",
        "tree",
        "unit_size",
        "units",
        "waiters",
    )

    def __init__(self, node: int, tree: int, choice: SourceChoice) -> None:
        self.node = node
        self.tree = tree
        self.choice = choice
        self.units = 0  # complete ones
        self.partial = 0  # bytes of the next one
        self.unit_size = 0  # of the one under way
        self.source: Stream | None = None
        self.served = False  # whether the source counts this stream among its children
        self.serves = 0
        self.token = 0
        self.early: Action | None = None
        self.reading = False  # from the origin
        self.begin = self.finish = NEVER
        self.begin_told = False
        self.requested = self.sent = 0.0
        self.waiters: list[Stream] = []


class Simulation:
    """One run."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.now = 0.0
        self.count = 0
        self.random = random.Random(world.seed)
        self.heap: list[tuple[float, int, Any, Any, int]] = []
        count = world.nodes
        self.up = [world.link] * count
        self.down = [world.link] * count
        self.up_free = [0.0] * count
        self.down_free = [0.0] * count
        self.died = [NEVER] * count
        self.origin_free = 0.0
        self.slow = self.pick(round(count * world.slow_share), set())
        for node in self.slow:
            self.up[node] /= world.slow_factor
            self.down[node] /= world.slow_factor
        self.outcome = Outcome(world, image_bytes=sum(world.layers))
        started = time.process_time()
        blobs = [Blob(f"sha256:{number:064x}", size) for number, size in enumerate(world.layers)]
        digests = frozenset(blob.digest for blob in blobs)
        states = [NodeState(f"node-{number}", digests) for number in range(count)]
        self.plan = spread(
            blobs, states, fan_out=world.fan_out, stripe_limit=world.stripes, seed=world.seed
        )
        self.outcome.plan_seconds = time.process_time() - started
        self.numbers = {name: number for number, name in enumerate(self.plan.nodes)}
        half = world.detection / 2
        self.patience = Patience(
            silence=half, answer=half, slow=world.detection, starved=4 * world.detection
        )
        self.pace = [Pace() for _ in range(count)]
        self.leases = OriginLeases(lambda: self.now, ttl_seconds=world.lease)
        self.permits = RegistryPermits(
            lambda: self.now, world.origin_connections, ttl_seconds=world.lease
        )
        self.streams: list[list[Stream]] = [[] for _ in range(count)]
        self.by_tree: list[dict[int, Stream]] = [{} for _ in self.plan.trees]
        self.stripes = [tree.stripe for tree in self.plan.trees]
        self.keys = [f"{tree.digest}#{tree.stripe.index}" for tree in self.plan.trees]
        self.unpack_begin: list[dict[str, float]] = [{} for _ in range(count)]
        self.unfinished: list[dict[str, int]] = [{} for _ in range(count)]
        self.ready_at = [0.0] * count
        self.latest = [0.0] * count
        self.missing = count
        self.owner_seconds: dict[int, int] = {}
        self.reported: list[dict[int, int]] = [{} for _ in range(count)]
        self.build()

    def pick(self, count: int, without: set[int]) -> set[int]:
        left = [number for number in range(self.world.nodes) if number not in without]
        return set(self.random.sample(left, count))

    def build(self) -> None:
        names = self.plan.nodes
        standings = [Standing(5.0) for _ in names]
        for tree_number, tree in enumerate(self.plan.trees):
            length = tree.stripe.length
            for rank, node in enumerate(tree.order):
                sources = [names[tree.order[above]] for above in tree.sources(rank)]
                choice = SourceChoice(sources, length, standings[node], self.patience)
                stream = Stream(node, tree_number, choice)
                self.streams[node].append(stream)
                self.by_tree[tree_number][node] = stream
                unfinished = self.unfinished[node]
                unfinished[tree.digest] = unfinished.get(tree.digest, 0) + 1

    # -- events -----------------------------------------------------------------------------------

    def at(self, when: float, what: Any, subject: Any, token: int = 0) -> None:
        self.count += 1
        heapq.heappush(self.heap, (when, self.count, what, subject, token))

    def run(self) -> Outcome:
        world = self.world
        started = time.process_time()
        for node in self.pick(round(world.nodes * world.death_share), self.slow):
            self.at(self.random.uniform(0.0, world.death_within), self.die, node)
        for node, streams in enumerate(self.streams):
            start = self.random.uniform(0.0, 0.05)
            for stream in streams:
                self.at(start, self.start, stream)
            self.at(start + self.random.uniform(0.5, 1.5) * world.detection / 4, self.tick, node)
        heap, pop = self.heap, heapq.heappop
        while heap and self.missing:
            when, _, what, subject, token = pop(heap)
            if when > world.limit:
                break
            self.now = when
            what(subject, token)
        outcome = self.outcome
        for node in range(world.nodes):
            if self.died[node] < NEVER:
                outcome.dead += 1
            elif not self.ready_at[node]:
                # A slow node that is late must not count against those that are not slow.
                if node in self.slow:
                    outcome.slow_unready += 1
                else:
                    outcome.unready += 1
            elif node in self.slow:
                outcome.slow_ready.append(self.ready_at[node])
            else:
                outcome.ready.append(self.ready_at[node])
        outcome.ready.sort()
        outcome.slow_ready.sort()
        outcome.events = self.count
        outcome.owner_messages = sum(self.owner_seconds.values())
        outcome.owner_peak = max(self.owner_seconds.values(), default=0)
        for streams in self.streams:
            for stream in streams:
                for report in stream.choice.reports:
                    kind = f"{report.kind}: {report.detail}"
                    outcome.reports[kind] = outcome.reports.get(kind, 0) + 1
        outcome.cpu_seconds = time.process_time() - started
        return outcome

    def start(self, stream: Stream, _: int) -> None:
        if self.died[stream.node] > self.now:
            self.act(stream, stream.choice.begin(self.now))

    def die(self, node: int, _: int) -> None:
        if self.ready_at[node]:
            return
        self.died[node] = self.now
        self.missing -= 1
        self.at(self.now + self.world.health_check, self.health, node)

    def health(self, node: int, _: int) -> None:
        self.leases.node_died(self.plan.nodes[node])
        self.permits.node_died(self.plan.nodes[node])

    def tick(self, node: int, count: int) -> None:
        """Look after every stream of a node; measure rates and renew leases every few times."""
        if self.died[node] <= self.now or self.ready_at[node]:
            return
        now = self.now
        looks = max(1, round(self.world.detection / 2 / self.world.look))
        waiting = [stream for stream in self.streams[node] if not stream.choice.done]
        for stream in waiting:
            self.flush(stream)
        if count % looks == 0:
            self.measure(node, waiting, looks * self.world.look)
        expected = self.pace[node].expected
        for stream in waiting:
            action = stream.choice.tick(now, expected)
            if action is not None:
                self.act(stream, action)
        self.at(now + self.world.look, self.tick, node, count + 1)

    def measure(self, node: int, streams: list[Stream], period: float) -> None:
        rates: list[float] = []
        before = self.reported[node]
        for stream in streams:
            choice = stream.choice
            if choice.source and not choice.is_starved:
                rates.append((choice.position - before.get(stream.tree, 0)) / period)
            before[stream.tree] = choice.position
            if choice.source == ORIGIN:
                self.renew(stream)
        self.pace[node].observe(rates)

    def renew(self, stream: Stream) -> None:
        self.message()
        name, key = self.plan.nodes[stream.node], self.keys[stream.tree]
        self.permits.ask(name, key)
        # The unit under way will be finished also without the lease.
        unit = self.stripes[stream.tree].unit
        position = min(stream.choice.length, (stream.units + 1) * unit)
        if not self.leases.progress(name, key, position) and position < stream.choice.length:
            stream.early = stream.choice.lease_lost(self.now)

    def message(self) -> None:
        second = int(self.now)
        self.owner_seconds[second] = self.owner_seconds.get(second, 0) + 1

    # -- what the source choice wants -------------------------------------------------------------

    def act(self, stream: Stream, action: Action) -> None:
        world = self.world
        match action:
            case Fetch(source, _):
                self.leave(stream)
                if source == ORIGIN:
                    self.read_origin(stream)
                else:
                    stream.source = self.by_tree[stream.tree][self.numbers[source]]
                    self.at(self.now + 2 * world.hop_latency, self.opened, stream, stream.token)
            case Probe(source):
                asked = self.by_tree[stream.tree][self.numbers[source]]
                self.at(
                    self.now + 2 * world.hop_latency, self.answer, (stream, asked), stream.token
                )
            case AskLease():
                self.leave(stream)
                self.message()
                self.at(self.now + world.owner_latency, self.lease, (stream, action), stream.token)
            case Pause(until):
                self.leave(stream)
                self.at(until, self.wake, stream, stream.token)
            case GiveUp(reason):
                raise SystemExit(f"{self.plan.nodes[stream.node]}: {reason}")

    def leave(self, stream: Stream) -> None:
        if stream.source is not None and stream.served:
            stream.source.serves -= 1
        self.flush(stream)
        stream.source = None
        stream.served = False
        stream.token += 1
        stream.early = None
        stream.reading = False
        stream.begin = stream.finish = NEVER

    def opened(self, stream: Stream, token: int) -> None:
        source = stream.source
        if token != stream.token or source is None or self.died[stream.node] <= self.now:
            return
        if self.died[source.node] <= self.now:
            return  # a node that is cut off does not refuse either
        # Waiting holds no slot, so the limit is that of held requests.
        if source.serves >= self.world.held:
            self.act(stream, stream.choice.busy(self.now, 1.0))
            return
        source.serves += 1
        stream.served = True
        self.flush(source)
        action = stream.choice.started(self.now, source.choice.position)
        if action is not None:
            self.act(stream, action)
        else:
            self.send(stream)

    def answer(self, pair: tuple[Stream, Stream], token: int) -> None:
        stream, asked = pair
        if token != stream.token or self.died[stream.node] <= self.now:
            return
        if self.died[asked.node] <= self.now:
            return
        self.flush(asked)
        self.flush(stream)
        action = stream.choice.told(
            self.now,
            asked.choice.position,
            asked.choice.source,
            pace=self.pace[asked.node].expected,
        )
        if action is not None:
            self.act(stream, action)

    def lease(self, pair: tuple[Stream, AskLease], token: int) -> None:
        stream, ask = pair
        if token != stream.token or self.died[stream.node] <= self.now:
            return
        name, key = self.plan.nodes[stream.node], self.keys[stream.tree]
        choice = stream.choice
        reply = self.leases.ask(
            name, key, choice.length, ask.position, failed=ask.failed, slow=ask.slow
        )
        if isinstance(reply, Granted):
            if not isinstance(self.permits.ask(name, key), Later):
                self.act(stream, choice.granted(self.now, reply.end))
                return
            self.leases.release(name, key)
            self.act(stream, choice.later(self.now, 0.5))
        elif isinstance(reply, Elsewhere):
            seconds = min(1.0, reply.seconds)
            action = choice.elsewhere(
                self.now, reply.nodes, reply.end, seconds, reading=reply.reading
            )
            self.act(stream, action)
        else:
            self.act(stream, choice.later(self.now, reply.seconds))

    def wake(self, stream: Stream, token: int) -> None:
        if token != stream.token or self.died[stream.node] <= self.now:
            return
        action = stream.choice.tick(self.now, self.pace[stream.node].expected)
        if action is not None:
            self.act(stream, action)

    # -- bytes ------------------------------------------------------------------------------------

    def flush(self, stream: Stream) -> None:
        """Count what has come of the unit under way, as if it came evenly."""
        if stream.finish == NEVER:
            return
        source = stream.source
        now = self.now
        if source is not None:
            now = min(now, self.died[source.node])
            if source.units <= stream.units and source.finish == NEVER:
                return  # the source has not got it itself
        whole = stream.unit_size
        share = (now - stream.requested) / max(1e-9, stream.finish - stream.requested)
        arrived = min(whole - 1, int(whole * share))
        if arrived > stream.partial:
            more = arrived - stream.partial
            stream.partial = arrived
            if stream.reading:
                self.outcome.origin_bytes += more
            action = stream.choice.received(more, self.now)
            if action is not None:
                # A limit in the middle of a unit; the simulated unit is finished first.
                stream.early = action

    def next_unit(self, stream: Stream) -> int:
        stripe = self.stripes[stream.tree]
        return min(stripe.unit, stripe.length - stream.units * stripe.unit)

    def read_origin(self, stream: Stream) -> None:
        world = self.world
        # While one range arrives the next one is asked for, so only the first one waits.
        first = self.now + (0.0 if stream.reading else world.origin_latency)
        stream.reading = True
        whole = stream.unit_size = self.next_unit(stream)
        size = whole - stream.partial
        begin = max(first, self.origin_free)
        self.origin_free = begin + size / world.origin
        stream.sent = max(self.origin_free, first + size / world.origin_connection)
        # Its bytes come evenly until then: an origin serves all that read from it side by side.
        self.at(first, self.land, stream, stream.token)

    def send(self, stream: Stream) -> None:
        """Let the source send the next unit, now or when it begins to have it."""
        source = stream.source
        if source is None:
            return
        number = stream.units
        now = self.now
        if source.units <= number and (source.units < number or source.begin > now):
            source.waiters.append(stream)
            if source.units == number and source.begin < NEVER and not source.begin_told:
                source.begin_told = True
                self.at(source.begin, self.begun, source, source.token)
            return
        giver = source.node
        whole = stream.unit_size = self.next_unit(stream)
        free = self.up_free[giver]
        begin = free if free > now else now
        self.up_free[giver] = stream.sent = begin + (whole - stream.partial) / self.up[giver]
        if begin - now > SOON:
            # The receiver's link is free for others until the bytes come.
            self.at(begin, self.land, stream, stream.token)
        else:
            self.land(stream, stream.token)

    def land(self, stream: Stream, token: int) -> None:
        """Occupy the receiver's link with a unit that its source begins to send."""
        source = stream.source
        if token != stream.token or (source and self.died[source.node] <= self.now):
            return
        latency, finish = self.world.hop_latency, stream.sent
        if source is None:
            latency = 0.0
        elif source.units <= stream.units:
            if source.finish == NEVER:
                source.waiters.append(stream)
                return
            finish = max(finish, source.finish)
        node = stream.node
        size = stream.unit_size - stream.partial
        begin = max(self.now + latency, self.down_free[node])
        got = self.down_free[node] = begin + size / self.down[node]
        self.book(stream, begin, max(finish + latency, got))

    def book(self, stream: Stream, begin: float, finish: float) -> None:
        stream.requested = self.now
        stream.begin = begin
        stream.finish = finish
        stream.begin_told = bool(stream.waiters)
        if stream.begin_told:
            self.at(begin, self.begun, stream, stream.token)
        self.at(finish, self.arrived, stream, stream.token)

    def begun(self, stream: Stream, token: int) -> None:
        if token == stream.token and self.died[stream.node] > self.now:
            self.release(stream)

    def release(self, stream: Stream) -> None:
        """Let those that wait for this stream's bytes ask again."""
        waiters, stream.waiters = stream.waiters, []
        for waiter in waiters:
            if waiter.source is stream and self.died[waiter.node] > self.now:
                self.send(waiter)

    def arrived(self, stream: Stream, token: int) -> None:
        if token != stream.token:
            return
        now = self.now
        if self.died[stream.node] <= now:
            return
        source = stream.source
        if source is not None:
            if self.died[source.node] <= now:
                return  # it never came; the watch over the stream will notice
            if source.units <= stream.units:
                # What the source was passing on never came to it: wait until it does.
                stream.begin = stream.finish = NEVER
                source.waiters.append(stream)
                return
        more = stream.unit_size - stream.partial
        stream.units += 1
        stream.partial = 0
        stream.begin = stream.finish = NEVER
        choice = stream.choice
        if stream.reading:
            self.outcome.origin_bytes += more
        action = choice.received(more, now)
        early = stream.early
        if early is not None:
            stream.early = None
            action = action or early
        if stream.units == 1:
            self.unpack_begin[stream.node].setdefault(self.plan.trees[stream.tree].digest, now)
        if choice.position >= choice.length:
            self.finished(stream)
        elif action is not None:
            self.act(stream, action)
        elif source is None:
            self.read_origin(stream)
        else:
            self.send(stream)
        if stream.waiters:
            self.release(stream)

    def finished(self, stream: Stream) -> None:
        node = stream.node
        tree = self.plan.trees[stream.tree]
        if stream.source is None or (len(tree.order) > 1 and stream.source.source is None):
            # Those next to the origin tell that they have it, so that nobody reads it again.
            self.message()
            name, key = self.plan.nodes[node], self.keys[stream.tree]
            self.leases.has(name, key, stream.choice.length)
            self.permits.give_back(name, key)
        if stream.source is not None and stream.served:
            stream.source.serves -= 1
            stream.served = False
        unfinished = self.unfinished[node]
        unfinished[tree.digest] -= 1
        if unfinished[tree.digest]:
            return
        ready = self.now
        if self.world.unpack:
            begin = self.unpack_begin[node][tree.digest]
            ready = max(
                ready + tree.stripe.unit / self.world.unpack,
                begin + tree.stripe.size / self.world.unpack,
            )
        del unfinished[tree.digest]
        self.latest[node] = max(self.latest[node], ready)
        if not unfinished:
            self.ready_at[node] = self.latest[node]
            self.missing -= 1


def measure(world: World) -> tuple[Outcome, float]:
    """Return what came of ``world``, and the seconds of one node alone in the same world."""
    alone = replace(world, nodes=1, slow_share=0.0, death_share=0.0)
    seconds = Simulation(alone).run().after(1.0)
    return Simulation(replace(world, death_within=seconds)).run(), seconds


def line(outcome: Outcome, alone: float) -> str:
    """Return a row of the table."""
    world = outcome.world
    duration = max([*outcome.ready, *outcome.slow_ready, 1.0])
    ready = [*outcome.ready, *outcome.slow_ready]
    cells = [
        f"{world.nodes:,}",
        f"{world.origin * 8 / GB:g}",
        f"{world.unpack / MB:.0f}" if world.unpack else "∞",
        f"{alone:.1f}",
        f"{outcome.after(0.99):.1f}",
        f"{outcome.after(0.99) / alone:.2f}",
        f"{outcome.after_all(0.98) / alone:.2f}",
        f"{outcome.after(1.0) / alone:.2f}",
        f"{max(outcome.slow_ready, default=0.0) / alone:.2f}" if outcome.slow_ready else "-",
        f"{outcome.dead}",
        f"{outcome.origin_bytes / outcome.image_bytes:.4f}",
        f"{outcome.owner_messages / duration:.0f} / {outcome.owner_peak}",
        told(driver_messages(world.nodes, ready), duration),
        told(progress_messages(world.nodes, ready), duration),
        f"{outcome.cpu_seconds:.0f}",
    ]
    return f"| {' | '.join(cells)} |"


COLUMNS = (
    "nodes",
    "origin Gbit/s",
    "unpack MB/s",
    "one node s",
    "99 % s",
    "99 % ratio",
    "98 % of all",
    "last",
    "last slow",
    "dead",
    "origin/image",
    "owner msg/s mean/peak",
    "driver msg/s mean/peak",
    "progress msg/s mean/peak",
    "CPU s",
)
HEAD = f"| {' | '.join(COLUMNS)} |\n|{'--:|' * len(COLUMNS)}"


def main() -> None:
    """Run the worlds that were asked for and print one row each."""
    usual = World()
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nodes", type=int, nargs="+", default=[1, 4, 100, 1000])
    parser.add_argument("--origin", type=float, nargs="+", default=[10.0], help="Gbit/s")
    parser.add_argument("--unpack", type=float, nargs="+", default=[0.0], help="MB/s; 0: no limit")
    parser.add_argument("--fan-out", type=int, default=usual.fan_out)
    parser.add_argument("--stripes", type=int, default=usual.stripes)
    parser.add_argument("--detection", type=float, default=usual.detection, help="seconds")
    parser.add_argument("--hop-latency", type=float, default=usual.hop_latency, help="seconds")
    parser.add_argument("--slow-share", type=float, default=usual.slow_share)
    parser.add_argument("--death-share", type=float, default=usual.death_share)
    parser.add_argument("--seed", type=int, default=usual.seed)
    parser.add_argument("--json", action="store_true", help="one JSON object per row")
    options = parser.parse_args()
    gc.disable()  # millions of small tuples, no cycles worth looking for
    if not options.json:
        print(HEAD)
    for nodes in options.nodes:
        for origin in options.origin:
            for unpack in options.unpack:
                world = replace(
                    usual,
                    nodes=nodes,
                    origin=origin * GB / 8,
                    unpack=unpack * MB,
                    fan_out=options.fan_out,
                    stripes=options.stripes,
                    detection=options.detection,
                    hop_latency=options.hop_latency,
                    slow_share=options.slow_share,
                    death_share=options.death_share,
                    seed=options.seed,
                )
                outcome, alone = measure(world)
                if options.json:
                    print(json.dumps({**asdict(outcome), "alone": alone}))
                else:
                    print(line(outcome, alone), flush=True)
                    print(outcome.reports, outcome.events, file=sys.stderr)


if __name__ == "__main__":
    main()
