"""podman's registries.conf, version 2: where the images of a namespace are, and its mirrors.

Read are one file and the ``*.conf`` files of the directory beside it (``registries.conf.d``), later
ones replacing entries of the same prefix (containers-registries.conf.d(5)). Invariant: of all
entries the one with the longest matching prefix counts, and it alone; a file that cannot be
understood is a UsageError. Search lists and aliases of short names are not read: a reference has
one meaning here.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import InvalidReferenceError, UsageError
from stowray.pipeline.reference import DEFAULT_REGISTRY, LEGACY_REGISTRY, Reference
from stowray.pipeline.toml_text import parse_toml
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping

VARIABLE = "CONTAINERS_REGISTRIES_CONF"
SYSTEM = "system"
SYSTEM_FILE = Path("/etc/containers/registries.conf")
SIZE_LIMIT = 4 << 20
ALL, DIGEST_ONLY, TAG_ONLY = "all", "digest-only", "tag-only"


@dataclass(frozen=True, slots=True)
class Mirror:
    """A copy of a namespace; ``use`` says for which references."""

    location: str
    insecure: bool = False
    use: str = ALL

    def serves(self, reference: Reference) -> bool:
        """Return whether it may be asked for ``reference``."""
        return self.use == ALL or self.use == (
            TAG_ONLY if reference.digest is None else DIGEST_ONLY
        )


@dataclass(frozen=True, slots=True)
class Entry:
    """One ``[[registry]]``; ``location`` "" leaves names as they are."""

    prefix: str
    location: str = ""
    insecure: bool = False
    blocked: bool = False
    mirrors: tuple[Mirror, ...] = ()
    file: str = ""

    def matched(self, reference: Reference) -> int:
        """Return how much of the reference's text the prefix covers, 0 when it does not match."""
        text = full_text(reference)
        if self.prefix.startswith("*."):
            host = reference.registry.partition(":")[0]
            covered = host.endswith(self.prefix[1:]) and len(host) > len(self.prefix) - 1
            return len(reference.registry) if covered else 0
        if not text.startswith(self.prefix):
            return 0
        # After a bare host a ':' begins a port, and another port is another registry.
        ends = ("", "/", ":", "@") if "/" in self.prefix else ("", "/")
        return len(self.prefix) if text[len(self.prefix) :][:1] in ends else 0

    def relocated(self, reference: Reference, location: str) -> Reference:
        """Return ``reference`` with what the prefix covers replaced by ``location``."""
        if not location:
            return reference
        text = location + full_text(reference)[self.matched(reference) :]
        host, _, rest = text.partition("/")
        rest, _, digest = rest.partition("@")
        repository, _, tag = rest.partition(":")
        try:
            moved = Reference.from_dict(
                {
                    "registry": DEFAULT_REGISTRY if host == LEGACY_REGISTRY else host,
                    "repository": repository,
                    "tag": tag or None,
                    "digest": digest or None,
                }
            )
        except InvalidReferenceError as error:
            raise UsageError(
                self.file, f"location {location!r} makes no name of {reference}: {error.reason}"
            ) from error
        if moved.digest != reference.digest:
            raise UsageError(self.file, f"location {location!r} would change a digest")
        return moved


@dataclass(frozen=True, slots=True)
class RegistriesConf:
    """All entries by prefix."""

    entries: tuple[Entry, ...] = ()

    def find(self, reference: Reference) -> Entry | None:
        """Return the entry for ``reference``; the longest prefix wins."""
        matching = [entry for entry in self.entries if entry.matched(reference)]
        # Of equal lengths a host says more than a wildcard for it.
        return max(
            matching, key=lambda entry: (len(entry.prefix), entry.prefix[0] != "*"), default=None
        )


def full_text(reference: Reference) -> str:
    """Return all parts of a reference as prefixes are matched against them."""
    tag = f":{reference.tag}" if reference.tag else ""
    return f"{reference.name}{tag}{f'@{reference.digest}' if reference.digest else ''}"


def load(setting: str, environment: Mapping[str, str]) -> RegistriesConf:
    """Return what the setting names: a file, ``system`` for podman's own places, "" for nothing.

    Without a setting the variable ``CONTAINERS_REGISTRIES_CONF`` counts, as for podman.
    """
    named = setting or environment.get(VARIABLE, "")
    if not named:
        return RegistriesConf()
    if named != SYSTEM:
        path = Path(named).expanduser()
        return _merged([path, *_drop_ins(path)])
    if environment.get(VARIABLE, SYSTEM) != SYSTEM:
        return load(environment[VARIABLE], {})
    home = Path(environment.get("HOME", "/"))
    own = home / ".config" / "containers" / "registries.conf"
    if own.exists():
        return _merged([own, *_drop_ins(own)])
    files = [SYSTEM_FILE] if SYSTEM_FILE.exists() else []
    return _merged([*files, *_drop_ins(SYSTEM_FILE), *_drop_ins(own)])


def parse_conf(text: str, file: str) -> tuple[Entry, ...]:
    """Return the entries of one file."""
    document = parse_toml(text, file)
    if "registries" in document:
        raise UsageError(
            file, "version 1 of the format ([registries.…]) is not read; use version 2"
        )
    tables = document.get("registry", [])
    if not isinstance(tables, list) or not all(isinstance(table, dict) for table in tables):
        raise UsageError(file, "registry must be tables: [[registry]]")
    entries: dict[str, Entry] = {}
    for entry in (_entry(file, table) for table in tables):
        # Of several the first counts, as for podman, unless it matters which.
        first = entries.setdefault(entry.prefix, entry)
        if (first.blocked, first.insecure) != (entry.blocked, entry.insecure):
            raise UsageError(
                file, f"{entry.prefix} stands there twice, with other words on blocked or insecure"
            )
    return tuple(entries.values())


def _drop_ins(path: Path) -> list[Path]:
    directory = path.with_name(f"{path.name}.d")
    try:
        return sorted(entry for entry in directory.iterdir() if entry.suffix == ".conf")
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError as error:
        raise UsageError(str(directory), f"cannot be read: {error.strerror}") from error


def _merged(files: list[Path]) -> RegistriesConf:
    entries: dict[str, Entry] = {}
    for file in files:
        for entry in parse_conf(_text(file), str(file)):
            entries[entry.prefix] = entry
    return RegistriesConf(tuple(entries.values()))


def _text(file: Path) -> str:
    try:
        with file.open("rb") as stream:
            data = stream.read(SIZE_LIMIT + 1)
    except OSError as error:
        raise UsageError(str(file), f"cannot be read: {error.strerror}") from error
    if len(data) > SIZE_LIMIT:
        raise UsageError(str(file), "too large for a registries.conf")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(str(file), "not UTF-8") from error


def _entry(file: str, table: dict[str, Any]) -> Entry:
    location = _location(file, table, "location")
    prefix = _location(file, table, "prefix") or location
    if not prefix:
        raise UsageError(file, "a [[registry]] has neither prefix nor location")
    if "*" in prefix and (prefix.rfind("*") > 0 or prefix[1:2] != "." or set(prefix) & set("/:@")):
        raise UsageError(
            file, f"prefix {prefix!r}: a '*' stands for subdomains only: *.example.com"
        )
    if "*" in location and location != prefix:
        raise UsageError(file, f"location {location!r}: a '*' can only be in a prefix")
    digest_only = _flag(file, table, "mirror-by-digest-only")
    mirrors = table.get("mirror", [])
    if not isinstance(mirrors, list) or not all(isinstance(one, dict) for one in mirrors):
        raise UsageError(file, "mirror must be tables: [[registry.mirror]]")
    return Entry(
        prefix=prefix,
        location="" if location == prefix else location,
        insecure=_flag(file, table, "insecure"),
        blocked=_flag(file, table, "blocked"),
        mirrors=tuple(_mirror(file, prefix, mirror, digest_only) for mirror in mirrors),
        file=file,
    )


def _mirror(file: str, prefix: str, table: dict[str, Any], digest_only: bool) -> Mirror:
    location = _location(file, table, "location")
    if not location or "*" in location:
        raise UsageError(file, f"a mirror of {prefix} has no location")
    use = table.get("pull-from-mirror", "")
    if use not in ("", ALL, DIGEST_ONLY, TAG_ONLY):
        raise UsageError(
            file, f"pull-from-mirror of {location} must be {ALL}, {DIGEST_ONLY} or {TAG_ONLY}"
        )
    if use and digest_only:
        raise UsageError(file, f"{prefix}: pull-from-mirror cannot be beside mirror-by-digest-only")
    use = DIGEST_ONLY if digest_only else use or ALL
    return Mirror(location, _flag(file, table, "insecure"), use)


def _location(file: str, table: dict[str, Any], key: str) -> str:
    value = table.get(key, "")
    if not isinstance(value, str):
        raise UsageError(file, f"{key} must be a string")
    if "://" in value:
        raise UsageError(file, f"{key} {value!r} has a scheme; leave it out")
    return value.rstrip("/")


def _flag(file: str, table: dict[str, Any], key: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise UsageError(file, f"{key} must be true or false")
    return value
