"""Image references, read as Docker reads them.

Invariant: a ``Reference`` that exists follows the grammar of distribution/reference after Docker's
normalisation: its parts may be used in URLs and keys as they are, and one image has one text.
"""

from __future__ import annotations

import re
from typing import Final

from stowray.pipeline.digest import DISPLAY_LIMIT, Digest
from stowray.pipeline.errors import InvalidDigestError, InvalidReferenceError
from stowray.pipeline.values import dataclass

DEFAULT_REGISTRY: Final = "docker.io"
# Docker Hub as old clients know it; never kept, so that one image has one name.
LEGACY_REGISTRY: Final = "index.docker.io"
# docker.io itself serves a web site; the registry API is at this host.
DEFAULT_WIRE_HOST: Final = "registry-1.docker.io"
OFFICIAL_PREFIX: Final = "library/"
DEFAULT_TAG: Final = "latest"
PATH_LIMIT: Final = 255

# The grammar of distribution/reference, ASCII only. No separator can be read as part of a word, so
# matching takes linear time whatever the text.
_DOMAIN_COMPONENT = r"[a-zA-Z0-9]+(?:-+[a-zA-Z0-9]+)*"
_REGISTRY = re.compile(
    rf"(?:{_DOMAIN_COMPONENT}(?:\.{_DOMAIN_COMPONENT})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?"
)
_PATH_COMPONENT = r"[a-z0-9]+(?:(?:\.|__?|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_PATH_COMPONENT}(?:/{_PATH_COMPONENT})*")
_TAG = re.compile(r"[a-zA-Z0-9_][a-zA-Z0-9_.-]{0,127}")
_IDENTIFIER = re.compile(r"[a-f0-9]{64}")
_DIGEST_START = re.compile(r"(?:sha|md|blake)[0-9]+[a-z0-9+._-]*:", re.IGNORECASE)
_OCTET = r"(?:25[0-5]|2[0-4][0-9]|1[0-9][0-9]|[1-9]?[0-9])"
_IPV4_LOOPBACK = re.compile(rf"127(?:\.{_OCTET}){{3}}")


@dataclass(frozen=True, slots=True)
class Reference:
    """A registry, a repository in it, and a tag or digest or both (then the tag is information)."""

    registry: str
    repository: str
    tag: str | None = None
    digest: Digest | None = None

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Return ``text`` normalised as Docker does it, or raise ``InvalidReferenceError``."""
        name, tag, digest = _split(text)
        registry, repository = _split_registry(name)
        _check(text, registry, repository, tag)
        verified = _digest(text, digest)
        if tag is None and verified is None:
            tag = DEFAULT_TAG
        return cls(registry=registry, repository=repository, tag=tag, digest=verified)

    @property
    def name(self) -> str:
        """Registry and repository: ``docker.io/library/debian``."""
        return f"{self.registry}/{self.repository}"

    @property
    def canonical(self) -> str:
        """The one text of this image: ``NAME@DIGEST``, or ``NAME:TAG`` when there is no digest."""
        return f"{self.name}{self._suffix()}"

    @property
    def familiar_name(self) -> str:
        """The name as people write it: ``debian``, ``user/app``, ``host:5000/app``."""
        if self.registry != DEFAULT_REGISTRY:
            return self.name
        if _split_registry(self.repository) != (DEFAULT_REGISTRY, self.repository):
            # `docker.io/a.b/c`: without the registry its first part would be read as one.
            return self.name
        short = self.repository.removeprefix(OFFICIAL_PREFIX)
        # `library/a/b` must keep its prefix: without it, it would be the repository `a/b`.
        return self.repository if "/" in short else short

    @property
    def familiar(self) -> str:
        """The familiar name with its tag or digest: ``debian:latest``."""
        return f"{self.familiar_name}{self._suffix()}"

    @property
    def target(self) -> str:
        """What is asked for on the wire: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def with_digest(self, digest: Digest) -> Reference:
        """Return this reference pinned to ``digest``; the tag stays as information."""
        return Reference(self.registry, self.repository, self.tag, digest)

    def to_dict(self) -> dict[str, str | None]:
        """Return the fields as plain values."""
        return {
            "registry": self.registry,
            "repository": self.repository,
            "tag": self.tag,
            "digest": None if self.digest is None else str(self.digest),
        }

    @classmethod
    def from_dict(cls, fields: dict[str, str | None]) -> Reference:
        """Return the reference that ``to_dict`` described, checked again."""
        registry, repository = fields["registry"] or "", fields["repository"] or ""
        tag, digest = fields["tag"], fields["digest"]
        text = f"{registry}/{repository}"
        _check(text, registry, repository, tag)
        return cls(registry, repository, tag, _digest(text, digest))

    def __str__(self) -> str:
        return self.canonical

    def _suffix(self) -> str:
        if self.digest is not None:
            return f"@{self.digest}"
        return f":{self.tag or DEFAULT_TAG}"


def describe(text: str) -> dict[str, str | None]:
    """Return how ``text`` is understood, for people and scripts."""
    try:
        reference = Reference.parse(text)
    except InvalidReferenceError as error:
        return {"input": text, "error": str(error)}
    fields = reference.to_dict()
    return {
        "input": text,
        **fields,
        "familiar": reference.familiar_name,
        "canonical": reference.canonical,
    }


def wire_host(registry: str) -> str:
    """Return the ``HOST[:PORT]`` that answers for ``registry``."""
    return DEFAULT_WIRE_HOST if registry == DEFAULT_REGISTRY else registry


def is_loopback(registry: str) -> bool:
    """Tell whether ``registry`` is this host by its name alone, so that plain HTTP leaks nothing.

    ``*.localhost`` is not: not every resolver keeps such names on the host (RFC 6761 is a SHOULD).
    """
    host = registry
    if registry.startswith("["):
        import ipaddress

        literal = registry[1:].partition("]")[0]
        try:
            return ipaddress.IPv6Address(literal).is_loopback
        except ValueError:
            return False
    host = registry.partition(":")[0]
    return host.lower() == "localhost" or _IPV4_LOOPBACK.fullmatch(host) is not None


def redact(text: str) -> str:
    """Return ``text`` shortened and without what may be a credential, for an error about it.

    ``user:password@host/x`` is no reference, but people paste it; so are URLs with signed queries.
    """
    end = len(text)
    while (at := text.rfind("@", 0, end)) >= 0:
        # What follows a reference's own `@` is a digest, whole or broken.
        if _DIGEST_START.match(text, at + 1) is None and at + 1 < len(text):
            text = "***" + text[at:]
            break
        end = at
    head, question, _ = text.partition("?")
    text = f"{head}?***" if question else head
    return text if len(text) <= DISPLAY_LIMIT else f"{text[:DISPLAY_LIMIT]}…"


def _split(text: str) -> tuple[str, str | None, str | None]:
    """Return name, tag and digest of ``text`` by their separators alone."""
    if not text:
        raise InvalidReferenceError("", "a reference is [HOST[:PORT]/]NAME[:TAG][@DIGEST]")
    if not text.isascii():
        raise InvalidReferenceError(redact(text), "a reference has ASCII characters only")
    if "://" in text:
        raise InvalidReferenceError(redact(text), "a reference has no scheme; leave it out")
    if _IDENTIFIER.fullmatch(text):
        raise InvalidReferenceError(
            text, "64 hexadecimal digits are an image ID, not a name; write NAME@sha256:DIGEST"
        )
    rest, at, digest = text.partition("@")
    # A colon before the last slash belongs to a port.
    slash = rest.rfind("/")
    colon = rest.find(":", slash + 1)
    if colon >= 0:
        return rest[:colon], rest[colon + 1 :], digest if at else None
    return rest, None, digest if at else None


def _split_registry(name: str) -> tuple[str, str]:
    """Return registry and repository: the first part is a host only if it looks like one."""
    first, slash, rest = name.partition("/")
    is_host = bool(slash) and (
        first == "localhost" or "." in first or ":" in first or first.lower() != first
    )
    registry, repository = (first, rest) if is_host else (DEFAULT_REGISTRY, name)
    if registry == LEGACY_REGISTRY:
        registry = DEFAULT_REGISTRY
    if registry == DEFAULT_REGISTRY and "/" not in repository:
        repository = OFFICIAL_PREFIX + repository
    return registry, repository


def _check(text: str, registry: str, repository: str, tag: str | None) -> None:
    """Raise unless every part follows the grammar."""
    reason = ""
    if len(repository) > PATH_LIMIT:
        reason = f"the repository name has more than {PATH_LIMIT} characters"
    elif _REGISTRY.fullmatch(registry) is None:
        reason = "the part before the first '/' is not a HOST[:PORT]"
    elif _REPOSITORY.fullmatch(repository) is None:
        if repository.lower() != repository and _REPOSITORY.fullmatch(repository.lower()):
            reason = "the repository name must be lower-case"
        else:
            reason = (
                "a repository name has lower-case letters and digits, "
                "separated by single '.', '_', '__', '-' or '/'"
            )
    elif tag is not None and _TAG.fullmatch(tag) is None:
        reason = (
            "a tag has 1 to 128 letters, digits, '_', '.' and '-', not starting with '.' or '-'"
        )
    if reason:
        raise InvalidReferenceError(redact(text), reason)


def _digest(text: str, digest: str | None) -> Digest | None:
    """Return the reference's digest, or raise the reference's error."""
    if digest is None:
        return None
    try:
        return Digest(digest)
    except InvalidDigestError as error:
        raise InvalidReferenceError(redact(text), error.reason) from None
