"""What a pre-warm run is to do: which images go where, within which limits.

Invariant: values only; a plan that exists can be carried out as it stands. Nothing here asks a
registry or a cluster. How a plan is read from a file is in ``prewarm_plan_file``.
"""

from __future__ import annotations

import math
from dataclasses import field
from typing import TYPE_CHECKING, Final

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from stowray.pipeline.platform import Platform
    from stowray.pipeline.reference import Reference

RUNTIMES: Final = ("containerd", "podman", "docker")


@dataclass(frozen=True, slots=True)
class ImageWish:
    """An image, and for which platforms; none: each node gets its own."""

    reference: Reference
    platforms: tuple[Platform, ...] = ()

    def for_node(self, platform: Platform) -> Platform | None:
        """Return the platform that a node of ``platform`` gets; None when it gets none.

        Of those wished for, the one that suits the node best.
        """
        if not self.platforms:
            return platform
        ranked = [
            (rank, number)
            for number, wished in enumerate(self.platforms)
            if (rank := platform.rank(wished)) is not None
        ]
        return self.platforms[min(ranked)[1]] if ranked else None


@dataclass(frozen=True, slots=True)
class NodeFacts:
    """What the cluster says of a node."""

    name: str
    node_id: str = ""
    address: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    is_head: bool = False


@dataclass(frozen=True, slots=True)
class NodeSelection:
    """Which nodes: those that have every label and resource and one of the names.

    A label's value may be a list of alternatives. A name is a node's name, ID or address, or a
    pattern with ``*``, ``?`` and ``[...]``, a set of characters.
    """

    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    resources: Mapping[str, float] = field(default_factory=dict)
    names: tuple[str, ...] = ()
    exclude_head: bool = False

    def takes(self, node: NodeFacts) -> bool:
        """Tell whether ``node`` is one of those."""
        if self.exclude_head and node.is_head:
            return False
        if any(node.labels.get(key) not in values for key, values in self.labels.items()):
            return False
        if any(node.resources.get(key, 0.0) < least for key, least in self.resources.items()):
            return False
        return not self.names or any(_names(pattern, node) for pattern in self.names)

    def unmatched(self, nodes: Sequence[NodeFacts]) -> tuple[str, ...]:
        """Return the names that no node has: most likely mistyped, or not yet there."""
        return tuple(
            pattern for pattern in self.names if not any(_names(pattern, node) for node in nodes)
        )


@dataclass(frozen=True, slots=True)
class Limits:
    """How much at a time; ``nodes_at_once`` and ``bandwidth`` (bytes per second) 0: no limit.

    ``bandwidth`` is what one node receives from all its sources together.
    """

    nodes_at_once: int = 0
    origin_connections: int = 16
    fan_out: int = 4
    bandwidth: int = 0


@dataclass(frozen=True, slots=True)
class FailurePolicy:
    """What is put up with; ``deadline_seconds`` 0: none.

    ``minimum_ready`` is the fraction of nodes, 0 to 1, without which the next wave is not begun and
    the run has failed.
    """

    tries: int = 3
    node_timeout_seconds: float = 1800.0
    deadline_seconds: float = 0.0
    minimum_ready: float = 1.0

    def is_enough(self, ready: int, nodes: int) -> bool:
        """Tell whether ``ready`` of ``nodes`` are as many as were asked for."""
        return ready >= math.ceil(self.minimum_ready * nodes - 1e-9)


@dataclass(frozen=True, slots=True)
class Wave:
    """How many nodes, counted from the first, are warm when the wave is over."""

    count: int = 0
    fraction: float = 0.0

    def target(self, nodes: int) -> int:
        """Return the number among ``nodes``; a fraction is rounded up."""
        wanted = self.count or math.ceil(self.fraction * nodes - 1e-9)
        return max(0, min(nodes, wanted))


@dataclass(frozen=True, slots=True)
class PrewarmPlan:
    """All of a plan."""

    images: tuple[ImageWish, ...]
    nodes: NodeSelection = field(default_factory=NodeSelection)
    limits: Limits = field(default_factory=Limits)
    failure: FailurePolicy = field(default_factory=FailurePolicy)
    waves: tuple[Wave, ...] = ()
    deliver: tuple[str, ...] = ()
    lock: str = ""

    def lock_path(self, file: Path | None) -> Path | None:
        """Return where the lock file lies, None for none; beside the plan's ``file``."""
        if not self.lock:
            return None
        from pathlib import Path

        return (file.parent if file is not None else Path()) / self.lock


def expand_waves(waves: Sequence[Wave], nodes: int) -> tuple[range, ...]:
    """Return the nodes of each wave as numbers; together they are all, no wave is empty.

    What the last wave leaves over is a wave of its own.
    """
    expanded: list[range] = []
    start = 0
    for target in [*(wave.target(nodes) for wave in waves), nodes]:
        if target > start:
            expanded.append(range(start, target))
            start = target
    return tuple(expanded)


def _names(pattern: str, node: NodeFacts) -> bool:
    from fnmatch import fnmatchcase

    return any(
        fnmatchcase(name, pattern) for name in (node.name, node.node_id, node.address) if name
    )
