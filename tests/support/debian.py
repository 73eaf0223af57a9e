"""A real system tree: `debootstrap --variant=minbase`, or a copy of parts of the running system.

Invariant: no host is named here. The mirror and the release are those of the machine's own apt
configuration; without apt, network or root, the running system gives the files.
"""

from __future__ import annotations

import os
import shutil
import stat
import struct
import subprocess
from pathlib import Path

from tests.support import peers

BOOTSTRAP_SECONDS = 240
# struct vfs_cap_data, revision 2, effective: cap_net_raw (bit 13) permitted.
NET_RAW = struct.pack("<IIIII", 0x02000001, 1 << 13, 0, 0, 0)
SYSTEM_PARTS = (
    "/usr/lib/python3",
    "/usr/share/zoneinfo",
    "/usr/share/perl",
    "/usr/share/doc",
    "/usr/share/terminfo",
    "/etc/alternatives",
    "/usr/share/man",
    "/usr/include",
)
WANTED_FILES = 6000


def system_tree(target: Path) -> str:
    """Fill `target` with a real system tree; return where it came from."""
    origin = _bootstrap(target)
    if origin is None:
        shutil.rmtree(target, ignore_errors=True)
        origin = _copy_running_system(target)
    _add_rarities(target)
    return origin


def mirror() -> tuple[str, str] | None:
    """The archive and release that this machine's apt installs the base system from."""
    if peers.missing("apt-get"):
        return None
    codename = _codename()
    listed = peers.attempt(
        [
            "apt-get",
            "indextargets",
            "--format",
            "$(SITE) $(RELEASE) $(COMPONENT)",
            "Created-By: Packages",
        ]
    )
    for line in listed.stdout.splitlines():
        site, release, component = (*line.split(), "", "", "")[:3]
        if (release, component) == (codename, "main") and site.startswith(("http://", "https://")):
            return site, release
    return None


def _codename() -> str:
    release = Path("/etc/os-release")
    if release.exists():
        for line in release.read_text().splitlines():
            key, _, value = line.partition("=")
            if key == "VERSION_CODENAME":
                return value.strip('"')
    return ""


def _bootstrap(target: Path) -> str | None:
    source = mirror()
    if os.geteuid() != 0 or source is None or peers.missing("debootstrap"):
        return None
    site, release = source
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    try:
        done = subprocess.run(
            ["debootstrap", "--variant=minbase", release, str(target), site],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=BOOTSTRAP_SECONDS,
            check=False,
            env={**os.environ, "PATH": path, "DEBIAN_FRONTEND": "noninteractive"},
        )
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        return None
    # As published images do: no package cache and no lists.
    for leftover in (
        *target.glob("var/cache/apt/archives/*.deb"),
        *target.glob("var/lib/apt/lists/*"),
    ):
        if leftover.is_file():
            leftover.unlink()
    return f"debootstrap {release}"


def _copy_running_system(target: Path) -> str:
    copied = 0
    for part in SYSTEM_PARTS:
        for folder, folders, files in os.walk(part):
            folders.sort()
            inside = target / folder.lstrip("/")
            inside.mkdir(parents=True, exist_ok=True)
            for name in sorted([*files, *(f for f in folders if (Path(folder) / f).is_symlink())]):
                source = Path(folder) / name
                mode = source.lstat().st_mode
                if (stat.S_ISREG(mode) and os.access(source, os.R_OK)) or stat.S_ISLNK(mode):
                    shutil.copy2(source, inside / name, follow_symlinks=False)
                    copied += 1
            if copied >= WANTED_FILES:
                break
        if copied >= WANTED_FILES:
            break
    for shell in ("/bin/sh", "/bin/echo"):
        program = Path(shell).resolve()
        (target / "bin").mkdir(exist_ok=True)
        shutil.copy2(program, target / "bin" / Path(shell).name)
    return "running system"


def _add_rarities(target: Path) -> None:
    """What every system tree of the tests has: link groups, set-id bits, xattrs, odd names."""
    folder = target / "opt" / "rarities"
    folder.mkdir(parents=True)
    first = folder / "linked"
    first.write_bytes(b"one inode, three names\n")
    os.link(first, folder / "linked again")
    os.link(first, target / "opt" / "linked-elsewhere")
    for name, mode in (("setuid", 0o4755), ("setgid", 0o2755), ("sticky", 0o1644), ("none", 0)):
        path = folder / name
        path.write_bytes(name.encode())
        path.chmod(mode)
    (folder / "ünïcode ✓").write_bytes(b"")
    (folder / ("long-" + "n" * 240)).write_bytes(b"x")
    os.symlink("../../../no/such/target", folder / "dangling")
    os.symlink("x" * 1000, folder / "long-target")
    os.mkfifo(folder / "fifo", 0o640)
    deep = folder.joinpath(*["deep-directory-name"] * 12)
    deep.mkdir(parents=True)
    (deep / "leaf").write_bytes(b"leaf")
    if os.geteuid() == 0:
        os.chown(first, 12345, 54321)
        capable = folder / "capable"
        capable.write_bytes(b"#!/bin/sh\n")
        capable.chmod(0o755)
        os.setxattr(capable, "security.capability", NET_RAW)
    os.utime(first, ns=(1_600_000_000_123_456_789, 1_600_000_000_123_456_789))
    os.utime(folder, ns=(1_500_000_000_000_000_001, 1_500_000_000_000_000_001))
