"""Every setting with its unit and default, and where a value may come from.

Order, the later wins: the defaults here, the settings file (TOML), the command line; the
environment (``STOWRAY_STORE``, ``STOWRAY_NODE``) stands in for what none of them names.
``configs/default.toml`` lists every key; a test holds it against this module. Invariant: an unknown
key or a value of the wrong kind is a UsageError that names the key, never ignored.
"""

from __future__ import annotations

import os
import re
import socket
import stat
from dataclasses import field, fields
from pathlib import Path
from typing import Any

from stowray.pipeline.errors import UsageError, escape
from stowray.pipeline.values import dataclass

SYSTEM_STORE = "/var/lib/stowray"
NODE_VARIABLE = "STOWRAY_NODE"


def _processors() -> int:
    return max(1, len(os.sched_getaffinity(0)))


@dataclass(frozen=True, slots=True)
class RegistrySettings:
    """How registries are spoken to; seconds and bytes."""

    plain_http: tuple[str, ...] = ()
    authfile: str = ""
    hosts_dir: str = ""
    registries_conf: str = ""
    policy_file: str = ""
    ca_file: str = ""
    connect_timeout_seconds: float = 10.0
    stall_timeout_seconds: float = 30.0
    minimum_bytes_per_second: int = 1024
    attempts: int = 6
    deadline_seconds: float = 3600.0
    connections: int = 8
    range_connections: int = 8
    range_minimum_bytes: int = 64 << 20
    requests_per_second: float = 0.0
    bytes_per_second: int = 0
    foreign_urls: bool = False


@dataclass(frozen=True, slots=True)
class UnpackSettings:
    """How layers are applied. ``workers = 0`` is one per processor, a limit of 0 the built-in one.

    ``max_entries`` counts entries of one layer, ``max_unpacked_bytes`` the files in one layer,
    ``max_layer_bytes`` the uncompressed tar stream.
    """

    workers: int = 0
    max_entries: int = 0
    max_unpacked_bytes: int = 0
    max_layer_bytes: int = 0


@dataclass(frozen=True, slots=True)
class ResolveSettings:
    """How references are looked up; ``ttl_seconds`` is how long a tag's answer is kept."""

    ttl_seconds: float = 5.0
    policy: str = "newer"
    platform: str = ""
    strict_platform: bool = False


@dataclass(frozen=True, slots=True)
class Settings:
    """All settings of one run."""

    store: str = ""
    node: str = ""
    engine: str = "auto"
    address: str = ""
    metrics: str = ""
    resolve: ResolveSettings = field(default_factory=ResolveSettings)
    registry: RegistrySettings = field(default_factory=RegistrySettings)
    unpack: UnpackSettings = field(default_factory=UnpackSettings)

    @property
    def node_name(self) -> str:
        """Return the configured name of this node, else ``STOWRAY_NODE``, else the host name."""
        return self.node or os.environ.get(NODE_VARIABLE, "") or socket.gethostname()

    def store_path(self) -> Path:
        """Return the absolute path of the store with ``{node}`` filled in."""
        text = self.store or os.environ.get("STOWRAY_STORE", "") or _default_store()
        text = text.replace("{node}", self.node_name)
        try:
            # Records, and what workers and actors are told, are UTF-8.
            text.encode()
            return Path(text).expanduser().absolute()
        except UnicodeEncodeError as error:
            raise UsageError(escape(text), "the path of a store must be UTF-8") from error
        except RuntimeError as error:
            raise UsageError(text, "there is no such user's home directory") from error

    def worker_count(self) -> int:
        """Return how many layers are staged at once."""
        return self.unpack.workers or min(8, _processors())


def _default_store() -> str:
    if os.geteuid() == 0:
        return SYSTEM_STORE
    data = os.environ.get("XDG_DATA_HOME", "") or str(Path.home() / ".local" / "share")
    return str(Path(data) / "stowray")


_SECTIONS: dict[str, type[Any]] = {
    "resolve": ResolveSettings,
    "registry": RegistrySettings,
    "unpack": UnpackSettings,
}
_CHOICES = {
    "engine": ("auto", "local", "ray"),
    "resolve.policy": ("newer", "missing", "always", "never"),
}
# A host name, an address, or an IPv6 address in brackets, and perhaps a port; no URL.
_HOST = re.compile(r"(?:[^\s/@\[\]:]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]+)?")
# What the system's waits, and files, can take.
LARGEST = 2**53
_MOST = {
    "registry.connect_timeout_seconds": 1e6,
    "registry.stall_timeout_seconds": 1e6,
    "registry.deadline_seconds": 1e9,
    "resolve.ttl_seconds": 1e9,
    "unpack.workers": 512,
}
# A wait of no time ends before anything can have come.
_POSITIVE = frozenset({"registry.connect_timeout_seconds", "registry.stall_timeout_seconds"})
# Paths, made absolute at once: who uses them may work in another directory.
_PATHS = frozenset(
    {
        "metrics",
        *(
            f"registry.{name}"
            for name in ("authfile", "hosts_dir", "registries_conf", "policy_file", "ca_file")
        ),
    }
)
# What stands for the usual places of other tools.
SYSTEM = "system"
# Command-line options that live in a section.
_PLACES = {
    "platform": "resolve",
    "authfile": "registry",
    "hosts_dir": "registry",
    "plain_http": "registry",
}


def load_settings(
    *, config: str | None = None, overrides: dict[str, Any] | None = None
) -> Settings:
    """Return the settings from the file ``config`` (or ``STOWRAY_CONFIG``) and ``overrides``.

    ``overrides`` are command-line values by option name; None and empty ones are passed over.
    Raises UsageError naming the file and key that cannot be used, and for an authfile that is
    named and not there.
    """
    path = config or os.environ.get("STOWRAY_CONFIG")
    document = _read(Path(path)) if path else {}
    for name, value in (overrides or {}).items():
        if value in (None, "", [], ()):
            continue
        section = _PLACES.get(name)
        (document.setdefault(section, {}) if section else document)[name] = value
    settings = _build(document, str(path) if path else "command line")
    _expect_file(settings.registry.authfile)
    return settings


def _expect_file(authfile: str) -> None:
    """Raise UsageError for a file of logins that is not there: else only a login would tell."""
    if not authfile:
        return
    try:
        # Not opened: it may be a pipe, which is read once.
        mode = Path(authfile).stat().st_mode
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such file"
        raise UsageError(authfile, f"no such file of logins: {reason}") from error
    if stat.S_ISDIR(mode):
        raise UsageError(authfile, "no file of logins but a directory")


def _read(path: Path) -> dict[str, Any]:
    from stowray.pipeline.toml_text import parse_toml

    try:
        return parse_toml(path.read_text(encoding="utf-8"), str(path))
    except OSError as error:
        raise UsageError(str(path), f"cannot read the settings: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"not a TOML file: {error}") from error


def _build(document: dict[str, Any], origin: str) -> Settings:
    values = dict(document)
    for name, kind in _SECTIONS.items():
        section = values.get(name, {})
        if not isinstance(section, dict):
            raise UsageError(origin, f"[{name}] must be a table")
        values[name] = kind(**_checked(kind, section, f"{name}.", origin))
    return Settings(**_checked(Settings, values, "", origin))


def _checked(kind: type[Any], values: dict[str, Any], prefix: str, origin: str) -> dict[str, Any]:
    known = {entry.name: entry for entry in fields(kind)}
    default = kind()
    checked: dict[str, Any] = {}
    for name, value in values.items():
        key = prefix + name
        if name not in known:
            raise UsageError(origin, f"unknown setting {key!r}; known: {', '.join(known)}")
        checked[name] = _coerce(key, value, getattr(default, name), origin)
    return checked


def _coerce(key: str, value: Any, default: Any, origin: str) -> Any:
    if isinstance(default, tuple):
        if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
            raise UsageError(origin, f"{key} must be a list of strings")
        if key == "registry.plain_http":
            for host in value:
                if not _HOST.fullmatch(host):
                    raise UsageError(origin, f"{key}: {host!r} is not a HOST[:PORT]")
        return tuple(value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not type(default):
        raise UsageError(origin, f"{key} must be of type {type(default).__name__}")
    if isinstance(value, int | float):
        # Not `value < 0`: NaN is no number to compare with.
        if not value >= 0:
            raise UsageError(origin, f"{key} must not be negative")
        if value > (most := _MOST.get(key, LARGEST)):
            raise UsageError(origin, f"{key} must not be more than {most}")
        if key in _POSITIVE and not value:
            raise UsageError(origin, f"{key} must be more than 0")
    if key in _PATHS and value not in ("", SYSTEM):
        return str(Path(value).expanduser().absolute())
    if key in _CHOICES and value not in _CHOICES[key]:
        raise UsageError(origin, f"{key} must be one of {', '.join(_CHOICES[key])}")
    return value
