"""The runtime configuration (``config.json``) that an image config asks for.

Invariant: what the image says is converted as the image specification has it (conversion.md); what
it does not say is what ``runc spec`` and containerd give by default, with no inheritable or ambient
capabilities (CVE-2022-24769). Pure data in, pure data out.
"""

from __future__ import annotations

from dataclasses import field
from typing import TYPE_CHECKING, Any

from stowray.pipeline.errors import ManifestError, escape
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Sequence

VERSION = "1.0.2"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_CAPABILITIES = [
    "CAP_AUDIT_WRITE",
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_MKNOD",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_RAW",
    "CAP_SETFCAP",
    "CAP_SETGID",
    "CAP_SETPCAP",
    "CAP_SETUID",
    "CAP_SYS_CHROOT",
]
_MASKED = [
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
]
_READONLY = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"]
_LARGEST_ID = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class User:
    """Whom the process runs as."""

    uid: int = 0
    gid: int = 0
    additional: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class RunConfig:
    """What an image config says of how to run it; fields as in image-spec config.md."""

    user: str = ""
    environment: tuple[str, ...] = ()
    entrypoint: tuple[str, ...] = ()
    command: tuple[str, ...] = ()
    directory: str = ""
    annotations: dict[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, document: dict[str, Any], digest: str) -> RunConfig:
        """Read the fields of a config document; one of another type is a ManifestError."""
        config = document.get("config") or {}
        if not isinstance(config, dict):
            raise ManifestError(digest, "config: 'config' is no object")
        return cls(
            user=_text(config, "User", digest),
            environment=_texts(config, "Env", digest),
            entrypoint=_texts(config, "Entrypoint", digest),
            command=_texts(config, "Cmd", digest),
            directory=_text(config, "WorkingDir", digest),
            annotations=_annotations(document, config, digest),
        )


@dataclass(frozen=True, slots=True)
class Host:
    """What the machine asks of the configuration; ``user`` is set for a plain user.

    His user namespace maps one ID, his own, to root: a process in it can be nobody else and can be
    given no further groups.
    """

    unified_cgroups: bool = False
    user: tuple[int, int] | None = None

    def replaces(self, user: User) -> bool:
        """Tell whether the process of ``user`` must run as root instead."""
        return self.user is not None and (user.uid, user.gid) != (0, 0)


def runtime_config(
    config: RunConfig,
    user: User,
    host: Host,
    *,
    arguments: Sequence[str] = (),
    terminal: bool = False,
) -> dict[str, Any]:
    """Return the document; ``arguments`` take the place of the image's command."""
    if host.user is not None:
        user = User()
    # What is no variable runc refuses to start with, where Docker passes over it.
    environment = [text for text in config.environment if text.find("=") > 0]
    if not any(text.startswith("PATH=") for text in environment):
        environment.insert(0, _PATH)
    if terminal and not any(text.startswith("TERM=") for text in environment):
        environment.append("TERM=xterm")
    command = [*config.entrypoint, *(arguments or config.command)] or ["sh"]
    directory = config.directory or "/"
    return {
        "ociVersion": VERSION,
        "process": {
            "terminal": terminal,
            "user": {
                "uid": user.uid,
                "gid": user.gid,
                **({"additionalGids": list(user.additional)} if user.additional else {}),
            },
            "args": command,
            "env": environment,
            "cwd": directory if directory.startswith("/") else f"/{directory}",
            "capabilities": {
                kind: list(_CAPABILITIES) for kind in ("bounding", "effective", "permitted")
            },
            "rlimits": [{"type": "RLIMIT_NOFILE", "hard": 1024, "soft": 1024}],
            "noNewPrivileges": True,
        },
        "root": {"path": "rootfs", "readonly": False},
        "hostname": "stowray",
        "mounts": _mounts(host),
        "annotations": config.annotations,
        "linux": _linux(host),
    }


def resolve_user(text: str, passwd: bytes, group: bytes, digest: str) -> User:
    """Return the IDs that ``user[:group]`` means with the image's own account files.

    Without a group, the user's own group and those that list him apply (config.md, ``User``).
    """
    name, colon, group_name = text.partition(":")
    accounts = [line.split(b":") for line in passwd.splitlines()]
    groups = [line.split(b":") for line in group.splitlines()]
    account = _account(name or "0", accounts)
    if account is not None:
        uid, gid = int(account[2]), int(account[3])
    else:
        uid, gid = _number(name or "0", "user", "/etc/passwd", digest), 0
    if colon and group_name:
        found = _named(group_name, groups, 2)
        if found is None:
            return User(uid, _number(group_name, "group", "/etc/group", digest))
        return User(uid, int(found[2]))
    additional: list[int] = []
    if account is not None:
        for fields in groups:
            if len(fields) > 3 and account[0] in fields[3].split(b",") and _is_id(fields[2]):
                additional.append(int(fields[2]))
    return User(uid, gid, tuple(dict.fromkeys(additional)))


def _account(name: str, accounts: list[list[bytes]]) -> list[bytes] | None:
    usable = [fields for fields in accounts if len(fields) > 3 and _is_id(fields[3])]
    return _named(name, usable, 2)


def _named(name: str, rows: list[list[bytes]], column: int) -> list[bytes] | None:
    """Return the row of that name, or else of that ID."""
    wanted = name.encode("utf-8", "surrogateescape")
    usable = [fields for fields in rows if len(fields) > column and _is_id(fields[column])]
    for fields in usable:
        if fields[0] == wanted:
            return fields
    if _is_id(wanted):
        for fields in usable:
            if int(fields[column]) == int(wanted):
                return fields
    return None


def _is_id(text: bytes) -> bool:
    return 0 < len(text) <= 10 and text.isascii() and text.isdigit() and int(text) <= _LARGEST_ID


def _number(text: str, kind: str, file: str, digest: str) -> int:
    if not _is_id(text.encode("utf-8", "surrogateescape")):
        raise ManifestError(digest, f"config: {kind} {escape(text)!r} is not in the image's {file}")
    return int(text)


def _text(fields: dict[str, Any], name: str, digest: str) -> str:
    value = fields.get(name)
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value:
        raise ManifestError(digest, f"config: '{name}' is no text")
    return value


def _texts(fields: dict[str, Any], name: str, digest: str) -> tuple[str, ...]:
    value = fields.get(name)
    if value is None:
        return ()
    if isinstance(value, list) and all(isinstance(v, str) and "\0" not in v for v in value):
        return tuple(value)
    raise ManifestError(digest, f"config: '{name}' is no list of texts")


def _annotations(document: dict[str, Any], config: dict[str, Any], digest: str) -> dict[str, str]:
    """Return the annotations of conversion.md; the image's own labels win."""
    prefix = "org.opencontainers.image."
    found = {
        prefix + name: value
        for name in ("os", "architecture", "variant", "author", "created")
        if isinstance(value := document.get(name), str) and value
    }
    stop = _text(config, "StopSignal", digest)
    if stop:
        found[prefix + "stopSignal"] = stop
    ports = config.get("ExposedPorts")
    if isinstance(ports, dict) and ports:
        found[prefix + "exposedPorts"] = ",".join(sorted(ports))
    labels = config.get("Labels")
    if isinstance(labels, dict):
        found.update(
            (name, value or "")
            for name, value in labels.items()
            if name and (value is None or isinstance(value, str))
        )
    return found


def _mount(destination: str, kind: str, source: str, options: str) -> dict[str, Any]:
    entry = {"destination": destination, "type": kind, "source": source}
    return {**entry, "options": options.split(",")} if options else entry


def _mounts(host: Host) -> list[dict[str, Any]]:
    # Group 5 (tty) does not exist in a user namespace that knows one ID only.
    terminals = "nosuid,noexec,newinstance,ptmxmode=0666,mode=0620"
    mounts = [
        _mount("/proc", "proc", "proc", "nosuid,noexec,nodev"),
        _mount("/dev", "tmpfs", "tmpfs", "nosuid,strictatime,mode=755,size=65536k"),
        _mount("/dev/pts", "devpts", "devpts", terminals + ("" if host.user else ",gid=5")),
        _mount("/dev/shm", "tmpfs", "shm", "nosuid,noexec,nodev,mode=1777,size=65536k"),
        _mount("/dev/mqueue", "mqueue", "mqueue", "nosuid,noexec,nodev"),
    ]
    if host.user:
        # Only the owner of the network namespace may mount a sysfs.
        mounts.append(_mount("/sys", "none", "/sys", "rbind,nosuid,noexec,nodev,ro"))
    else:
        mounts.append(_mount("/sys", "sysfs", "sysfs", "nosuid,noexec,nodev,ro"))
        groups = "nosuid,noexec,nodev,relatime,ro"
        mounts.append(_mount("/sys/fs/cgroup", "cgroup", "cgroup", groups))
    return mounts


def _linux(host: Host) -> dict[str, Any]:
    kinds = ["pid", "ipc", "uts", "mount"]
    linux: dict[str, Any] = {}
    if host.user:
        kinds.append("user")
        for name, identity in zip(("uidMappings", "gidMappings"), host.user, strict=True):
            linux[name] = [{"containerID": 0, "hostID": identity, "size": 1}]
    else:
        kinds.append("network")
        linux["resources"] = {"devices": [{"allow": False, "access": "rwm"}]}
    if host.unified_cgroups:
        kinds.append("cgroup")
    linux["namespaces"] = [{"type": kind} for kind in kinds]
    linux["maskedPaths"] = list(_MASKED)
    linux["readonlyPaths"] = list(_READONLY)
    return linux
