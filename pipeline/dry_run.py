"""What a dry run of a pre-warm found out: what would be done, and what could not be.

Invariant: each reference on each node is told once, as planned or as failed; the exit status is
that of the run's report, as for every other command over nodes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from stowray.pipeline.cluster_plan import ClusterPlan
    from stowray.pipeline.prewarm_report import PrewarmReport


@dataclass(frozen=True, slots=True)
class DryRun:
    """The ``plan`` of those that answered, and the ``report``, which has also those that failed."""

    plan: ClusterPlan
    report: PrewarmReport

    @property
    def exit_code(self) -> int:
        """The command's exit status: see ``PrewarmReport.exit_code``."""
        return self.report.exit_code

    @property
    def warnings(self) -> tuple[str, ...]:
        """What is worth knowing, as sentences for people."""
        return (*self.report.warnings, *self.plan.warnings)

    def results(self) -> list[dict[str, Any]]:
        """Return an object for each reference and node, in the order of the plan.

        What failed has ``reference``, ``node`` and ``error``; of what is not wanted somewhere
        nothing is said.
        """
        planned = {(line["reference"], line["node"]): line for line in self.plan.results()}
        lines = []
        for line in self.report.results():
            entry = planned.get((line["reference"], line["node"]))
            if "error" in line:
                # Also of a node that was lost after it had said what it needs.
                lines.append(line)
            elif entry is not None:
                lines.append(entry)
        return lines

    def to_dict(self) -> dict[str, Any]:
        """Return the totals as plain values: what :meth:`results` does not say."""
        return {**self.plan.to_dict(), "warnings": list(self.warnings)}
