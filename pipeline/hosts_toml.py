"""containerd's directories of registry hosts, and Docker's ``certs.d`` in the same place.

``DIR/<host>[:port]`` (or ``<host>_<port>_``), else ``DIR/_default``; in it ``hosts.toml``, or
certificates alone: ``*.crt`` are authorities, ``*.cert`` with ``*.key`` a client's pair. Invariant:
hosts are tried in the file's order and the server last; a file that cannot be understood is a
UsageError, never passed over (containerd goes on without it); keys that are not known here are
left alone, as containerd does.
"""

from __future__ import annotations

import re
from dataclasses import field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from stowray.pipeline.addresses import DEFAULT_PORTS, split_host
from stowray.pipeline.endpoint import API_PATH, Connection
from stowray.pipeline.errors import UsageError
from stowray.pipeline.toml_text import parse_toml
from stowray.pipeline.values import dataclass

FILE = "hosts.toml"
DEFAULT = "_default"
SIZE_LIMIT = 1 << 20
ALL = frozenset({"pull", "resolve", "push", "referrers"})

_DURATION = re.compile(r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:ns|us|µs|μs|ms|s|m|h)")
_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1, "m": 60, "h": 3600}
_FIELD_NAME = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_FIELD_VALUE = re.compile(r"[\t\x20-\x7e\x80-\xff]*")
# Not for a file to say: the request would be another one, or not be one at all.
_OWN_FIELDS = frozenset(
    {"host", "content-length", "transfer-encoding", "connection", "range", "accept-encoding"}
)


@dataclass(frozen=True, slots=True)
class Host:
    """One host of a file; ``address`` "" is the registry itself."""

    scheme: str = ""
    address: str = ""
    path: str = API_PATH
    capabilities: frozenset[str] = ALL
    connection: Connection = field(default_factory=Connection)
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)

    @property
    def has_tls(self) -> bool:
        """Return whether the file says anything of how TLS is to be spoken."""
        return bool(
            self.connection.ca_files or self.connection.client_pairs or self.connection.skip_verify
        )


@dataclass(frozen=True, slots=True)
class Hosts:
    """What a directory says of a registry; ``listed`` when it has a ``hosts.toml``."""

    hosts: tuple[Host, ...]
    server: Host
    file: str
    listed: bool


def find_hosts(directory: str, registry: str) -> Hosts | None:
    """Return what ``directory`` says of ``registry``, ``None`` for nothing.

    As in containerd the first directory that exists is the one, even when it is empty.
    """
    root = Path(directory).expanduser()
    if not root.is_dir():
        raise UsageError(str(root), "no such directory of registry hosts")
    for name in _names(registry):
        place = root / name
        if place.is_dir():
            return _read(place)
    return None


def find_certificates(directory: str, host: str) -> Connection:
    """Return the certificates that ``directory`` has for ``host``, whatever its hosts.toml."""
    root = Path(directory).expanduser()
    for name in _names(host)[:-1]:
        if (root / name).is_dir():
            return _certificates(root / name)
    return Connection()


def parse_hosts(text: str, place: Path) -> Hosts:
    """Return what the ``hosts.toml`` in the directory ``place`` says."""
    file = str(place / FILE)
    document = parse_toml(text, file)
    table = document.get("host", {})
    if not isinstance(table, dict):
        raise UsageError(file, 'host must be tables: [host."https://…"]')
    hosts = tuple(_host(file, place, name, fields) for name, fields in table.items())
    server = document.get("server", "")
    if not isinstance(server, str):
        raise UsageError(file, "server must be a string")
    return Hosts(hosts, _host(file, place, server, document), file, listed=True)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration as Go writes it (``1m30s``); raise ValueError."""
    if text == "0":
        return 0.0
    parts = _DURATION.findall(text)
    if not parts or "".join(parts) != text:
        raise ValueError(text)
    seconds = 0.0
    for part in parts:
        number = part.rstrip("nuµμmsh")
        seconds += float(number) * _UNITS[part[len(number) :]]
    return seconds


def _names(registry: str) -> tuple[str, ...]:
    host, colon, port = registry.rpartition(":")
    if colon and "]" not in port:
        return (f"{host}_{port}_", registry, DEFAULT)
    return (registry, DEFAULT)


def _read(place: Path) -> Hosts:
    file = place / FILE
    try:
        with file.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except FileNotFoundError:
        data = b""
    except OSError as error:
        raise UsageError(str(file), f"cannot be read: {error.strerror}") from error
    if len(data) > SIZE_LIMIT:
        raise UsageError(str(file), "too large for a list of hosts")
    if not data:
        server = Host(connection=_certificates(place))
        return Hosts((), server, str(place), listed=False)
    try:
        return parse_hosts(data.decode("utf-8"), place)
    except UnicodeDecodeError as error:
        raise UsageError(str(file), "not UTF-8") from error


def _certificates(place: Path) -> Connection:
    try:
        names = sorted(entry.name for entry in place.iterdir())
    except OSError as error:
        raise UsageError(str(place), f"cannot be read: {error.strerror}") from error
    pairs = []
    for name in names:
        if name.endswith(".cert"):
            key = f"{name.removesuffix('.cert')}.key"
            if key not in names:
                raise UsageError(str(place / name), f"its key {key} is missing")
            pairs.append((str(place / name), str(place / key)))
    authorities = tuple(str(place / name) for name in names if name.endswith(".crt"))
    return Connection(ca_files=authorities, client_pairs=tuple(pairs))


def _host(file: str, place: Path, url: str, fields: Any) -> Host:
    if not isinstance(fields, dict):
        raise UsageError(file, f"host {url!r} must be a table")
    # First, because a URL may only be shown when there is no login in it.
    parts = _split(file, url, _flag(file, "a host", "override_path", fields)) if url else None
    about = f"host {url!r}" if url else "the file"
    capabilities = frozenset(word.lower() for word in _strings(file, about, "capabilities", fields))
    if unknown := capabilities - ALL:
        raise UsageError(file, f"{about}: no such capability: {', '.join(sorted(unknown))}")
    connection = Connection(
        ca_files=tuple(_path(place, name) for name in _strings(file, about, "ca", fields)),
        client_pairs=_pairs(file, about, place, fields.get("client", [])),
        skip_verify=_flag(file, about, "skip_verify", fields),
        connect_seconds=_duration(file, about, fields),
        proxy=_proxy(file, about, fields),
    )
    headers = _headers(file, about, fields.get("header", {}))
    if parts is None:
        # The registry itself: as in containerd it can do everything, at the usual path.
        return Host(connection=connection, headers=headers)
    return Host(*parts, capabilities or ALL, connection, headers)


def _split(file: str, url: str, override: bool) -> tuple[str, str, str]:
    if "://" not in url:
        url = f"https://{url}"
    try:
        split = urlsplit(url)
        if "@" in split.netloc:
            # Not shown: it has a password in it.
            raise UsageError(file, "a host has a login in its URL: put it into a file of logins")
        split_host(split.netloc)
    except ValueError:
        raise UsageError(file, f"{url!r} is not the URL of a host") from None
    if split.scheme not in DEFAULT_PORTS or split.query or split.fragment:
        raise UsageError(file, f"{url!r} is not the URL of a host")
    path = split.path.rstrip("/")
    if not override and not path.endswith(API_PATH):
        path += API_PATH
    return split.scheme, split.netloc, path


def _strings(file: str, about: str, key: str, fields: dict[str, Any]) -> list[str]:
    value = fields.get(key, [])
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not all(isinstance(one, str) for one in values):
        raise UsageError(file, f"{about}: {key} must be a string or a list of strings")
    return values


def _flag(file: str, about: str, key: str, fields: dict[str, Any]) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(file, f"{about}: {key} must be true or false")
    return value


def _pairs(file: str, about: str, place: Path, value: Any) -> tuple[tuple[str, str], ...]:
    pairs = []
    for one in [value] if isinstance(value, str) else value if isinstance(value, list) else [None]:
        if isinstance(one, str):
            pairs.append((_path(place, one), ""))
        elif isinstance(one, list) and len(one) == 2 and all(isinstance(part, str) for part in one):
            pairs.append((_path(place, one[0]), _path(place, one[1]) if one[1] else ""))
        else:
            raise UsageError(
                file, f"{about}: client must be a file, or a list of files or [CERT, KEY] pairs"
            )
    return tuple(pairs)


def _path(place: Path, name: str) -> str:
    return str(place / name)


def _duration(file: str, about: str, fields: dict[str, Any]) -> float:
    value = fields.get("dial_timeout", "0")
    try:
        return parse_duration(value or "0")
    except (ValueError, TypeError, AttributeError):
        raise UsageError(file, f'{about}: dial_timeout must be like "1s" or "500ms"') from None


def _proxy(file: str, about: str, fields: dict[str, Any]) -> str:
    value = fields.get("proxy", "")
    if value == "":
        return ""
    split = urlsplit(value) if isinstance(value, str) else None
    if split is None or split.scheme not in DEFAULT_PORTS or not split.hostname:
        raise UsageError(file, f"{about}: proxy must be the URL of an http(s) proxy")
    return str(value)


def _headers(file: str, about: str, table: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(table, dict):
        raise UsageError(file, f"{about}: header must be a table")
    headers: list[tuple[str, str]] = []
    for name in table:
        if not _FIELD_NAME.fullmatch(name) or name.lower() in _OWN_FIELDS:
            raise UsageError(file, f"{about}: {name!r} cannot be set as a header")
        for value in _strings(file, about, name, table):
            # Not quoted: it may be a secret.
            if not _FIELD_VALUE.fullmatch(value):
                raise UsageError(file, f"{about}: the header {name} has no such value")
            headers.append((name, value))
    return tuple(headers)
