"""What a library's error, or the watchdog's verdict, means to us.

Invariant: everything that a peer can cause becomes one of our errors, with nothing secret in it;
what no peer can cause is a mistake of ours and passes as it is.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

from stowray.pipeline.errors import (
    CancelledError,
    RegistryError,
    StowrayError,
    UnavailableError,
)
from stowray.pipeline.http1 import CutError, MalformedError
from stowray.pipeline.redact import host_of

if TYPE_CHECKING:
    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.watchdog import Watch

_VERDICTS = {
    "silent": ("TIMEOUT", "no answer in time"),
    "slow": ("SLOW", "the body comes too slowly"),
    "closed": ("CLOSED", "the transport was closed"),
}

NOT_TLS = "NOT_TLS"
# What OpenSSL makes of a plain answer to the first words of TLS.
_PLAIN_ANSWERS = frozenset({"WRONG_VERSION_NUMBER", "HTTP_REQUEST"})
_NOT_TLS_HINT = "no TLS is spoken there; if plain http is meant, give --plain-http {}"


def verdict(watch: Watch) -> StowrayError:
    """Return the error for an exchange that the watchdog ended."""
    if watch.verdict == "cancelled":
        return CancelledError(watch.url)
    return UnavailableError(watch.url, 0, *_VERDICTS[watch.verdict])


def translated(error: Exception, watch: Watch) -> StowrayError:
    """Return the error of ours that says what a library's error means."""
    if watch.verdict:
        return verdict(watch)
    if isinstance(error, StowrayError):
        return error
    if not isinstance(error, CutError | MalformedError | OSError | ValueError):
        # Nothing that a peer can cause: a mistake of ours must not look like a bad network.
        raise error
    return _translated(error, watch.url, watch.secrets)


def is_stale(error: Exception) -> bool:
    """Return whether the server closed a kept-alive connection before it saw the request."""
    return isinstance(error, ConnectionResetError | BrokenPipeError)


def _translated(error: Exception, url: str, secrets: KnownSecrets) -> StowrayError:
    detail = secrets.redact(str(error.args[-1] if error.args else error))
    # Without the module there is no error of it.
    ssl = sys.modules.get("ssl")
    if ssl is not None and isinstance(error, ssl.SSLCertVerificationError):
        reason = secrets.redact(error.verify_message or str(error))
        return RegistryError(url, 0, "TLS", f"the certificate is not trusted: {reason}")
    if isinstance(error, TimeoutError):
        return UnavailableError(url, 0, "TIMEOUT", f"no answer from {host_of(url)} in time")
    if ssl is not None and isinstance(error, ssl.SSLError):
        if error.reason in _PLAIN_ANSWERS:
            return RegistryError(url, 0, NOT_TLS, _NOT_TLS_HINT.format(host_of(url)))
        return UnavailableError(url, 0, "TLS", detail)
    if isinstance(error, MalformedError):
        return UnavailableError(url, 0, "PROTOCOL", detail)
    if isinstance(error, ValueError):
        return RegistryError(url, 0, "URL", detail)
    return UnavailableError(url, 0, "CUT", detail)
