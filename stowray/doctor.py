"""What stands between this machine and a pulled image, found out by trying.

Invariant: a finding is made by doing the thing in a scratch place, nothing is left behind and no
setting is changed; every finding that is not ``ok`` says what to do. Secrets are never read into a
finding: of logins only the file and the registry's name.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from stowray.pipeline.errors import StorageError, StowrayError, escape
from stowray.pipeline.foundation import FORMAT, open_root, read_version, require_owner
from stowray.pipeline.probe import Capabilities, network_kind, probe
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.unshare import run_unshared
from stowray.text import size_text

if TYPE_CHECKING:
    from collections.abc import Iterator

State = Literal["ok", "warn", "problem"]

LITTLE_SPACE = 10 << 30
NO_SPACE = 1 << 30
FEW_FILES = 100_000
FEW_DESCRIPTORS = 4096
# A clock before this version of the program was made is wrong. 2026-11-01.
_PAST = 1_793_491_200.0
_TIME_ERROR = 5

_ROOT = Path(__file__).parent.parent
# Run in namespaces of its own; ends with the number of what went wrong.
_MOUNT = """
import os, sys
sys.path.insert(0, sys.argv[1])
from stowray.pipeline import kernel
os.chdir(sys.argv[2])
options = b"lowerdir=lower:other"
if os.path.exists("/proc/self/uid_map") and open("/proc/self/uid_map").read().split()[2] == "1":
    options += b",userxattr"
try:
    kernel.mount(b"stowray", b"point", b"overlay", kernel.MS_RDONLY, options)
except OSError as error:
    sys.exit(error.errno)
"""

# Programs that others use together with us, and what for.
PROGRAMS = {
    "runc": "bundles",
    "crun": "bundles",
    "skopeo": "the store as a layout",
    "umoci": "the store as a layout",
    "podman": "deliver --to podman",
    "docker": "deliver --to docker",
    "ctr": "deliver --to containerd",
    "mksquashfs": "rootfs --format squashfs",
}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing looked at; ``advice`` is empty exactly where the state is ``ok``."""

    check: str
    state: State
    found: str
    advice: str = ""

    def to_dict(self) -> dict[str, str]:
        """Return the finding as the JSON line of ``doctor --json``."""
        return asdict(self)


def examine_program() -> Finding:
    """Return the versions of this program and of what it runs on."""
    from stowray import __version__

    system = os.uname()
    python = ".".join(map(str, sys.version_info[:3]))
    found = f"stowray {__version__}, Python {python}, {system.sysname} {system.release}"
    kernel = tuple(int(part) for part in re.findall(r"\d+", system.release)[:2])
    if kernel < (5, 11):
        return Finding(
            "versions",
            "warn",
            f"{found} ({system.machine})",
            "a plain user's mounts need Linux 5.11 or newer",
        )
    return Finding("versions", "ok", f"{found} ({system.machine})")


def examine_machine(store: Path) -> Iterator[Finding]:
    """Yield what is found of this machine and of the place of the store."""
    yield from examine_store(store)
    yield examine_namespaces()
    yield examine_overlay(store)
    yield examine_descriptors()
    yield examine_clock()
    yield examine_programs()


def examine_store(store: Path) -> Iterator[Finding]:
    """Yield privileges, what the file system can do, and the room on it."""
    place = existing(store)
    try:
        capabilities = _probe_at(place)
    except StowrayError as error:
        yield Finding(
            "store",
            "problem",
            escape(str(error)),
            f"make {escape(str(store))} yourself, writable for this user, or give another --store",
        )
        return
    try:
        version = read_version(store) if store == place else None
    except StowrayError as error:
        advice = "`stowray verify --repair` writes a damaged version anew"
        yield Finding("store", "problem", escape(str(error)), advice)
        return
    if version is not None and version > FORMAT:
        found = f"{escape(str(store))} is of store format {version}, and {FORMAT} is known here"
        yield Finding("store", "problem", found, "upgrade stowray, or give another --store")
        return
    there = "is there" if store == place else "will be made by the first pull"
    yield _owner(store) or Finding("store", "ok", f"{escape(str(store))} {there}")
    yield _privileges(capabilities)
    yield _file_system(place, capabilities)
    yield from _space(place)


def _owner(store: Path) -> Finding | None:
    """Return what is to be said of a store that belongs to somebody else."""
    if not store.is_dir() or store.stat().st_uid == os.geteuid():
        return None
    owner = store.stat().st_uid
    advice = f"run as user {owner} (`sudo -u '#{owner}' stowray`), or give another --store"
    descriptor = open_root(store, create=False)
    try:
        require_owner(store, descriptor)
    except StowrayError as error:
        return Finding("store", "problem", escape(str(error)), advice)
    finally:
        os.close(descriptor)
    if not (store / "version").is_file():
        return None
    found = f"{escape(str(store))} belongs to user {owner}, and this is user {os.geteuid()}"
    return Finding("store", "warn", found, advice)


def existing(path: Path) -> Path:
    """Return the nearest directory at or above ``path`` that exists."""
    while not path.is_dir() and path != path.parent:
        path = path.parent
    return path


def _probe_at(place: Path) -> Capabilities:
    if not os.access(place, os.W_OK | os.X_OK):
        raise StorageError(str(place), "this user may not write there")
    return probe(place)


def _privileges(capabilities: Capabilities) -> Finding:
    user = os.geteuid()
    if capabilities.privileged:
        return Finding("privileges", "ok", "root: owners, devices and mounts are real")
    if user == 0:
        return Finding(
            "privileges",
            "warn",
            "root by number only (a container or user namespace): no devices, no trusted.* xattrs",
            "trees keep owners aside as a plain user's do; for real ones run privileged",
        )
    return Finding(
        "privileges", "ok", f"user {user}: owners and devices are kept aside, mounts by `unshare`"
    )


def _file_system(place: Path, capabilities: Capabilities) -> Finding:
    missing = capabilities.missing()
    if missing:
        return Finding(
            "file system",
            "problem",
            f"lacks {', '.join(missing)}",
            "choose a --store on a local Linux file system (ext4, xfs, btrfs, tmpfs)",
        )
    kind = network_kind(place)
    if kind:
        return Finding(
            "file system",
            "warn",
            f"{kind}, a network file system",
            "let one node write to it, or give each node its own: --store /local/disk/{node}",
        )
    return Finding("file system", "ok", "locks, atomic renames, links, attributes, whiteouts")


def _space(place: Path) -> Iterator[Finding]:
    room = os.statvfs(place)
    free = room.f_bavail * room.f_frsize
    found = f"{size_text(free)} free"
    advice = (
        "free space (`stowray gc`) or choose another --store; images need 2 to 4 times the pull"
    )
    state: State = "problem" if free < NO_SPACE else "warn" if free < LITTLE_SPACE else "ok"
    yield Finding("disk space", state, found, "" if state == "ok" else advice)
    if room.f_files and room.f_favail < FEW_FILES:
        yield Finding(
            "disk files",
            "warn",
            f"room for {room.f_favail} more files (inodes)",
            "an operating system's image has tens of thousands: choose a --store with more inodes",
        )


def examine_namespaces() -> Finding:
    """Return whether this user can make the namespaces that ``unshare`` needs."""
    try:
        status = run_unshared(None, None, None, [sys.executable, "-I", "-c", ""])
    except StorageError as error:
        return Finding("namespaces", "warn", escape(error.reason), _namespace_advice())
    if status:
        return Finding("namespaces", "warn", f"ended with {status}", _namespace_advice())
    kind = "mount namespaces" if os.geteuid() == 0 else "user and mount namespaces"
    return Finding("namespaces", "ok", f"{kind} can be made")


def _namespace_advice() -> str:
    for name, closed in (
        ("kernel/apparmor_restrict_unprivileged_userns", "1"),
        ("kernel/unprivileged_userns_clone", "0"),
        ("user/max_user_namespaces", "0"),
    ):
        with suppress(OSError):
            if Path("/proc/sys", name).read_text(encoding="ascii").strip() == closed:
                setting = name.replace("/", ".")
                return f"`unshare` needs them: have an administrator change sysctl {setting}"
    return "`unshare` needs them; in a container its seccomp profile has to allow unshare(2)"


def examine_overlay(store: Path) -> Finding:
    """Return whether an overlay can be mounted over directories where the store is."""
    place = existing(store)
    try:
        folder = Path(tempfile.mkdtemp(prefix=".stowray-doctor-", dir=place))
    except OSError as error:
        return Finding("overlay", "warn", f"not tried: {error.strerror}", "see the store's line")
    try:
        for name in ("lower", "other", "point"):
            (folder / name).mkdir()
        command = [sys.executable, "-I", "-c", _MOUNT, str(_ROOT), str(folder)]
        status = run_unshared(None, None, None, command)
        reason = os.strerror(status)
    except StorageError as error:
        status, reason = -1, escape(error.reason)
    finally:
        remove_tree(folder)
    if status == 0:
        return Finding("overlay", "ok", "can be mounted where the store is")
    return Finding(
        "overlay",
        "warn",
        f"cannot be mounted: {reason}",
        "`mount` and `unshare` will fail; `rootfs` and `bundle` copies work without (in user "
        "namespaces it needs Linux 5.11; the store must not lie on an overlay itself)",
    )


def examine_descriptors() -> Finding:
    """Return whether a process may open enough files."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    count = "any number of" if hard == resource.RLIM_INFINITY else str(hard)
    if hard != resource.RLIM_INFINITY and hard < FEW_DESCRIPTORS:
        return Finding(
            "open files",
            "warn",
            f"{count} at most",
            f"images of many layers need more: raise the hard limit of `ulimit -Hn` to "
            f"{FEW_DESCRIPTORS}",
        )
    return Finding("open files", "ok", f"{count} at most")


def examine_clock() -> Finding:
    """Return whether the clock is plausible and kept by a time service."""
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    if time.time() < _PAST:
        return Finding(
            "clock",
            "problem",
            f"{now}, before this program was made",
            "set it: certificates and tokens of registries depend on it",
        )
    if not _is_kept():
        return Finding(
            "clock",
            "warn",
            f"{now}, not kept by a time service",
            "if registries refuse certificates or tokens, run chrony or systemd-timesyncd",
        )
    return Finding("clock", "ok", now)


def _is_kept() -> bool:
    """Return whether the kernel calls its clock synchronised (adjtimex(2), TIME_ERROR)."""
    import ctypes

    buffer = (ctypes.c_ulong * 64)()  # larger than struct timex; modes 0 changes nothing
    state: int = ctypes.CDLL(None).adjtimex(ctypes.byref(buffer))
    return state != _TIME_ERROR


def examine_programs() -> Finding:
    """Return which programs are here that others use together with us; none is needed."""
    here = [name for name in PROGRAMS if shutil.which(name, path=_search_path())]
    absent = [name for name in PROGRAMS if name not in here]
    found = f"{', '.join(here) or 'none'} here"
    if absent:
        found += f"; not here, for {_purposes(absent)}: {', '.join(absent)}"
    return Finding("programs", "ok", found)


def _purposes(names: list[str]) -> str:
    return ", ".join(dict.fromkeys(PROGRAMS[name] for name in names))


def _search_path() -> str:
    # A plain user's PATH often lacks where the tools of root are.
    return os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])
