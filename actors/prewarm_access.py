"""What nodes are told about reaching the registries of a run: read once where the run is driven.

Invariant: files and credential helpers are asked on the driver's machine only, off the run's event
loop; each reference once.
"""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.access import FILE_VARIABLES, access_to, without_files
from stowray.pipeline.credentials import Credentials
from stowray.pipeline.endpoints import Endpoints

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.reference import Reference
    from stowray.pipeline.settings import Settings


class RunAccess:
    """``settings`` and ``environment`` are the driver's; ``for_nodes`` what nodes get of them."""

    def __init__(self, settings: Settings, environment: Mapping[str, str]) -> None:
        self._settings = settings
        self._endpoints = Endpoints(settings.registry, environment)
        self._credentials = Credentials(environment, settings.registry.authfile)
        self._asked: dict[str, asyncio.Task[dict[str, Any]]] = {}
        ca_file = settings.registry.ca_file or environment.get("SSL_CERT_FILE", "")
        self.for_nodes = replace(
            settings, registry=without_files(replace(settings.registry, ca_file=ca_file))
        )
        self.environment = {
            name: value for name, value in environment.items() if name not in FILE_VARIABLES
        }

    async def to(self, reference: Reference) -> dict[str, Any]:
        """Return an :class:`~stowray.pipeline.access.Access` as plain values."""
        asked = self._asked.get(reference.canonical)
        if asked is None:
            asked = self._asked[reference.canonical] = asyncio.ensure_future(self._ask(reference))
        return await asyncio.shield(asked)

    async def _ask(self, reference: Reference) -> dict[str, Any]:
        found = await asyncio.to_thread(access_to, reference, self._endpoints, self._credentials)
        return found.to_dict()


def on_any_node(settings: Settings) -> Settings:
    """Return the settings as they hold on any node: where the store is, is said here."""
    store = settings.store or os.environ.get("STOWRAY_STORE", "")
    if store:
        # Relative to this process's directory, which no other node knows.
        store = str(Path(store).expanduser().absolute())
    return replace(settings, store=store)
