"""What registries say beside their answers: warnings for the user, and how much they still allow.

Invariant: each sentence is shown once, and none before it is known which login goes to the host
that says it: the first answer of all may quote that login as well.
"""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from stowray.pipeline.answers import parse_warning
from stowray.pipeline.quota import Quota, read_quota

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.limiter import Limiter
    from stowray.pipeline.response import Response

_WARNS = " warns: "


def unquoted(notice: str) -> str:
    """Return a notice for another process without the registry's own words.

    They may repeat a token that only another process of the run was given and would redact.
    """
    host, warns, _ = notice.partition(_WARNS)
    return f"{host} sends a warning; `stowray resolve` shows it" if warns else notice


class Notices:
    """Reads the side notes of answers; thread-safe."""

    def __init__(
        self, secrets: KnownSecrets, limiter: Limiter, warn: Callable[[str], None] | None
    ) -> None:
        self._secrets = secrets
        self._limiter = limiter
        self._warn = warn
        self._lock = threading.Lock()
        self._shown: set[str] = set()
        self._quotas: dict[str, Quota] = {}
        self._held = threading.local()

    def quota(self, host: str) -> Quota | None:
        """Return how many requests ``host`` still allows, None when it has not told."""
        with self._lock:
            return self._quotas.get(host)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Show only at the end what the answers of this thread warn of."""
        held: list[tuple[str, str]] = []
        self._held.warnings = held
        try:
            yield
        finally:
            self._held.warnings = None
            for host, text in held:
                self._show(host, text)

    def read(self, response: Response, host: str) -> None:
        """Take note of what an answer says on the side."""
        quota = read_quota(response)
        if quota is not None:
            self._heed(quota, host)
        for value in response.header_values("Warning"):
            text = parse_warning(value)
            held: list[tuple[str, str]] | None = getattr(self._held, "warnings", None)
            if text and held is not None:
                held.append((host, text))
            elif text:
                self._show(host, text)

    def _heed(self, quota: Quota, host: str) -> None:
        """Keep what a registry told of its quota; near its end warn and slow down."""
        with self._lock:
            before = self._quotas.get(host)
            self._quotas[host] = quota
        self._limiter.space_documents(host, quota.gap_seconds)
        if quota.is_low and (before is None or not before.is_low or quota.remaining == 0):
            self._tell(f"{host}: {quota}")

    def _show(self, host: str, text: str) -> None:
        self._tell(f"{host}{_WARNS}{self._secrets.redact(text)}")

    def _tell(self, shown: str) -> None:
        if self._warn is None:
            return
        with self._lock:
            if shown in self._shown:
                return
            self._shown.add(shown)
        self._warn(shown)
