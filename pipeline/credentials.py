"""Logins: the files and helpers in which other tools keep them.

Invariant: files are read only, nothing is ever written; a helper is run at most once per run and
key, within a deadline; a credential shows itself in no ``repr``. The most specific namespace wins,
and within one file helpers for the host come before the store of all hosts, and that before plain
entries (docker-config(5), containers-auth.json(5)).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import UnauthorizedError, UsageError
from stowray.pipeline.redact import redact_text

if TYPE_CHECKING:
    from collections.abc import Mapping

HUB = "docker.io"
HUB_KEY = "https://index.docker.io/v1/"
HELPER_SECONDS = 30.0
FILE_LIMIT = 4 << 20
NOT_FOUND = "credentials not found in native keychain"
TOKEN_USER = "<token>"

_SUFFIX = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,63}")


@dataclass(frozen=True, slots=True)
class Credential:
    """A login: name and password, or an identity token, or a ready registry token."""

    username: str = ""
    password: str = field(default="", repr=False)
    identity_token: str = field(default="", repr=False)
    registry_token: str = field(default="", repr=False)

    @property
    def identity(self) -> str:
        """Return a name for cache keys: tokens of one login are never used for another."""
        import hashlib

        parts = (self.username, self.password, self.identity_token, self.registry_token)
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def basic(self) -> str:
        """Return the value of an ``Authorization`` header of scheme Basic (RFC 7617)."""
        pair = f"{self.username}:{self.password}".encode()
        return "Basic " + base64.b64encode(pair).decode("ascii")

    @property
    def secrets(self) -> tuple[str, ...]:
        """Return what must not be shown."""
        known = (self.password, self.identity_token, self.registry_token)
        return tuple(filter(None, (*known, self.basic.partition(" ")[2] if self.password else "")))


@dataclass(frozen=True, slots=True)
class _File:
    path: Path
    explicit: bool


class Credentials:
    """Looks logins up; thread-safe, reads each file once."""

    def __init__(
        self,
        environment: Mapping[str, str],
        authfile: str = "",
        *,
        helper_seconds: float = HELPER_SECONDS,
    ) -> None:
        self._environment = dict(environment)
        self._files = _files(environment, authfile)
        self._helper_seconds = helper_seconds
        self._lock = threading.Lock()
        self._documents: dict[Path, dict[str, Any]] = {}
        self._answers: dict[tuple[str, str], Credential | None] = {}

    def find(self, registry: str, repository: str = "") -> Credential | None:
        """Return the login for a repository of a registry, ``None`` for nobody."""
        with self._lock:
            for file in self._files:
                found = self._find_in(file, registry, repository)
                if found is not None:
                    return found
        return None

    def forget(self, registry: str) -> None:
        """Ask helpers for ``registry`` anew: what they said has expired."""
        with self._lock:
            keys = set(_host_keys(registry))
            self._answers = {
                known: answer for known, answer in self._answers.items() if known[1] not in keys
            }

    def _find_in(self, file: _File, registry: str, repository: str) -> Credential | None:
        document = self._read(file)
        helpers = _table(document, "credHelpers", file.path)
        for key in _host_keys(registry):
            if isinstance(suffix := helpers.get(key), str) and suffix:
                return self._ask(file, suffix, _server(registry), registry)
        store = document.get("credsStore")
        if isinstance(store, str) and store:
            found = self._ask(file, store, _server(registry), registry)
            if found is not None:
                return found
        return _plain(_table(document, "auths", file.path), file.path, registry, repository)

    def _read(self, file: _File) -> dict[str, Any]:
        document = self._documents.get(file.path)
        if document is None:
            document = self._documents[file.path] = _load(file)
        return document

    def _ask(self, file: _File, suffix: str, server: str, registry: str) -> Credential | None:
        if not _SUFFIX.fullmatch(suffix):
            raise UsageError(str(file.path), f"{suffix!r} is not the name of a credential helper")
        known = (suffix, server)
        if known not in self._answers:
            self._answers[known] = self._run(suffix, server, registry)
        return self._answers[known]

    def _run(self, suffix: str, server: str, registry: str) -> Credential | None:
        import subprocess

        program = f"docker-credential-{suffix}"
        try:
            done = subprocess.run(
                [program, "get"],
                input=server.encode(),
                capture_output=True,
                timeout=self._helper_seconds,
                check=False,
                env=self._environment,
            )
        except subprocess.TimeoutExpired as error:
            reason = f"{program} gave no answer in {self._helper_seconds:g} s"
            raise UnauthorizedError(registry, "", reason) from error
        except OSError as error:
            reason = f"{program} cannot be run: {error.strerror}"
            raise UnauthorizedError(registry, "", reason) from error
        if done.returncode != 0:
            said = (done.stdout[:4096] + b" " + done.stderr[:4096]).decode("utf-8", "replace")
            if NOT_FOUND in said:
                return None
            raise UnauthorizedError(registry, "", f"{program} failed: {redact_text(said)}")
        return _helper_answer(program, done.stdout, registry)


def _helper_answer(program: str, output: bytes, registry: str) -> Credential | None:
    try:
        answer = json.loads(output)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        # Not the error's text: it may quote the secret.
        raise UnauthorizedError(registry, "", f"{program} answered something else") from error
    if not isinstance(username, str) or not isinstance(secret, str):
        raise UnauthorizedError(registry, "", f"{program} answered something else")
    if not secret:
        return None
    if username == TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(username, secret)


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
    home = environment.get("HOME")
    config = environment.get("XDG_CONFIG_HOME") or (str(Path(home) / ".config") if home else "")
    if config:
        places.append(Path(config) / "containers" / "auth.json")
    if home and not environment.get("DOCKER_CONFIG"):
        places.append(Path(home) / ".docker" / "config.json")
    return tuple(_File(place, explicit=False) for place in places)


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
    if not isinstance(entry, dict):
        raise UsageError(str(path), f"the entry of {key} must be an object")

    def text(name: str) -> str:
        value = entry.get(name, "")
        return value if isinstance(value, str) else ""

    username, password = text("username"), text("password")
    if text("auth"):
        try:
            decoded = base64.b64decode(text("auth"), validate=True).decode("utf-8")
        except (binascii.Error, UnicodeDecodeError) as error:
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
