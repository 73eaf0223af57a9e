"""What the nodes of a cluster are called: unique names for stores, results and events.

Invariant: no two nodes of a run have one name, and a name once given stays; the name that a node
chose for itself is kept unless another one chose it too. Pure arithmetic.
"""

from __future__ import annotations

import ipaddress
from collections import Counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_SUFFIX = 8


def chosen_name(configured: str, described: Mapping[str, Any], host: str) -> str:
    """Return what a node is called before anybody else's name is looked at.

    ``configured`` by its own environment or settings, else Ray's name for it unless that is only
    its address, else the name of its ``host``.
    """
    if configured:
        return _plain(configured)
    named = str(described.get("NodeName") or "")
    if named and not _is_address(named):
        return _plain(named)
    return _plain(host or str(described.get("NodeManagerHostname") or "node"))


def unique_names(
    nodes: Sequence[tuple[str, str]], taken: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Return each node's name by its ID, for ``(ID, chosen name)`` of each.

    All that chose one name get the beginning of their ID behind it. ``taken`` are the names that
    nodes have already, by ID: they stay.
    """
    taken = dict(taken or {})
    used = set(taken.values())
    counts = Counter(name for node_id, name in nodes if node_id not in taken)
    names = dict(taken)
    for node_id, name in nodes:
        if node_id in names:
            continue
        length = _SUFFIX
        unique = name
        if counts[name] > 1 or name in used:
            unique = f"{name}-{node_id[:length]}"
        while unique in used:
            length += _SUFFIX
            unique = f"{name}-{node_id[:length]}" if length <= len(node_id) else f"{unique}-"
        used.add(unique)
        names[node_id] = unique
    return names


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text.strip("[]"))
    except ValueError:
        return False
    return True


def _plain(name: str) -> str:
    """Return ``name`` as one path component: it stands for ``{node}`` in the store's path."""
    kept = "".join(
        letter if letter.isprintable() and letter not in "/\\ " else "_" for letter in name
    )
    return kept if kept.strip(".") else "node"
