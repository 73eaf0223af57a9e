"""What a pre-warm run would do, from what every node said of itself: pure arithmetic.

Invariant: a plan is a function of the surveys, the images and the limits alone; a blob that lies on
any node costs the origin nothing, a store counts once however many nodes see it, and a node that
certainly has no room is refused here, before the first byte.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import StorageError, describe
from stowray.pipeline.prewarm_plan import expand_waves
from stowray.pipeline.prewarm_survey import (
    BlobNeed,
    BlobPlan,
    NodePlan,
    Rates,
    manifest_requests,
)
from stowray.pipeline.spread import Blob, NodeState, spread
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from stowray.pipeline.prewarm_plan import Limits, Wave
    from stowray.pipeline.prewarm_survey import NodeSurvey, PlannedImage
    from stowray.pipeline.quota import Quota

# What programs and libraries unpack to, as a multiple of their layers' size under gzip. Unpacked
# sizes are not known before the layers are.
UNPACKED_RATIO: Final = 2.5


@dataclass(frozen=True, slots=True)
class ClusterPlan:
    """What the whole run would do; ``quota`` is what each registry said that it still allows."""

    nodes: tuple[NodePlan, ...]
    images: tuple[PlannedImage, ...]
    blobs: tuple[BlobPlan, ...]
    origin_bytes: int
    peer_bytes: int
    requests: Mapping[str, int]
    quota: Mapping[str, Quota]
    seconds: float
    rates: Rates
    warnings: tuple[str, ...] = ()

    @property
    def accepted(self) -> tuple[str, ...]:
        """Return the names of the nodes that take part."""
        return tuple(node.name for node in self.nodes if not node.is_refused)

    @property
    def refused(self) -> tuple[NodePlan, ...]:
        """Return the nodes that are left out, each with its ``error``."""
        return tuple(node for node in self.nodes if node.is_refused)

    @property
    def manifest_requests(self) -> int:
        """Return how many manifests are asked for at all registries together."""
        return sum(self.requests.values())

    @property
    def is_complete(self) -> bool:
        """Return whether every node has everything already."""
        return not any(node.need_bytes or node.snapshots_need or node.error for node in self.nodes)

    @classmethod
    def of(
        cls,
        surveys: Sequence[NodeSurvey],
        images: Sequence[PlannedImage],
        limits: Limits,
        quota: Mapping[str, Quota] | None = None,
        *,
        waves: Sequence[Wave] = (),
        requests: Mapping[str, int] | None = None,
        rates: Rates | None = None,
    ) -> ClusterPlan:
        """Return the plan for these nodes, in their order.

        ``requests`` are those for manifests per registry; without it each reference costs one, and
        one more for each platform when it names an index.
        """
        rates = _within(rates or Rates(), limits)
        known = {(image.reference, image.digest): image for image in images}
        writers = _writers(surveys)
        nodes = _with_writers([_look(survey, known, writers) for survey in surveys])
        states = [
            _state(survey, node)
            for survey, node in zip(surveys, nodes, strict=True)
            if not node.is_refused
        ]
        sizes = {digest: size for image in images for digest, size in image.blobs.items()}
        parts = expand_waves(waves, len(states))
        origin = _from_origin(states, parts, sizes, limits)
        wave_of = {states[n].name: number for number, part in enumerate(parts) for n in part}
        done = tuple(_sourced(node, origin, wave_of.get(node.name, 0)) for node in nodes)
        requests = manifest_requests(images) if requests is None else requests
        return cls(
            nodes=done,
            images=tuple(images),
            blobs=_blobs(sizes, states, done),
            origin_bytes=sum(node.origin_bytes for node in done),
            peer_bytes=sum(node.peer_bytes for node in done),
            requests=dict(requests),
            quota=dict(quota or {}),
            seconds=_seconds(done, limits, rates, len(parts)),
            rates=rates,
            warnings=(*_quota_warnings(requests, quota or {}), *_node_warnings(done)),
        )

    def results(self) -> list[dict[str, Any]]:
        """Return an object for each reference and node, in the order of the plan."""
        known = {(image.reference, image.digest): image for image in self.images}
        lines: list[dict[str, Any]] = []
        for reference in dict.fromkeys(image.reference for image in self.images):
            for node in self.nodes:
                if node.error is not None:
                    lines.append({"reference": reference, "node": node.name, "error": node.error})
                elif reference in node.wants:
                    lines.append(_line(known[reference, node.wants[reference]], node))
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the totals as plain values: what :meth:`results` does not say."""
        return {
            "nodes": len(self.nodes),
            "refused": [node.name for node in self.refused],
            "blobs": [asdict(blob) for blob in self.blobs],
            "origin_bytes": self.origin_bytes,
            "peer_bytes": self.peer_bytes,
            "manifest_requests": dict(self.requests),
            "quota": {registry: quota.to_dict() for registry, quota in self.quota.items()},
            "seconds": round(self.seconds, 1),
            "rates": asdict(self.rates),
            "disk": [
                {
                    "node": node.name,
                    "needed": node.disk_needed,
                    "free": node.disk_free,
                    "shares_with": node.shares_with,
                }
                for node in self.nodes
            ],
            "warnings": list(self.warnings),
        }


def _writers(surveys: Sequence[NodeSurvey]) -> dict[str, str]:
    writers: dict[str, str] = {}
    for survey in surveys:
        if survey.store and survey.error is None:
            writers.setdefault(survey.store, survey.name)
    return writers


def _look(
    survey: NodeSurvey, images: Mapping[tuple[str, str], PlannedImage], writers: Mapping[str, str]
) -> NodePlan:
    """Return what a node has and needs, and whether it has the room; sources come later."""
    if survey.error is not None:
        return NodePlan(survey.name, survey.platform, error=survey.error, wants=survey.wants)
    wanted = [images[wish] for wish in survey.wants.items()]
    writer = writers.get(survey.store, survey.name)
    shares_with = writer if writer != survey.name else ""
    blobs = []
    for digest, size in {d: s for image in wanted for d, s in image.blobs.items()}.items():
        here = min(survey.partial.get(digest, 0), size)
        state = "have" if digest in survey.present else "partial" if here else "need"
        rest = 0 if state == "have" or shares_with else size - here
        blobs.append(BlobNeed(digest, size, state, rest, shared=bool(shares_with)))
    layers = {layer.chain_id: layer for image in wanted for layer in image.layers}
    unpacked = [layer.size for chain, layer in layers.items() if chain not in survey.chains]
    need = sum(blob.bytes for blob in blobs)
    least = 0 if shares_with else need + sum(unpacked)
    likely = 0 if shares_with else need + int(sum(unpacked) * UNPACKED_RATIO)
    free = max(0, survey.free - survey.reserve)
    node = NodePlan(
        name=survey.name,
        platform=survey.platform,
        shares_with=shares_with,
        blobs=tuple(blobs),
        snapshots_have=len(layers) - len(unpacked),
        snapshots_need=len(unpacked),
        need_bytes=need,
        disk_least=least,
        disk_needed=likely,
        disk_free=free,
        wants=survey.wants,
        chains=survey.chains & layers.keys(),
    )
    return _with_room(node, survey)


def _with_room(node: NodePlan, survey: NodeSurvey) -> NodePlan:
    if node.disk_least > node.disk_free:
        reason = (
            f"the images need at least {node.disk_least} bytes, {survey.free} are free and "
            f"{survey.reserve} stay in reserve: free space (`stowray gc`) or give another --store"
        )
        return replace(node, error=describe(StorageError(node.name, reason)))
    if node.disk_needed > node.disk_free:
        return replace(
            node,
            warning=f"{node.name}: the images may need {node.disk_needed} bytes unpacked, "
            f"{node.disk_free} are free",
        )
    return node


def _with_writers(nodes: Sequence[NodePlan]) -> list[NodePlan]:
    """Refuse also those nodes whose store another node, refused itself, would have filled."""
    refused = {node.name: node.error for node in nodes if node.is_refused}
    return [
        replace(node, error=refused[node.shares_with]) if node.shares_with in refused else node
        for node in nodes
    ]


def _state(survey: NodeSurvey, node: NodePlan) -> NodeState:
    missing = frozenset(blob.digest for blob in node.blobs if blob.state != "have")
    return NodeState(
        survey.name, missing, survey.present, survey.store, survey.address, survey.serves
    )


def _from_origin(
    states: Sequence[NodeState],
    parts: Sequence[range],
    sizes: Mapping[str, int],
    limits: Limits,
) -> dict[str, dict[str, int]]:
    """Return, per node and blob, the bytes that the trees have it read from the origin."""
    origin: dict[str, dict[str, int]] = defaultdict(dict)
    blobs = [Blob(digest, size) for digest, size in sizes.items()]
    holders: list[NodeState] = []
    for part in parts:
        wave = [states[number] for number in part]
        # Those that come later give what they have already, and get nothing yet.
        later = [replace(state, missing=frozenset()) for state in states[part.stop :]]
        trees = spread(blobs, [*holders, *wave, *later], fan_out=limits.fan_out)
        for tree in trees.trees:
            if tree.order and not tree.holders:
                own = origin[trees.nodes[tree.order[0]]]
                own[tree.digest] = own.get(tree.digest, 0) + tree.stripe.length
        holders += [
            replace(state, missing=frozenset(), present=state.present | state.missing)
            for state in wave
        ]
    return origin


def _sourced(node: NodePlan, origin: Mapping[str, Mapping[str, int]], wave: int) -> NodePlan:
    """Return ``node`` with where its blobs come from."""
    if node.is_refused:
        return node
    own = origin.get(node.name, {})
    blobs = tuple(
        replace(blob, origin_bytes=min(own.get(blob.digest, 0), blob.bytes)) for blob in node.blobs
    )
    upstream = sum(blob.origin_bytes for blob in blobs)
    return replace(
        node,
        wave=wave,
        blobs=blobs,
        origin_bytes=upstream,
        peer_bytes=node.need_bytes - upstream,
    )


def _blobs(
    sizes: Mapping[str, int], states: Sequence[NodeState], nodes: Sequence[NodePlan]
) -> tuple[BlobPlan, ...]:
    have: Counter[str] = Counter()
    need: Counter[str] = Counter()
    total: Counter[str] = Counter()
    origin: Counter[str] = Counter()
    sharing = {node.name for node in nodes if node.shares_with}
    for state in states:
        if state.name not in sharing:
            have.update(state.present & sizes.keys())
            need.update(state.missing)
    for node in nodes:
        for blob in () if node.is_refused else node.blobs:
            total[blob.digest] += blob.bytes
            origin[blob.digest] += blob.origin_bytes
    return tuple(
        BlobPlan(
            digest,
            size,
            have[digest],
            need[digest],
            origin[digest],
            total[digest] - origin[digest],
        )
        for digest, size in sorted(sizes.items(), key=lambda entry: (-entry[1], entry[0]))
    )


def _seconds(nodes: Sequence[NodePlan], limits: Limits, rates: Rates, waves: int) -> float:
    """Return about how long it takes: the slowest of registry, network and disk in each wave."""
    seconds = 0.0
    for number in range(waves):
        wave = [node for node in nodes if node.wave == number and not node.is_refused]
        if not wave:
            continue
        unpack = max(node.disk_least - node.need_bytes for node in wave)
        turns = math.ceil(len(wave) / limits.nodes_at_once) if limits.nodes_at_once else 1
        per_node = max(max(node.need_bytes for node in wave) / rates.node, unpack / rates.unpack)
        origin = sum(node.origin_bytes for node in wave) / rates.origin
        seconds += max(origin, per_node * turns)
    return seconds + rates.start_seconds if nodes else 0.0


def _within(rates: Rates, limits: Limits) -> Rates:
    if not limits.bandwidth:
        return rates
    node = min(rates.node, float(limits.bandwidth))
    return Rates(rates.origin, node, rates.unpack, rates.start_seconds)


def _quota_warnings(requests: Mapping[str, int], quota: Mapping[str, Quota]) -> list[str]:
    return [
        f"{registry}: the run asks for {count} manifests, and {quota[registry]}"
        for registry, count in requests.items()
        if registry in quota and count > quota[registry].remaining
    ]


def _node_warnings(nodes: Sequence[NodePlan]) -> list[str]:
    return [node.warning for node in nodes if node.warning]


def _line(image: PlannedImage, node: NodePlan) -> dict[str, Any]:
    needs = [blob for blob in node.blobs if blob.digest in image.blobs]
    committed = [layer.chain_id in node.chains for layer in image.layers]
    return {
        "reference": image.reference,
        "node": node.name,
        "digest": image.digest,
        "resolved": image.resolved,
        "platform": image.platform,
        "wave": node.wave,
        "blobs": [
            {
                "digest": blob.digest,
                "size": blob.size,
                "blob": blob.state,
                "source": blob.source,
                "fetch_bytes": blob.bytes,
            }
            for blob in needs
        ],
        "snapshot": "have" if all(committed) else "need",
        "fetch_bytes": sum(blob.bytes for blob in needs),
        "disk_needed": node.disk_needed,
        "disk_free": node.disk_free,
        "shares_with": node.shares_with,
    }
