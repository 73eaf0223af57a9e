"""What this process knows to be secret, so that no text of others shows it.

A registry, a realm or a proxy may quote in an answer whatever it was ever told. Invariant: text
that passes :meth:`KnownSecrets.redact` has none of what was learned before, in no spelling that
HTTP or JSON give it; secrets are kept in memory only, not more of them than a long run needs.
"""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Final
from urllib.parse import quote, quote_plus

from stowray.pipeline.errors import UsageError
from stowray.pipeline.redact import (
    DETAIL_LIMIT,
    form_secrets,
    public_url,
    query_secrets,
    redact_text,
    sent_secrets,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

# Shorter ones are in every second word.
SHORTEST: Final = 4
# Logins, tokens and the like; signed URLs are many more and are quoted at once or never.
LOGIN_LIMIT: Final = 4096
SIGNATURE_LIMIT: Final = 1024
# What requests carry in the open; whatever else a file adds may be a secret.
_OPEN_HEADERS = frozenset({"accept", "accept-encoding", "content-type", "range", "user-agent"})
_SHORTEST_HEADER: Final = 8


class KnownSecrets:
    """Secrets of one process; thread-safe. ``sources`` are asked when text is to be shown.

    A source knows secrets that were not sent yet: those of files that are read when a registry asks
    for a login, which it may know from an earlier run.
    """

    def __init__(self, *sources: Callable[[], Iterable[str]]) -> None:
        self._sources = list(sources)
        self._lock = threading.Lock()
        self._logins: OrderedDict[str, None] = OrderedDict()
        self._forms: tuple[str, ...] | None = None
        self._asked = False
        self._signatures: OrderedDict[str, None] = OrderedDict()

    def add_source(self, source: Callable[[], Iterable[str]]) -> None:
        """Ask ``source`` as well when text is to be shown."""
        self._sources.append(source)

    def learn(self, *secrets: str) -> None:
        """Take note of logins or tokens."""
        with self._lock:
            self._keep_logins(secrets)

    def learn_request(
        self, url: str, headers: Iterable[tuple[str, str]], body: bytes | None
    ) -> None:
        """Take note of what a request is about to carry."""
        signed = query_secrets(url) if "?" in url else ()
        logins: list[str] = []
        for name, value in headers:
            if name.lower() in ("authorization", "proxy-authorization"):
                logins += sent_secrets(value)
            elif name.lower() not in _OPEN_HEADERS and len(value) >= _SHORTEST_HEADER:
                logins.append(value)
        if body:
            logins += form_secrets(body)
        if signed or logins:
            with self._lock:
                self._keep_logins(logins)
                _keep(self._signatures, signed, SIGNATURE_LIMIT)

    def _keep_logins(self, secrets: Iterable[str]) -> None:
        if _keep(self._logins, secrets, LOGIN_LIMIT):
            self._forms = None

    def redact(self, text: str, limit: int = DETAIL_LIMIT) -> str:
        """Return foreign text fit to be shown; see :func:`stowray.pipeline.redact.redact_text`."""
        if not text:
            return text
        self._ask_sources()
        with self._lock:
            signatures = list(self._signatures)
        forms = {*self._login_forms(), *(form for one in signatures for form in spellings(one))}
        return redact_text(text, tuple(sorted(forms, key=len, reverse=True)), limit)

    def url(self, url: str) -> str:
        """Return what of a URL that others named may be shown: no query, and no login in its path.

        Cheap enough for every redirect.
        """
        if not self._asked:
            self._ask_sources()
        shown = public_url(url)
        for form in self._login_forms():
            shown = shown.replace(form, "REDACTED")
        return shown

    def _ask_sources(self) -> None:
        self._asked = True
        for source in self._sources:
            try:
                self.learn(*source())
            except UsageError:
                # A file that cannot be read gave nobody a login; whoever needs it says so.
                continue

    def _login_forms(self) -> tuple[str, ...]:
        """Return all spellings of all logins, the longest first."""
        with self._lock:
            if self._forms is None:
                forms = {form for secret in self._logins for form in spellings(secret)}
                self._forms = tuple(sorted(forms, key=len, reverse=True))
            return self._forms


def spellings(secret: str) -> set[str]:
    """Return ``secret`` as it stands in URLs, forms and JSON too."""
    forms = {secret, quote(secret, safe=""), quote_plus(secret), json.dumps(secret)[1:-1]}
    # Base64 is quoted with and without its padding.
    forms |= {form.rstrip("=") for form in forms}
    return {form for form in forms if len(form) >= SHORTEST}


def _keep(table: OrderedDict[str, None], secrets: Iterable[str], limit: int) -> bool:
    """Put ``secrets`` at the table's end; return whether one of them is new."""
    before = len(table)
    for secret in secrets:
        if len(secret) >= SHORTEST:
            table[secret] = None
            table.move_to_end(secret)
    is_new = len(table) > before
    while len(table) > limit:
        table.popitem(last=False)
    return is_new
