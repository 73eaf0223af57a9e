"""What a library's error, or the watchdog's verdict, means to us.

Invariant: everything that a peer can cause becomes one of our errors, with nothing secret in it;
what no peer can cause is a mistake of ours and passes as it is.
"""

from __future__ import annotations

from http.client import HTTPException, IncompleteRead
from typing import TYPE_CHECKING

from stowray.pipeline.errors import (
    CancelledError,
    RegistryError,
    StowrayError,
    UnavailableError,
)
from stowray.pipeline.redact import host_of

if TYPE_CHECKING:
    from stowray.pipeline.known_secrets import KnownSecrets
    from stowray.pipeline.watchdog import Watch

_VERDICTS = {
    "silent": ("TIMEOUT", "no answer in time"),
    "slow": ("SLOW", "the body comes too slowly"),
    "closed": ("CLOSED", "the transport was closed"),
}


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
    from urllib3 import exceptions

    if not isinstance(error, exceptions.HTTPError | HTTPException | OSError | ValueError):
        # Nothing that a peer can cause: a mistake of ours must not look like a bad network.
        raise error
    return _translated(error, watch.url, watch.secrets)


def is_stale(error: Exception) -> bool:
    """Return whether the server closed a kept-alive connection before it saw the request."""
    from urllib3.exceptions import ProtocolError

    cause = error.args[1] if isinstance(error, ProtocolError) and len(error.args) > 1 else error
    # http.client.RemoteDisconnected is a ConnectionResetError.
    return isinstance(cause, ConnectionResetError | BrokenPipeError)


def _translated(error: Exception, url: str, secrets: KnownSecrets) -> StowrayError:
    import ssl

    from urllib3 import exceptions

    detail = secrets.redact(str(error.args[-1] if error.args else error))
    inner = error.args[-1] if error.args else None
    for cause in (error, inner, error.__cause__, error.__context__):
        if isinstance(cause, ssl.SSLCertVerificationError):
            reason = secrets.redact(cause.verify_message or str(cause))
            return RegistryError(url, 0, "TLS", f"the certificate is not trusted: {reason}")
    if isinstance(error, exceptions.ProxyError):
        return UnavailableError(url, 0, "PROXY", detail)
    if isinstance(error, exceptions.TimeoutError | TimeoutError):
        return UnavailableError(url, 0, "TIMEOUT", f"no answer from {host_of(url)} in time")
    if isinstance(error, exceptions.SSLError | ssl.SSLError):
        return UnavailableError(url, 0, "TLS", detail)
    if isinstance(error, IncompleteRead) or isinstance(inner, IncompleteRead):
        return UnavailableError(url, 0, "CUT", "the body ended early")
    if isinstance(error, exceptions.ProtocolError):
        code = "CUT"
        if isinstance(inner, HTTPException) and not isinstance(inner, ConnectionError):
            # Bytes that are not HTTP, too many headers, a broken chunk.
            code = "PROTOCOL"
        return UnavailableError(url, 0, code, detail)
    if isinstance(error, exceptions.LocationValueError | ValueError):
        return RegistryError(url, 0, "URL", detail)
    if isinstance(error, exceptions.HTTPError | OSError | HTTPException):
        return UnavailableError(url, 0, "CUT", detail)
    return RegistryError(url, 0, "", detail)
