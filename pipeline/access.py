"""How registries are reached and who one is to them, taken along to another machine.

What says so lies in files of one machine: logins, mirrors, certificates. Invariant: what travels is
only what a reference needs (the logins of its own endpoints, the certificates that they are reached
with), as plain values; nothing of it is written to a disk where it arrives.
"""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.credential import Credential
from stowray.pipeline.credentials import Logins, never
from stowray.pipeline.endpoint import Connection, Endpoint
from stowray.pipeline.errors import UsageError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from stowray.pipeline.endpoints import Endpoints
    from stowray.pipeline.reference import Reference
    from stowray.pipeline.settings import RegistrySettings

# How PEM begins (RFC 7468), which no name of a file does.
PEM = "-----BEGIN "
PEM_LIMIT = 4 << 20
# Variables that name files of the machine where they are set.
FILE_VARIABLES = frozenset(
    {"REGISTRY_AUTH_FILE", "DOCKER_CONFIG", "CONTAINERS_REGISTRIES_CONF", "SSL_CERT_FILE"}
)


@dataclass(frozen=True, slots=True)
class Access:
    """``endpoints`` by reference, and logins by registry and repository."""

    endpoints: Mapping[str, tuple[Endpoint, ...]] = field(default_factory=dict)
    logins: Mapping[tuple[str, str], Credential] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values, secrets among them."""
        return {
            "endpoints": [
                [name, [asdict(endpoint) for endpoint in found]]
                for name, found in self.endpoints.items()
            ],
            "logins": [
                [*key, login.username, login.password, login.identity_token, login.registry_token]
                for key, login in self.logins.items()
            ],
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Access:
        """Return what :meth:`to_dict` described."""
        return cls(
            {str(name): tuple(map(_endpoint, found)) for name, found in fields["endpoints"]},
            {
                (str(registry), str(repository)): Credential(*map(str, login))
                for registry, repository, *login in fields["logins"]
            },
        )


class CarriedCredentials:
    """Logins that were taken along; for what they do not know those of this machine count."""

    def __init__(self, access: Access, own: Logins) -> None:
        self._logins = access.logins
        self._own = own

    def find(
        self, registry: str, repository: str = "", cancelled: Callable[[], bool] = never
    ) -> Credential | None:
        """Return the login for a repository of a registry; see :meth:`Logins.find`."""
        found = self._logins.get((registry, repository))
        return found or self._own.find(registry, repository, cancelled)

    def known_secrets(self) -> tuple[str, ...]:
        """Return all that must not be shown."""
        carried = (secret for login in self._logins.values() for secret in login.secrets)
        return (*carried, *self._own.known_secrets())

    def forget(self, registry: str) -> None:
        """Ask helpers of this machine for ``registry`` anew."""
        self._own.forget(registry)


def access_to(
    reference: Reference,
    endpoints: Endpoints,
    credentials: Logins,
    cancelled: Callable[[], bool] = never,
) -> Access:
    """Return what a machine without our files needs to fetch the blobs of ``reference``.

    Raises UsageError for files that cannot be read, and what credential helpers fail with.
    """
    found = endpoints.find(reference, "pull")
    logins = {}
    for endpoint in found:
        login = credentials.find(endpoint.registry, endpoint.repository, cancelled)
        if login is not None:
            logins[endpoint.registry, endpoint.repository] = login
    carried = tuple(replace(one, connection=_carried(one.connection)) for one in found)
    return Access({reference.canonical: carried}, logins)


def without_files(settings: RegistrySettings) -> RegistrySettings:
    """Return the settings as they hold where only what was taken along is known."""
    return replace(
        settings,
        authfile="",
        hosts_dir="",
        registries_conf="",
        policy_file="",
        ca_file=content_of(settings.ca_file) if settings.ca_file else "",
    )


def content_of(file: str) -> str:
    """Return the PEM in a file, or ``file`` itself where it is that already."""
    if file.startswith(PEM):
        return file
    try:
        with Path(file).open("rb") as stream:
            text = stream.read(PEM_LIMIT).decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(file, "cannot be read as a file of certificates") from error
    # What precedes the first certificate is for people.
    if PEM not in text:
        raise UsageError(file, "holds no certificate or key in PEM")
    return text[text.index(PEM) :]


@contextmanager
def as_files(*texts: str) -> Iterator[tuple[str, ...]]:
    """Yield a name of a file for each of ``texts`` that is PEM, and the others as they are.

    The files are in memory and gone afterwards, however this process ends.
    """
    with ExitStack() as stack:
        names = []
        for text in texts:
            if not text.startswith(PEM):
                names.append(text)
                continue
            descriptor = os.memfd_create("pem")
            stack.callback(os.close, descriptor)
            os.write(descriptor, text.encode())
            names.append(f"/proc/self/fd/{descriptor}")
        yield tuple(names)


def _carried(connection: Connection) -> Connection:
    return replace(
        connection,
        ca_files=tuple(map(content_of, connection.ca_files)),
        client_pairs=tuple(
            (content_of(certificate), content_of(key) if key else "")
            for certificate, key in connection.client_pairs
        ),
    )


def _endpoint(fields: Mapping[str, Any]) -> Endpoint:
    connection = dict(fields["connection"])
    connection["ca_files"] = tuple(connection["ca_files"])
    connection["client_pairs"] = tuple(map(tuple, connection["client_pairs"]))
    headers = tuple((str(name), str(value)) for name, value in fields["headers"])
    return Endpoint(**{**fields, "connection": Connection(**connection), "headers": headers})
