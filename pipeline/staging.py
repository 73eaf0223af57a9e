"""How a layer's tree is made: staged alone, settled onto what lies below, or staged above it.

Invariant: a tree is published only after its diff ID is proven, and whatever goes wrong (bytes that
prove wrong, a full disk, a cancellation) nothing of the attempt is left behind.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.pipeline.errors import DigestMismatchError, NodeError
from stowray.pipeline.failpoint import failpoint
from stowray.pipeline.layer_trees import LayerRecord
from stowray.pipeline.limits import DEFAULT_LIMITS
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from contextlib import AbstractContextManager
    from pathlib import Path

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.layer import Staged
    from stowray.pipeline.layer_trees import LayerTrees, Workspace
    from stowray.pipeline.limits import LayerLimits

    Read = Callable[[], bytes]
    OpenRead = Callable[[], AbstractContextManager[Read]]

# How often, in bytes of the uncompressed stream, a stage asks how much room there is.
SPACE_EVERY = 8 << 20
# New generations of one blob: each means that a source sent wrong bytes.
TRIES = 8


@dataclass(frozen=True, slots=True)
class LayerSource:
    """Where a layer's stored bytes come from, and how its staging is watched.

    ``open_read`` may be called again: a stage that must begin anew reads from the start. ``report``
    is given the bytes of the uncompressed stream so far. ``interrupt`` makes a read in flight end
    soon, for the stage has failed. ``proven`` tells which blob the bytes that were read are, if
    that is proven.
    """

    open_read: OpenRead
    limits: LayerLimits = DEFAULT_LIMITS
    report: Callable[[int], None] | None = None
    cancelled: Callable[[], bool] | None = None
    interrupt: Callable[[], None] | None = None
    proven: Callable[[], Digest | None] | None = None


class Stager:
    """Makes trees of one format."""

    def __init__(self, trees: LayerTrees) -> None:
        self._trees = trees

    def stage(
        self,
        name: str,
        diff_id: Digest,
        source: LayerSource,
        *,
        parent: Digest | None = None,
        below: Sequence[Path] | None = None,
    ) -> LayerRecord:
        """Stage a layer and publish it as ``name``.

        Without ``below`` it is staged alone and its record notes what depends on the layers below;
        with it (topmost first, possibly none) the tree is right above exactly those trees.
        """
        from stowray.pipeline.ingest_home import GenerationChanged

        for _ in range(TRIES):
            try:
                with self._trees.workspace() as workspace:
                    staged = self._apply(workspace.tree, diff_id, source, below)
                    blob = None if source.proven is None else source.proven()
                    record = LayerRecord.of(staged, parent, blob)
                    self._trees.publish(workspace, name, record)
                    return record
            except GenerationChanged:
                # The bytes so far were wrong; what was made of them is gone with the workspace.
                continue
        raise NodeError(f"layer {diff_id}", f"wrong bytes arrived {TRIES} times in a row")

    def fits(self, name: str, record: LayerRecord, below: Sequence[Path]) -> bool:
        """Return whether a tree that was staged alone is right above ``below`` as it is."""
        from stowray.pipeline.overlay import ChainView
        from stowray.pipeline.reconcile import fits

        with ChainView(below, self._trees.privileged) as view:
            return fits(self._trees.tree(name), record.staged(), view)

    def settle(
        self,
        workspace: Workspace,
        record: LayerRecord,
        name: str,
        *,
        parent: Digest | None,
        below: Sequence[Path],
    ) -> LayerRecord | None:
        """Settle a tree that was staged alone and publish it; None if it must be staged again."""
        failpoint("settle-before")
        if not self._settle(workspace.tree, record.staged(), below):
            return None
        failpoint("settle-after")
        settled = replace(record, parent=parent, notes={})
        self._trees.publish(workspace, name, settled)
        return settled

    @contextmanager
    def fresh(
        self, diff_id: Digest, source: LayerSource, below: Sequence[Path] | None
    ) -> Iterator[Path]:
        """Give a tree made as a commit makes it, which is gone after the block.

        ``below`` None stands for a layer that was staged alone and depends on nothing.
        """
        with self._trees.workspace() as workspace:
            staged = self._apply(workspace.tree, diff_id, source, None)
            if below is None or self._settle(workspace.tree, staged, below):
                yield workspace.tree
                return
        with self._trees.workspace() as workspace:
            self._apply(workspace.tree, diff_id, source, below)
            yield workspace.tree

    def _settle(self, tree: Path, staged: Staged, below: Sequence[Path]) -> bool:
        from stowray.pipeline.overlay import ChainView
        from stowray.pipeline.reconcile import settle

        with ChainView(below, self._trees.privileged) as view:
            return settle(tree, staged, view)

    def _apply(
        self, tree: Path, diff_id: Digest, source: LayerSource, below: Sequence[Path] | None
    ) -> Staged:
        from stowray.pipeline.layer import stage_layer
        from stowray.pipeline.overlay import ChainView

        with ExitStack() as stack:
            lower = None
            if below is not None:
                lower = stack.enter_context(ChainView(below, self._trees.privileged))
            staged = stage_layer(
                stack.enter_context(source.open_read()),
                tree,
                limits=source.limits,
                privileged=self._trees.privileged,
                lower=lower,
                reserve=self._trees.reserve_bytes,
                report=self._watched(tree, source.report),
                cancelled=source.cancelled,
                interrupt=source.interrupt,
                algorithm=diff_id.algorithm,
            )
        if staged.diff_id != diff_id:
            raise DigestMismatchError(f"layer {diff_id}", diff_id, staged.diff_id)
        return staged

    def _watched(self, tree: Path, report: Callable[[int], None] | None) -> Callable[[int], None]:
        """Return a report that stops a stage before the disk is full for everybody."""
        due = SPACE_EVERY

        def watch(size: int) -> None:
            nonlocal due
            if size >= due:
                due = size + SPACE_EVERY
                self._trees.check_reserve(tree)
            if report is not None:
                report(size)

        return watch
