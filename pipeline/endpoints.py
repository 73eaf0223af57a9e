"""Which endpoints serve a reference, in which order.

A ``hosts.toml`` for the registry comes before registries.conf; certificates of a ``certs.d``
directory go with either. Invariant: mirrors come first in the order of their file and the registry
itself last; a blocked namespace has no endpoints; an endpoint that failed lately stands behind the
others, but is never left out.
"""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.addresses import split_host
from stowray.pipeline.clock import SYSTEM_CLOCK, Clock
from stowray.pipeline.endpoint import Connection, Endpoint, registry_of
from stowray.pipeline.errors import (
    ContentError,
    StowrayError,
    UnavailableError,
    UsageError,
)
from stowray.pipeline.reference import Reference, wire_host
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from stowray.pipeline.hosts_toml import Host, Hosts
    from stowray.pipeline.registries_conf import Entry, RegistriesConf
    from stowray.pipeline.settings import RegistrySettings

Operation = Literal["resolve", "pull"]

# Changed files count without a new start, as with the tools that own them.
FRESH_SECONDS = 5.0
# The first rest; each that follows soon after is twice as long, up to the longest.
REST_SECONDS = 30.0
# Codes of errors that took their time.
SLOW_CODES = frozenset({"TIMEOUT", "SLOW", "UNREACHABLE"})
# At once for a host that serves wrong bytes: it does not mend itself while we look.
LONGEST_REST_SECONDS = 900.0


@dataclass(frozen=True, slots=True)
class _Rest:
    """Until when an endpoint is passed over, and how long that is in all."""

    end: float
    seconds: float


class Endpoints:
    """Answers from files that are read when they are needed, and again soon; thread-safe."""

    def __init__(
        self,
        settings: RegistrySettings,
        environment: Mapping[str, str],
        clock: Clock = SYSTEM_CLOCK,
        *,
        known: Mapping[str, tuple[Endpoint, ...]] | None = None,
    ) -> None:
        """Take what decides; ``known`` are the endpoints of references found elsewhere."""
        self._known = known or {}
        self._hosts_dir = settings.hosts_dir
        self._setting = settings.registries_conf
        self._environment = environment
        self._clock = clock
        self._lock = threading.Lock()
        self._fresh_until = 0.0
        self._hosts: dict[str, Hosts | None] = {}
        self._certificates: dict[str, Connection] = {}
        self._conf: RegistriesConf | None = None
        self._rests: dict[tuple[str, str, str], _Rest] = {}

    def find(self, reference: Reference, operation: Operation) -> tuple[Endpoint, ...]:
        """Return the endpoints that may be asked, the registry itself last.

        By digest everything is a ``pull``: what comes can be proven. Raises UsageError for a
        blocked name, for an impossible port, or when no endpoint is allowed to do ``operation``.
        """
        found = tuple(
            endpoint
            for endpoint in self._configured(reference)
            if (endpoint.can_resolve if operation == "resolve" else endpoint.can_pull)
        )
        if not found:
            raise UsageError(
                reference.canonical, f"none of its hosts has the capability {operation!r}"
            )
        for endpoint in found:
            try:
                split_host(endpoint.host)
            except ValueError:
                reason = f"{endpoint.host} is no address: ports go up to 65535"
                raise UsageError(reference.canonical, reason) from None
        return found

    def blame(self, endpoint: Endpoint, error: StowrayError) -> None:
        """Let a mirror rest that gave wrong bytes, or nothing for as long as it was waited for."""
        if endpoint.home:
            return
        is_wrong = isinstance(error, ContentError)
        if not is_wrong and not (isinstance(error, UnavailableError) and error.code in SLOW_CODES):
            # What failed at once costs little to ask again.
            return
        now = self._clock.monotonic()
        with self._lock:
            last = self._rests.get(endpoint.key, _Rest(now - LONGEST_REST_SECONDS, 0.0))
            if is_wrong:
                seconds = LONGEST_REST_SECONDS
            elif last.end > now:
                # Another thread waited for the same silence.
                return
            elif now - last.end < LONGEST_REST_SECONDS:
                seconds = min(2 * last.seconds, LONGEST_REST_SECONDS)
            else:
                seconds = REST_SECONDS
            self._rests[endpoint.key] = _Rest(now + seconds, seconds)

    def is_resting(self, endpoint: Endpoint) -> bool:
        """Return whether ``endpoint`` failed lately."""
        with self._lock:
            rest = self._rests.get(endpoint.key)
            return rest is not None and rest.end > self._clock.monotonic()

    def _configured(self, reference: Reference) -> tuple[Endpoint, ...]:
        known = self._known.get(reference.canonical)
        if known is not None:
            return known
        now = self._clock.monotonic()
        with self._lock:
            if now >= self._fresh_until:
                self._fresh_until = now + FRESH_SECONDS
                self._conf = None
                self._hosts.clear()
                self._certificates.clear()
        entry = self._entry(reference)
        if entry is not None and entry.blocked:
            raise UsageError(reference.canonical, f"blocked by {entry.file} ({entry.prefix})")
        hosts = self._hosts_of(reference.registry)
        if hosts is not None and hosts.listed:
            return from_hosts(reference, hosts)
        if entry is not None:
            return tuple(
                replace(endpoint, connection=self._connection(endpoint))
                for endpoint in from_entry(reference, entry)
            )
        connection = hosts.server.connection if hosts is not None else Connection()
        return (_registry_itself(reference, connection),)

    def _entry(self, reference: Reference) -> Entry | None:
        from stowray.pipeline.registries_conf import load

        with self._lock:
            if self._conf is None:
                self._conf = load(self._setting, self._environment)
            conf = self._conf
        return conf.find(reference)

    def _hosts_of(self, registry: str) -> Hosts | None:
        if not self._hosts_dir:
            return None
        from stowray.pipeline.hosts_toml import find_hosts

        with self._lock:
            if registry not in self._hosts:
                self._hosts[registry] = find_hosts(self._hosts_dir, registry)
            return self._hosts[registry]

    def _connection(self, endpoint: Endpoint) -> Connection:
        """Return the endpoint's connection with the certificates of its ``certs.d`` directory."""
        if not self._hosts_dir:
            return endpoint.connection
        from stowray.pipeline.hosts_toml import find_certificates

        with self._lock:
            known = self._certificates.get(endpoint.registry)
            if known is None:
                known = find_certificates(self._hosts_dir, endpoint.registry)
                self._certificates[endpoint.registry] = known
        return replace(
            endpoint.connection, ca_files=known.ca_files, client_pairs=known.client_pairs
        )


def from_hosts(reference: Reference, hosts: Hosts) -> tuple[Endpoint, ...]:
    """Return the endpoints that a ``hosts.toml`` gives a reference."""
    mirrors = [_of_host(reference, host, home=False) for host in hosts.hosts]
    if not hosts.server.address:
        itself = _registry_itself(reference, hosts.server.connection)
        return (*mirrors, replace(itself, headers=hosts.server.headers))
    return (*mirrors, _of_host(reference, hosts.server, home=True))


def from_entry(reference: Reference, entry: Entry) -> tuple[Endpoint, ...]:
    """Return the endpoints that an entry of registries.conf gives a reference."""
    places = [
        (mirror.location, mirror.insecure, False)
        for mirror in entry.mirrors
        if mirror.serves(reference)
    ]
    places.append((entry.location, entry.insecure, True))
    return tuple(_of_location(reference, entry, *place) for place in places)


def _of_host(reference: Reference, host: Host, *, home: bool) -> Endpoint:
    # docker.io serves a web site: who writes it means the registry (and so does its own manual).
    address = wire_host(host.address)
    is_registry = address == wire_host(reference.registry)
    # What is said of TLS at an http:// host holds if TLS is what the host speaks after all.
    either = host.scheme == "http" and host.has_tls and not address.endswith(":80")
    return Endpoint(
        host=address,
        registry=registry_of(address),
        repository=reference.repository,
        scheme="" if either else host.scheme,
        path=host.path,
        namespace="" if is_registry else reference.registry,
        home=home,
        plain_http=host.scheme == "http",
        can_resolve="resolve" in host.capabilities,
        can_pull="pull" in host.capabilities,
        connection=host.connection,
        headers=host.headers,
    )


def _of_location(
    reference: Reference, entry: Entry, location: str, insecure: bool, home: bool
) -> Endpoint:
    moved = entry.relocated(reference, location)
    same_tag = moved.tag == reference.tag or reference.digest is not None
    return Endpoint(
        host=wire_host(moved.registry),
        registry=moved.registry,
        repository=moved.repository,
        tag="" if same_tag else (moved.tag or ""),
        home=home,
        plain_http=insecure,
        connection=Connection(skip_verify=insecure),
    )


def _registry_itself(reference: Reference, connection: Connection) -> Endpoint:
    return Endpoint(
        host=wire_host(reference.registry),
        registry=reference.registry,
        repository=reference.repository,
        connection=connection,
    )


def final_error(failed: list[tuple[Endpoint, StowrayError]]) -> StowrayError:
    """Return the error to show when all endpoints failed: the registry's own word counts."""
    home = [error for endpoint, error in failed if endpoint.home]
    return home[-1] if home else failed[-1][1]
