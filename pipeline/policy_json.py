"""podman's and skopeo's policy.json: which images may be used at all.

Invariant: of all scopes the most specific one that matches counts, and it alone
(containers-policy.json(5)); every requirement of it has to be met. A requirement of a signature is
refused, because signatures are not verified here; a file with anything unknown in it is refused as
a whole, as by the tools that own it.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline import strict_json
from stowray.pipeline.errors import UsageError
from stowray.pipeline.reference import Reference
from stowray.pipeline.source import DOCKER_ARCHIVE, OCI, OCI_ARCHIVE
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.source import Source

SYSTEM = "system"
SYSTEM_FILE = Path("/etc/containers/policy.json")
SIZE_LIMIT = 16 << 20
DOCKER = "docker"
ACCEPT, REJECT = "insecureAcceptAnything", "reject"
SIGNATURES = frozenset({"signedBy", "sigstoreSigned", "signedBaseLayer"})

Scopes = dict[str, tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Policy:
    """Requirements (their types) by transport and scope, and the default."""

    file: str
    default: tuple[str, ...]
    transports: dict[str, Scopes]

    def check(self, source: Source) -> None:
        """Raise UsageError unless ``source`` may be used."""
        scope, requirements = self.requirements(source)
        for requirement in requirements:
            if requirement == REJECT:
                raise UsageError(source.canonical, f"rejected by {self.file} ({scope})")
            if requirement in SIGNATURES:
                raise UsageError(
                    source.canonical,
                    f"{self.file} ({scope}) demands a signature ({requirement}), and signatures "
                    "cannot be verified here: nothing is pulled. Verify it with skopeo, or accept "
                    "it in a policy of its own",
                )

    def requirements(self, source: Source) -> tuple[str, tuple[str, ...]]:
        """Return the scope that counts for ``source``, for people, and its requirements."""
        transport = DOCKER if isinstance(source, Reference) else source.kind
        known = self.transports.get(transport, {})
        for scope in scopes(source):
            if scope in known:
                return f"{transport}: {scope}", known[scope]
        if "" in known:
            return f"{transport}: all", known[""]
        return "default", self.default


def scopes(source: Source) -> tuple[str, ...]:
    """Return the scopes that may name ``source``, the most specific first."""
    if isinstance(source, Reference):
        return (source.canonical, *_namespaces(source.name))
    if source.kind == DOCKER_ARCHIVE:
        # It has no scopes but the transport's own.
        return ()
    path = os.path.realpath(source.path)
    named = (f"{path}:{source.image}",) if source.image else ()
    parents = [str(parent) for parent in (Path(path), *Path(path).parents)]
    return (*named, *(parent for parent in parents if parent != "/"))


def load(setting: str, environment: Mapping[str, str]) -> Policy:
    """Return the policy that the setting names, a file or ``system`` for podman's own places."""
    if setting != SYSTEM:
        return read_policy(Path(setting).expanduser())
    home = environment.get("HOME")
    own = Path(home) / ".config" / "containers" / "policy.json" if home else None
    if own is not None and own.exists():
        return read_policy(own)
    return read_policy(SYSTEM_FILE)


def read_policy(path: Path) -> Policy:
    """Return the policy in a file."""
    try:
        with path.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise UsageError(str(path), f"the policy cannot be read: {error.strerror}") from error
    if len(data) > SIZE_LIMIT:
        raise UsageError(str(path), "too large for a policy")
    return parse_policy(data, str(path))


def parse_policy(data: bytes, file: str) -> Policy:
    """Return the policy in ``data``, which was read from ``file``."""
    try:
        document = strict_json.parse_object(data)
    except strict_json.JSONError as error:
        raise UsageError(file, f"not a policy: {error}") from error
    if unknown := set(document) - {"default", "transports"}:
        raise UsageError(file, f"not a policy: unknown field {min(unknown)[:64]!r}")
    if "default" not in document:
        raise UsageError(file, "not a policy: it has no default")
    default = _requirements(file, "default", document["default"])
    transports = document.get("transports", {})
    if not isinstance(transports, dict):
        raise UsageError(file, "not a policy: transports must be an object")
    return Policy(
        file,
        default,
        {name: _scopes(file, name, table) for name, table in transports.items()},
    )


def _namespaces(name: str) -> tuple[str, ...]:
    """Return the name, its parents down to the host, and wildcards for the host's domains."""
    found = [name]
    while "/" in name:
        name = name.rpartition("/")[0]
        found.append(name)
    domain = name.partition(":")[0]
    while "." in domain:
        domain = domain.partition(".")[2]
        found.append(f"*.{domain}")
    return tuple(found)


def _scopes(file: str, transport: str, table: Any) -> Scopes:
    if not isinstance(table, dict):
        raise UsageError(file, f"not a policy: {transport} must be an object")
    for scope in table:
        # A scope that can match nothing would protect from nothing.
        paths = transport in (OCI, OCI_ARCHIVE) and scope
        if paths and (not scope.startswith("/") or scope == "/"):
            raise UsageError(file, f"the {transport} scope {scope!r} must be an absolute path")
        if transport == DOCKER_ARCHIVE and scope:
            raise UsageError(file, f"{transport} has no scopes but the empty one")
    return {
        scope: _requirements(file, f"{transport}: {scope}", value) for scope, value in table.items()
    }


def _requirements(file: str, where: str, value: Any) -> tuple[str, ...]:
    if not isinstance(value, list) or not value:
        raise UsageError(file, f"not a policy: {where} must be a list that is not empty")
    kinds: list[str] = []
    for requirement in value:
        kind = requirement.get("type") if isinstance(requirement, dict) else None
        plain = kind in (ACCEPT, REJECT) and set(requirement) == {"type"}
        if not isinstance(kind, str) or not (plain or kind in SIGNATURES):
            raise UsageError(file, f"not a policy: {where} has a requirement that is not known")
        kinds.append(kind)
    return tuple(kinds)
