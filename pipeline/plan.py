"""What a pull will do, as data: a DAG of fetch, stage and commit steps.

Invariant: a plan is a pure function of the image and of what is present. It never fetches a blob
that is here, never stages a layer whose chain is committed, and a commit always waits for the
fetch of its blob, the staging of its layer and the commit below it.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.image import Descriptor, Image

StepKind = Literal["fetch", "stage", "commit"]


@dataclass(frozen=True, slots=True)
class Step:
    """One unit of work.

    ``needs`` names the steps that must be done before this one starts; ``follows`` names the fetch
    that must only have been submitted, because a stage reads the blob while it grows.
    """

    id: str
    kind: StepKind
    descriptor: Descriptor
    needs: tuple[str, ...] = ()
    follows: str | None = None
    diff_id: Digest | None = None
    chain_id: Digest | None = None
    parent: Digest | None = None


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """What one layer of the image needs, in chain order (base layer first)."""

    descriptor: Descriptor
    diff_id: Digest
    chain_id: Digest
    blob_present: bool
    committed: bool


@dataclass(frozen=True, slots=True)
class Plan:
    """All steps of one pull, fetches largest first, commits in chain order."""

    layers: tuple[LayerPlan, ...]
    steps: tuple[Step, ...]
    by_id: dict[str, Step] = field(compare=False, repr=False)

    @property
    def fetch_bytes(self) -> int:
        """Return the bytes still to be fetched."""
        return sum(step.descriptor.size for step in self.steps if step.kind == "fetch")

    @property
    def is_complete(self) -> bool:
        """Return whether nothing is left to do."""
        return not self.steps


def make_plan(
    image: Image,
    *,
    has_blob: Callable[[Digest, int], bool],
    has_chain: Callable[[Digest], bool],
    unpack: bool = True,
) -> Plan:
    """Return the plan that brings ``image`` from what is present to complete.

    ``has_blob(digest, size)`` and ``has_chain(chain_id)`` tell what is present and proven; a chain
    ID counts as present only with all below it (image-spec, config.md, "Layer ChainID"). With
    ``unpack=False`` only blobs are planned.
    """
    layers = _layer_plans(image, has_blob, has_chain, unpack=unpack)
    fetches = _fetch_steps([image.manifest.config], layers, has_blob)
    steps: list[Step] = list(fetches.values())
    if unpack:
        steps += _unpack_steps(layers, fetches)
    return Plan(layers=layers, steps=tuple(steps), by_id={step.id: step for step in steps})


def _layer_plans(
    image: Image,
    has_blob: Callable[[Digest, int], bool],
    has_chain: Callable[[Digest], bool],
    *,
    unpack: bool,
) -> tuple[LayerPlan, ...]:
    chain_ids = image.chain_ids
    # The topmost committed chain ID answers for every one below it: look from the top down.
    committed = 0
    if unpack:
        for depth in range(len(chain_ids), 0, -1):
            if has_chain(chain_ids[depth - 1]):
                committed = depth
                break
    return tuple(
        LayerPlan(
            descriptor=descriptor,
            diff_id=diff_id,
            chain_id=chain_id,
            blob_present=has_blob(descriptor.digest, descriptor.size),
            committed=index < committed,
        )
        for index, (descriptor, diff_id, chain_id) in enumerate(
            zip(image.layers, image.diff_ids, chain_ids, strict=True)
        )
    )


def _fetch_steps(
    others: Iterable[Descriptor],
    layers: tuple[LayerPlan, ...],
    has_blob: Callable[[Digest, int], bool],
) -> dict[Digest, Step]:
    missing = {
        layer.descriptor.digest: layer.descriptor for layer in layers if not layer.blob_present
    }
    for descriptor in others:
        if not has_blob(descriptor.digest, descriptor.size):
            missing.setdefault(descriptor.digest, descriptor)
    # Longest first: the largest blob is the critical path, and it must not wait behind small ones.
    ordered = sorted(missing.values(), key=lambda descriptor: -descriptor.size)
    return {
        descriptor.digest: Step(
            id=f"fetch:{descriptor.digest}", kind="fetch", descriptor=descriptor
        )
        for descriptor in ordered
    }


def stage_id(diff_id: Digest | str, blob: Digest | str) -> str:
    """Return the ID of the step that stages ``blob`` as the layer ``diff_id``."""
    return f"stage:{diff_id}:{blob}"


def _unpack_steps(layers: tuple[LayerPlan, ...], fetches: dict[Digest, Step]) -> list[Step]:
    stages: dict[str, Step] = {}
    commits: list[Step] = []
    parent: Digest | None = None
    below: str | None = None
    for layer in layers:
        fetch = fetches.get(layer.descriptor.digest)
        onto = parent
        if layer.committed:
            parent = layer.chain_id
            if fetch is None:
                continue
        # By diff ID *and* blob: two blobs may claim one diff ID, and each has to prove it, also
        # where the tree is there already.
        stage = stages.setdefault(
            stage_id(layer.diff_id, layer.descriptor.digest),
            Step(
                id=stage_id(layer.diff_id, layer.descriptor.digest),
                kind="stage",
                descriptor=layer.descriptor,
                follows=fetch.id if fetch else None,
                diff_id=layer.diff_id,
                # Where the tree goes first: it may be there, settled onto that, already.
                parent=onto,
            ),
        )
        if layer.committed:
            continue
        needs = [stage.id]
        if fetch:
            needs.append(fetch.id)
        if below:
            needs.append(below)
        commit = Step(
            id=f"commit:{layer.chain_id}",
            kind="commit",
            descriptor=layer.descriptor,
            needs=tuple(needs),
            diff_id=layer.diff_id,
            chain_id=layer.chain_id,
            parent=parent,
        )
        commits.append(commit)
        parent, below = layer.chain_id, commit.id
    # Stages go in the order of the fetches they follow, so that a pool with fewer stagers than
    # fetchers never holds a stager for a fetch that has not begun.
    ordered = sorted(stages.values(), key=lambda step: -step.descriptor.size)
    return ordered + commits
