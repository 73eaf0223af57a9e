"""A host that serves a repository, and how it is reached: plain values.

Invariant: what an endpoint's owner configured for it (client certificates, headers, leave not to
verify) is meant for that host alone; only its certificate authorities are taken along to where it
redirects, because they can make nothing less secret.
"""

from __future__ import annotations

from dataclasses import field

from stowray.pipeline.reference import DEFAULT_REGISTRY, DEFAULT_WIRE_HOST
from stowray.pipeline.values import dataclass

API_PATH = "/v2"


@dataclass(frozen=True, slots=True)
class Connection:
    """What a connection needs beyond what the settings say for all of them.

    ``client_pairs`` are files with a certificate and its key, the second empty when both are in
    one; in what comes from another machine, their content stands for files. ``connect_seconds`` 0
    is the usual wait; ``proxy`` "" is what the environment says.
    """

    ca_files: tuple[str, ...] = ()
    client_pairs: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    skip_verify: bool = False
    connect_seconds: float = 0.0
    proxy: str = field(default="", repr=False)

    @property
    def elsewhere(self) -> Connection:
        """Return what of it holds for hosts that this one sends us to."""
        return Connection(ca_files=self.ca_files)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """One place to ask for a repository.

    ``host`` is who is connected to, ``registry`` whose login is used there, ``repository`` and
    ``tag`` the names there (``tag`` "" is the reference's own). ``scheme`` "" is found out, with
    plain http only where the settings or ``plain_http`` allow it. ``namespace`` tells a mirror
    which registry is meant. A ``home`` is the last resort, whose word counts when all fail.
    """

    host: str
    registry: str
    repository: str
    scheme: str = ""
    path: str = API_PATH
    tag: str = ""
    namespace: str = ""
    home: bool = True
    plain_http: bool = False
    can_resolve: bool = True
    can_pull: bool = True
    connection: Connection = Connection()
    # They may hold secrets.
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def key(self) -> tuple[str, str, str]:
        """Return what tells endpoints apart whatever the repository."""
        return (self.scheme, self.host, self.path)

    def target(self, rest: str) -> str:
        """Return path and query of ``rest`` (``manifests/…``, ``blobs/…``) of the repository."""
        query = f"?ns={self.namespace}" if self.namespace else ""
        return f"{self.path}/{self.repository}/{rest}{query}"


def registry_of(host: str) -> str:
    """Return the registry that answers at ``host``: under its name logins are kept."""
    return DEFAULT_REGISTRY if host == DEFAULT_WIRE_HOST else host
