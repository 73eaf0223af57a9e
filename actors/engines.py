"""The in-process engine as the actors use it: the same walk and results, another crew.

Invariant: settings, credentials among them, come with each task and are kept in memory only, for
the few that were used last; they never are constructor arguments, which Ray keeps and logs.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict, deque
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.actors.wire import settings_from_dict
from stowray.pipeline.access import Access
from stowray.pipeline.engine import LocalEngine
from stowray.pipeline.fetch import Fetcher
from stowray.pipeline.notices import unquoted
from stowray.pipeline.progress import Progress
from stowray.pipeline.resolve import Request
from stowray.pipeline.source import DiskImage
from stowray.pipeline.store import Store

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.image import Image
    from stowray.pipeline.limiter import SharedLimits
    from stowray.pipeline.origin import Origin
    from stowray.pipeline.progress import Report
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.source import Source

KEPT = 8
KEPT_WARNINGS = 100


class MemberEngine(LocalEngine):
    """What a fetching or resolving actor needs of an engine; ``environment`` is the driver's.

    ``access`` is what was taken along from where its files are not these.
    """

    def __init__(
        self,
        settings: Settings,
        *,
        progress: Progress,
        store: Store,
        environment: Mapping[str, str],
        access: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__(
            settings,
            progress=progress,
            store=store,
            environment=dict(environment),
            access=None if access is None else Access.from_dict(access),
        )
        self._told: deque[tuple[float, str]] = deque(maxlen=KEPT_WARNINGS)

    def side(self, source: Source) -> tuple[Origin, Fetcher]:
        """Return the origin that ``source`` comes from and a fetcher that uses it alone."""
        return self.origins.side(source)

    def run_side(self, source: Source, limits: SharedLimits) -> tuple[Origin, Fetcher]:
        """Return the same for a run, whose nodes have ``limits`` in common."""
        if isinstance(source, DiskImage):
            return self.origins.side(source)
        registry = self.origins.new_registry(limits)
        return registry, Fetcher(self.store, [registry], self.settings.registry)

    def warnings_since(self, moment: float) -> list[str]:
        """Return what registries have warned of since then (monotonic seconds), each once.

        It is everybody's who worked meanwhile: an answer may serve several askers.
        """
        with self._lock:
            told = list(self._told)
        return list(dict.fromkeys(text for when, text in told if when >= moment))

    def _warn(self, text: str) -> None:
        with self._lock:
            self._told.append((time.monotonic(), unquoted(text)))

    def image_for(
        self,
        source: Source,
        options: PullOptions,
        report: Report,
        cancelled: Callable[[], bool],
    ) -> tuple[Image, int]:
        """Return the image and how many manifest requests it took, reporting to the asker only."""
        request = Request(
            reference=source,
            platform=self.platform(options),
            strict=self.settings.resolve.strict_platform,
            policy=options.policy,
            report=report,
            cancelled=cancelled,
        )
        image = self.origins.resolver(source).image(request)
        return image, request.manifest_requests


class NodeEngine(LocalEngine):
    """One pull on a node, its steps carried out by a crew of actors."""

    name = "ray"


class Stores:
    """The stores that a process has opened."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stores: dict[str, Store] = {}

    def get(self, path: str) -> Store:
        """Return the store at ``path``, opened when it is asked for first."""
        with self._lock:
            store = self._stores.get(path)
            if store is None or not store.is_current:
                # Removed meanwhile, by hand or by a test: a new one may stand in its place.
                store = self._stores[path] = Store.open(Path(path))
            return store


class Engines:
    """One engine per store and settings."""

    def __init__(self) -> None:
        self._stores = Stores()
        self._lock = threading.Lock()
        self._engines: OrderedDict[str, MemberEngine] = OrderedDict()

    def get(self, task: Mapping[str, Any]) -> MemberEngine:
        """Return the engine for a task's ``store``, ``settings``, ``environment`` and ``access``.

        The least recently used beyond a few is dropped, not closed: a task may still use it, and
        its connections end with it.
        """
        access = task.get("access")
        about = [task["store"], task["settings"], task["environment"], access]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()
        store = self._stores.get(task["store"])
        with self._lock:
            engine = self._engines.get(key)
            if engine is None or engine.store is not store:
                engine = self._engines[key] = MemberEngine(
                    settings_from_dict(task["settings"]),
                    progress=Progress(),
                    store=store,
                    environment=task["environment"],
                    access=access,
                )
            self._engines.move_to_end(key)
            while len(self._engines) > KEPT:
                self._engines.popitem(last=False)
            return engine
