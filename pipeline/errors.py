"""Every error that leaves Stowray, classed by what the caller can do next.

Invariant: all fields of an error go to ``super().__init__`` as plain ``str``/``int`` values and the
sentence is made in ``__str__``, so that each class survives pickling between processes. Causes are
text, because ``__cause__`` does not cross a process boundary. Retry decisions read ``retryable``.
"""

from __future__ import annotations

from typing import ClassVar


class StowrayError(Exception):
    """Base of all errors; ``exit_code`` is the command's exit status for it."""

    retryable: ClassVar[bool] = False
    exit_code: ClassVar[int] = 1

    def __str__(self) -> str:
        return " ".join(str(part) for part in self.args)


class UsageError(StowrayError):
    """An argument, option or setting cannot be used as given; fields ``(subject, reason)``."""

    exit_code = 2

    def __init__(self, subject: str, reason: str) -> None:
        super().__init__(subject, reason)
        self.subject = subject
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.subject}: {self.reason}"


class InvalidReferenceError(StowrayError):
    """The text is not an image reference; fields ``(text, reason)``."""

    exit_code = 2

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid reference {self.text!r}: {self.reason}"


class InvalidPlatformError(StowrayError):
    """The text is not a platform selector; fields ``(text, reason)``."""

    exit_code = 2

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid platform {self.text!r}: {self.reason}"


class InvalidDigestError(StowrayError):
    """The text is not a digest; fields ``(text, reason)``."""

    exit_code = 2

    def __init__(self, text: str, reason: str) -> None:
        super().__init__(text, reason)
        self.text = text
        self.reason = reason

    def __str__(self) -> str:
        return f"invalid digest {self.text!r}: {self.reason}"


class NotFoundError(StowrayError):
    """No such manifest, blob, reference or snapshot; fields ``(what, where, advice)``."""

    exit_code = 3

    def __init__(self, what: str, where: str, advice: str = "") -> None:
        super().__init__(what, where, advice)
        self.what = what
        self.where = where
        self.advice = advice

    def __str__(self) -> str:
        found = f"{self.what} not found in {self.where}"
        return f"{found}: {self.advice}" if self.advice else found


class PlatformError(StowrayError):
    """The image is not offered for the platform; fields ``(wanted, offered)``, both text."""

    exit_code = 3

    def __init__(self, wanted: str, offered: str) -> None:
        super().__init__(wanted, offered)
        self.wanted = wanted
        self.offered = offered

    def __str__(self) -> str:
        return (
            f"no image for platform {self.wanted}; offered: {self.offered or 'none'} "
            "(choose one with --platform)"
        )


class UnauthorizedError(StowrayError):
    """The registry refuses these credentials; fields ``(registry, scope, detail)``."""

    exit_code = 4

    def __init__(self, registry: str, scope: str, detail: str = "") -> None:
        super().__init__(registry, scope, detail)
        self.registry = registry
        self.scope = scope
        self.detail = detail

    def __str__(self) -> str:
        detail = f": {self.detail}" if self.detail else ""
        return (
            f"{self.registry} refuses access to {self.scope or 'this resource'}{detail} "
            "(log in with `podman login` or `docker login`, or give --authfile)"
        )


class RegistryError(StowrayError):
    """Any other answer of a registry; fields ``(url, status, code, detail)``, the URL redacted."""

    exit_code = 6

    def __init__(self, url: str, status: int, code: str, detail: str) -> None:
        super().__init__(url, status, code, detail)
        self.url = url
        self.status = status
        self.code = code
        self.detail = detail

    def __str__(self) -> str:
        status = f" answered {self.status}" if self.status else ""
        code = f" {self.code}" if self.code else ""
        detail = f": {self.detail}" if self.detail else ""
        return f"{self.url}{status}{code}{detail}"


class UnavailableError(RegistryError):
    """Refused, timed out, cut off, rate-limited or a server's own fault: worth another try."""

    retryable = True


class DeadlineError(StowrayError):
    """A wait reached its deadline; fields ``(what, seconds)``."""

    retryable = True
    exit_code = 6

    def __init__(self, what: str, seconds: float) -> None:
        super().__init__(what, seconds)
        self.what = what
        self.seconds = seconds

    def __str__(self) -> str:
        return f"{self.what}: no end after {self.seconds:g} s"


class NodeError(StowrayError):
    """A node, actor or worker process cannot do its part; fields ``(node, reason)``."""

    retryable = True
    exit_code = 6

    def __init__(self, node: str, reason: str) -> None:
        super().__init__(node, reason)
        self.node = node
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.node}: {self.reason}"


class ContentError(StowrayError):
    """The bytes are not what was promised: never committed, never retried blindly."""

    exit_code = 5


class DigestMismatchError(ContentError):
    """Fields ``(what, expected, actual)``; ``what`` names the blob or layer."""

    def __init__(self, what: str, expected: str, actual: str) -> None:
        super().__init__(what, expected, actual)
        self.what = what
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected}, got {self.actual}"


class SizeMismatchError(ContentError):
    """Fields ``(what, expected, actual)``, sizes in bytes."""

    def __init__(self, what: str, expected: int, actual: int) -> None:
        super().__init__(what, expected, actual)
        self.what = what
        self.expected = expected
        self.actual = actual

    def __str__(self) -> str:
        return f"{self.what}: expected {self.expected} bytes, got {self.actual}"


class ManifestError(ContentError):
    """A manifest, index or config breaks its rules; fields ``(digest, reason)``."""

    def __init__(self, digest: str, reason: str) -> None:
        super().__init__(digest, reason)
        self.digest = digest
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.digest}: {self.reason}"


class LayerError(ContentError):
    """A layer cannot be applied as it stands; fields ``(entry, reason)``, already escaped."""

    def __init__(self, entry: str, reason: str) -> None:
        super().__init__(entry, reason)
        self.entry = entry
        self.reason = reason

    def __str__(self) -> str:
        return f"layer entry {self.entry}: {self.reason}" if self.entry else f"layer: {self.reason}"


class StorageError(StowrayError):
    """The disk, a lock or a permission stands in the way; fields ``(path, reason)``."""

    exit_code = 7

    def __init__(self, path: str, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


class CancelledError(StowrayError):
    """The caller stopped the work; field ``what``. What was fetched is kept for the next run."""

    exit_code = 130

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        return f"{self.what}: cancelled"


def escape(text: str | bytes) -> str:
    """Return ``text`` with control characters and undecodable bytes escaped for display."""
    if isinstance(text, bytes):
        text = text.decode("utf-8", "backslashreplace")
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in text
    )


def to_wire(error: StowrayError) -> tuple[str, list[str | int | float]]:
    """Return ``(class name, fields)``, plain data that may cross to another process."""
    return type(error).__name__, list(error.args)


def from_wire(name: str, fields: list[str | int | float]) -> StowrayError:
    """Make the error again that :func:`to_wire` described; an unknown class becomes a NodeError."""
    kind = globals().get(name)
    if isinstance(kind, type) and issubclass(kind, StowrayError):
        return kind(*fields)
    return NodeError("worker", f"{name}: {' '.join(str(field) for field in fields)}")


def describe(error: StowrayError) -> dict[str, str | bool]:
    """Return the ``error`` object of a result line: ``{type, message, retryable}``."""
    return {
        "type": type(error).__name__,
        "message": str(error),
        "retryable": error.retryable,
    }
