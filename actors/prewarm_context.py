"""What all nodes of a pre-warm run have in common, and what each is told of it.

Invariant: credentials leave here as arguments of calls only, never as those of a constructor or in
an environment, which Ray keeps and logs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stowray.actors.wire import options_to_dict, settings_to_dict
from stowray.pipeline.clock import Boot
from stowray.pipeline.engine import PullOptions

if TYPE_CHECKING:
    from stowray.actors.prewarm_access import RunAccess
    from stowray.actors.prewarm_images import RunImage
    from stowray.actors.prewarm_state import RunState
    from stowray.pipeline.prewarm_plan import PrewarmPlan
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import Settings


@dataclass(slots=True)
class RunContext:
    """A run as its nodes share it; ``nodes`` counts them, ``pulls`` what they were asked for."""

    run: str
    token: str
    plan: PrewarmPlan
    settings: Settings
    access: RunAccess
    state: RunState
    progress: Progress
    resolver: Any
    board: Any
    nodes: int = 1
    pulls: int = 0

    def next_pull(self, node: str) -> str:
        """Return what a pull or delivery on a node is called; none is called like another one."""
        self.pulls += 1
        return f"{self.run}/{node}/{self.pulls}"

    def begin_request(self, node: str, host: str, port: int) -> dict[str, Any]:
        """Return the request of ``NodeActor.begin_run``; to serve at ``host``, port 0: any."""
        return {
            "run": self.run,
            "node": node,
            "token": self.token,
            "settings": settings_to_dict(self.access.for_nodes) | {"node": node},
            "environment": self.access.environment,
            "boot": Boot.read().boot_id,
            "host": host,
            "port": port,
        }

    def lease_terms(self) -> dict[str, Any]:
        """Return who owns the leases of the run, and what it allows together and each node."""
        limits = self.plan.limits
        return {
            "leases": self.resolver,
            "connections": limits.origin_connections,
            "bandwidth": limits.bandwidth,
        }

    async def pull_request(
        self, node: str, run: str, image: RunImage, *, sync: bool
    ) -> dict[str, Any]:
        """Return the request of ``NodeActor.pull`` that brings an image as a part of the run.

        Raises what keeps the driver from knowing how its registry is reached.
        """
        return {
            "run": run,
            "store": "",
            "source": image.reference.to_dict(),
            "image": image.image.to_dict(),
            "documents": image.documents,
            "options": options_to_dict(PullOptions(platform=image.image.platform, sync=sync)),
            "settings": settings_to_dict(self.access.for_nodes) | {"node": node},
            "environment": self.access.environment,
            "access": await self.access.to(image.reference),
            "progress": self.board,
            "nodes": self.nodes,
            "driver": None,
            "spread": {"run": self.run, "image": image.about, **self.lease_terms()},
        }
