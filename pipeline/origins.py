"""Where an engine's images come from: one registry client for all, each image on disk by itself.

Invariant: every way to an image leads through :meth:`Origins.resolver`, also to one that is in the
store already, so that the policy file is asked each time; nothing is imported or opened before it
is needed.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

from stowray.pipeline.resolve import Resolver
from stowray.pipeline.source import DiskImage

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stowray.pipeline.access import Access
    from stowray.pipeline.fetch import Fetcher
    from stowray.pipeline.limiter import SharedLimits
    from stowray.pipeline.origin import Origin
    from stowray.pipeline.quota import Quota
    from stowray.pipeline.registry import Registry
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.source import Source
    from stowray.pipeline.store import Store


class Origins:
    """Origins, fetchers and resolvers for one store, made when they are asked for; thread-safe.

    ``environment`` decides how registries are reached and who one is to them; ``access`` is what
    was taken along of that from another machine. ``warn`` is given sentences for the user.
    """

    def __init__(
        self,
        settings: Settings,
        store: Store,
        environment: Mapping[str, str],
        warn: Callable[[str], None],
        access: Access | None = None,
    ) -> None:
        self._settings = settings
        self._store = store
        self._environment = environment
        self._warn = warn
        self._access = access
        self._lock = threading.Lock()
        self._sides: dict[str, tuple[Origin, Fetcher]] = {}
        self._resolvers: dict[str, Resolver] = {}
        self._registry: Registry | None = None

    def close(self) -> None:
        """End the connections."""
        with self._lock:
            registry, self._registry = self._registry, None
            self._sides.clear()
            self._resolvers.clear()
        if registry is not None:
            registry.close()

    def resolver(self, source: Source) -> Resolver:
        """Return the resolver for ``source``; UsageError when the policy does not let it pass."""
        self._check_policy(source)
        key = _key(source)
        with self._lock:
            resolver = self._resolvers.get(key)
            if resolver is None:
                resolver = self._resolvers[key] = Resolver(
                    lambda: self.side(source),
                    self._store,
                    ttl_seconds=self._settings.resolve.ttl_seconds,
                )
            return resolver

    def side(self, source: Source) -> tuple[Origin, Fetcher]:
        """Return the origin that ``source`` comes from and a fetcher that uses it."""
        from stowray.pipeline.fetch import Fetcher

        key = _key(source)
        with self._lock:
            side = self._sides.get(key)
            if side is None:
                if isinstance(source, DiskImage):
                    from stowray.pipeline.disk_images import open_disk_image

                    origin = open_disk_image(source)
                else:
                    origin = self._registry = self.new_registry()
                side = self._sides[key] = (
                    origin,
                    Fetcher(self._store, [origin], self._settings.registry),
                )
            return side

    def quota(self, source: Source) -> Quota | None:
        """Return how many requests the registry of ``source`` still allows, if it told us."""
        registry = self._registry
        if registry is None or isinstance(source, DiskImage):
            return None
        return registry.quota(source)

    def new_registry(self, *more: SharedLimits) -> Registry:
        """Return a registry client of its own, which keeps to ``more`` limits as well."""
        from stowray.pipeline.node_limits import NodeLimits
        from stowray.pipeline.registry import Registry

        # Next to the store's locks: whoever shares the store shares what registries are asked.
        limits = list(more)
        if self._store.writable:
            limits.append(NodeLimits(self._store.path / "locks" / "hosts"))
        return Registry(
            self._settings.registry,
            environment=self._environment,
            warn=self._warn,
            shared=limits,
            access=self._access,
        )

    def _check_policy(self, source: Source) -> None:
        """Raise UsageError for what the policy file, if one is set, does not let pass."""
        if not self._settings.registry.policy_file:
            return
        from stowray.pipeline.policy_json import load

        # Read each time: an actor of a session lives longer than a policy may.
        load(self._settings.registry.policy_file, self._environment).check(source)


def _key(source: Source) -> str:
    """Return what tells origins apart: all registries are one, each image on disk is its own."""
    return source.canonical if isinstance(source, DiskImage) else ""
