"""Logins: the files and helpers in which other tools keep them.

Invariant: files are read only, nothing is ever written. The most specific namespace wins, and
within one file helpers for the host come before the store of all hosts, and that before plain
entries (docker-config(5), containers-auth.json(5)).
"""

from __future__ import annotations

import base64
import json
import os
import re
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from stowray.pipeline.credential import TOKEN_USER, Credential
from stowray.pipeline.credential_helpers import HELPER_SECONDS, CredentialHelpers
from stowray.pipeline.errors import UsageError
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

HUB = "docker.io"
HUB_KEY = "https://index.docker.io/v1/"
FILE_LIMIT = 4 << 20
RUN = Path("/run")

_SUFFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


_Stamp = tuple[int, int, int] | None


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    explicit: bool


@dataclass(frozen=True, slots=True)
class LoginFile:
    """A file of logins without what is secret in it; ``helpers`` are names of programs."""

    path: Path
    registries: tuple[str, ...]
    helpers: tuple[str, ...]


def never() -> bool:
    """Return False: nobody cancels."""
    return False


class Logins(Protocol):
    """Who one is to registries, wherever that is known from."""

    def find(
        self, registry: str, repository: str = "", cancelled: Callable[[], bool] = never
    ) -> Credential | None:
        """Return the login for a repository of a registry, ``None`` for nobody."""

    def known_secrets(self) -> tuple[str, ...]:
        """Return all that must not be shown."""

    def forget(self, registry: str) -> None:
        """Ask helpers for ``registry`` anew: what they said has expired."""


class Credentials:
    """Looks logins up; thread-safe, reads each file once and when it has changed."""

    def __init__(
        self,
        environment: Mapping[str, str],
        authfile: str = "",
        *,
        helper_seconds: float = HELPER_SECONDS,
    ) -> None:
        self._files = _files(environment, authfile)
        self._helpers = CredentialHelpers(environment, helper_seconds)
        self._lock = threading.Lock()
        self._documents: dict[Path, tuple[_Stamp, dict[str, Any]]] = {}

    def find(
        self, registry: str, repository: str = "", cancelled: Callable[[], bool] = never
    ) -> Credential | None:
        """Return the login for a repository of a registry, ``None`` for nobody."""
        for file in self._files:
            found = self._find_in(file, registry, repository, cancelled)
            if found is not None:
                return found
        return None

    def known_secrets(self) -> tuple[str, ...]:
        """Return all that the files hold and helpers have told, whoever it is for.

        No helper is run. Raises UsageError for a file that cannot be read.
        """
        found = list(self._helpers.known())
        for file in self._files:
            with self._lock:
                document = self._read(file)
            for key, entry in _table(document, "auths", file.path).items():
                credential = _credential(entry, key, file.path)
                if credential is not None:
                    found.append(credential)
        return tuple(secret for credential in found for secret in credential.secrets)

    def overview(self) -> list[LoginFile]:
        """Return which files there are and whom they are for; no helper is asked."""
        found = []
        for file in self._files:
            with self._lock:
                document = self._read(file)
            if not document:
                continue
            by_host = _table(document, "credHelpers", file.path)
            store = document.get("credsStore")
            names = [*_table(document, "auths", file.path), *by_host]
            helpers = [store, *by_host.values()]
            found.append(
                LoginFile(
                    file.path,
                    tuple(dict.fromkeys(_normalized(name) for name in names)),
                    tuple(dict.fromkeys(h for h in helpers if isinstance(h, str) and h)),
                )
            )
        return found

    def forget(self, registry: str) -> None:
        """Ask helpers for ``registry`` anew: what they said has expired."""
        self._helpers.forget(_host_keys(registry))

    def _find_in(
        self, file: _File, registry: str, repository: str, cancelled: Callable[[], bool]
    ) -> Credential | None:
        with self._lock:
            document = self._read(file)
        helpers = _table(document, "credHelpers", file.path)
        store = document.get("credsStore")
        for key in _host_keys(registry):
            if isinstance(suffix := helpers.get(key), str):
                if suffix:
                    return self._ask(file, suffix, registry, cancelled)
                # For docker an empty name exempts the host from the store of all others.
                store = ""
        if isinstance(store, str) and store:
            found = self._ask(file, store, registry, cancelled)
            if found is not None:
                return found
        return _plain(_table(document, "auths", file.path), file.path, registry, repository)

    def _read(self, file: _File) -> dict[str, Any]:
        # A session lives longer than a login: what `podman login` wrote meanwhile counts.
        stamp = _stamp(file.path)
        known = self._documents.get(file.path)
        if known is None or known[0] != stamp:
            known = self._documents[file.path] = (stamp, _load(file))
        return known[1]

    def _ask(
        self, file: _File, suffix: str, registry: str, cancelled: Callable[[], bool]
    ) -> Credential | None:
        if not _SUFFIX.fullmatch(suffix):
            raise UsageError(str(file.path), f"{suffix!r} is not the name of a credential helper")
        return self._helpers.ask(suffix, _server(registry), registry, cancelled)


def _files(environment: Mapping[str, str], authfile: str) -> tuple[_File, ...]:
    """Return the files to look into; a file that was named shuts out the usual places."""
    named = authfile or environment.get("REGISTRY_AUTH_FILE", "")
    if named:
        return (_File(Path(named).expanduser(), explicit=True),)
    places = []
    if environment.get("DOCKER_CONFIG"):
        places.append(Path(environment["DOCKER_CONFIG"]) / "config.json")
    if environment.get("XDG_RUNTIME_DIR"):
        places.append(Path(environment["XDG_RUNTIME_DIR"]) / "containers" / "auth.json")
    else:
        # As root and in services there is no such variable, and podman writes here.
        places.append(RUN / "containers" / str(os.getuid()) / "auth.json")
    home = environment.get("HOME")
    config = environment.get("XDG_CONFIG_HOME") or (str(Path(home) / ".config") if home else "")
    if config:
        places.append(Path(config) / "containers" / "auth.json")
    if home and not environment.get("DOCKER_CONFIG"):
        places.append(Path(home) / ".docker" / "config.json")
    return tuple(_File(place, explicit=False) for place in places)


def _stamp(path: Path) -> _Stamp:
    """Return what changes with a file's content, None when it cannot be looked at."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns


def _load(file: _File) -> dict[str, Any]:
    try:
        with file.path.open("rb") as stream:
            data = stream.read(FILE_LIMIT + 1)
    except (FileNotFoundError, NotADirectoryError) as error:
        if file.explicit:
            raise UsageError(str(file.path), "no such file of logins") from error
        return {}
    except OSError as error:
        if not file.explicit and isinstance(error, PermissionError):
            return {}
        raise UsageError(str(file.path), f"cannot be read: {error.strerror}") from error
    if len(data) > FILE_LIMIT:
        raise UsageError(str(file.path), "too large for a file of logins")
    try:
        document = json.loads(data) if data.strip() else {}
    except (ValueError, RecursionError) as error:
        raise UsageError(str(file.path), "not a JSON file of logins") from error
    if not isinstance(document, dict):
        raise UsageError(str(file.path), "not a JSON file of logins")
    return document


def _table(document: dict[str, Any], name: str, path: Path) -> dict[str, Any]:
    table = document.get(name)
    if table is None:
        return {}
    if not isinstance(table, dict):
        raise UsageError(str(path), f"{name} must be an object")
    return table


def _server(registry: str) -> str:
    """Return the name under which helpers know a registry."""
    return HUB_KEY if registry == HUB else registry


def _host_keys(registry: str) -> tuple[str, ...]:
    if registry == HUB:
        return (HUB_KEY, HUB, "index.docker.io", "registry-1.docker.io")
    return (registry,)


def _normalized(key: str) -> str:
    """Return a key of ``auths`` as ``host[:port][/namespace]``: old ones are URLs."""
    host, _, path = re.sub(r"^https?://", "", key.strip()).rstrip("/").partition("/")
    if key.lower().startswith(("http://", "https://")):
        path = re.sub(r"^v[12](/|$)", "", path)
    host = host.lower()
    if host in ("index.docker.io", "registry-1.docker.io"):
        host = HUB
        path = "" if path in ("v1", "v2") else path
    return f"{host}/{path}" if path else host


def _plain(auths: dict[str, Any], path: Path, registry: str, repository: str) -> Credential | None:
    wanted = [registry.lower()]
    for part in repository.split("/") if repository else ():
        wanted.append(f"{wanted[-1]}/{part}")
    entries: dict[str, tuple[str, Any]] = {}
    for key, entry in auths.items():
        # An exact key before one that only means the same.
        if key == _normalized(key) or _normalized(key) not in entries:
            entries[_normalized(key)] = (key, entry)
    for name in reversed(wanted):
        if name in entries:
            key, entry = entries[name]
            found = _credential(entry, key, path)
            if found is not None:
                return found
    return None


def _credential(entry: Any, key: str, path: Path) -> Credential | None:
    if entry is None:
        return None
    if not isinstance(entry, dict):
        raise UsageError(str(path), f"the entry of {key} must be an object")

    def text(name: str) -> str:
        value = entry.get(name, "")
        return value if isinstance(value, str) else ""

    username, password = text("username"), text("password")
    if text("auth"):
        try:
            # Other tools take line ends within it for nothing.
            encoded = re.sub(r"[\r\n]", "", text("auth"))
            decoded = base64.b64decode(encoded, validate=True).decode("utf-8")
        except ValueError as error:  # also for text that is not ASCII, without being binascii.Error
            raise UsageError(str(path), f"the auth of {key} is not base64") from error
        username, colon, password = decoded.partition(":")
        if not colon:
            raise UsageError(str(path), f"the auth of {key} is not NAME:PASSWORD in base64")
        # Docker pads with NUL bytes.
        password = password.rstrip("\0")
    identity = text("identitytoken")
    if username == TOKEN_USER and password and not identity:
        username, password, identity = "", "", password
    found = Credential(username, password, identity, text("registrytoken"))
    return found if found != Credential() else None
