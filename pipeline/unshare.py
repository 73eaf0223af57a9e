"""Commands that see an image mounted without anybody's rights: in namespaces of their own.

Invariant: the mount is seen by the command and its children only and ends with them; the caller's
namespaces, threads and working directory stay as they are, because all of it happens in a child
process. A plain user becomes root of a new user namespace that knows his own ID alone (it shows as
0, all others as 65534), which needs no subuid ranges and no helper programs.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.pipeline import kernel
from stowray.pipeline.errors import StorageError, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

_HOLDER = "unshare "
# The child finds this very package without an environment variable that the command would inherit.
_CHILD = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from stowray.pipeline.unshare import child; child()"
)


def run_unshared(
    store: Store | None,
    chain_id: Digest | None,
    target: Path | None,
    command: Sequence[str],
    rw_upper: Path | None = None,
) -> int:
    """Run ``command`` in a new mount namespace and return its exit status.

    With ``target`` the chain is mounted there for the command. A command that a signal ended gives
    128 plus the signal's number, as shells do.
    """
    if not command:
        raise UsageError("unshare", "no command given")
    if target is None or store is None:
        return _spawn({"command": list(command), "map_user": os.geteuid() != 0})
    from stowray.pipeline.mount import mount_directory, sweep
    from stowray.pipeline.overlay_mount import prepare
    from stowray.pipeline.removal import remove_tree
    from stowray.pipeline.snapshot import Snapshots

    if not target.is_dir():
        raise StorageError(str(target), "no such directory: it is where the image appears")
    sweep(store)
    identity = secrets.token_hex(8)
    held = [] if chain_id is None else [chain_id]
    with store.lease(_HOLDER + identity, chain_ids=held):
        directory = mount_directory(store, identity)
        try:
            snapshots = Snapshots(store)
            lowers = snapshots.lowers(chain_id)
            options = prepare(directory, lowers, snapshots.privileged, rw_upper)
            return _spawn(
                {
                    "command": list(command),
                    "map_user": not snapshots.privileged,
                    "directory": str(directory),
                    "options": options.decode("ascii"),
                    "target": os.path.realpath(target),
                    "writable": rw_upper is not None,
                }
            )
        finally:
            remove_tree(directory)


def _spawn(task: dict[str, Any]) -> int:
    import subprocess

    reading, writing = os.pipe()
    root = Path(__file__).parent.parent
    if root.name == "stowray":
        root = root.parent
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", _CHILD, str(root), str(writing), json.dumps(task)],
            pass_fds=[writing],
        )
    finally:
        os.close(writing)
    with open(reading, encoding="utf-8") as stream:
        # Ctrl-C reaches the command from the terminal; what it makes of it is its affair.
        previous = None
        if threading.current_thread() is threading.main_thread():
            # Only the main thread may; another one is not interrupted anyway.
            previous = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            failure = stream.read()
            status = process.wait()
        finally:
            if previous is not None:
                signal.signal(signal.SIGINT, previous)
    if failure:
        raise StorageError(*json.loads(failure))
    return 128 - status if status < 0 else status


def child() -> None:
    """Enter the namespaces, mount, and become the command; a failure goes to the pipe."""
    pipe, task = int(sys.argv[1]), json.loads(sys.argv[2])
    os.set_inheritable(pipe, False)
    where, what = "unshare", ""
    try:
        what = "new namespaces are not allowed for this user (sysctl user.max_user_namespaces)"
        _enter(map_user=task["map_user"])
        if "target" in task:
            where, what = task["target"], "cannot be mounted on"
            _mount(task)
        where, what = task["command"][0], "cannot be run"
        for name in (signal.SIGPIPE, signal.SIGXFSZ):
            # Python ignores these two, and what is ignored stays so across execve(2).
            signal.signal(name, signal.SIG_DFL)
        os.execvp(task["command"][0], task["command"])
    except OSError as error:
        os.write(pipe, json.dumps([where, f"{what}: {error.strerror}"]).encode())
        os._exit(127)


def _enter(*, map_user: bool) -> None:
    user, group = os.geteuid(), os.getegid()
    kernel.unshare(kernel.CLONE_NEWNS | (kernel.CLONE_NEWUSER if map_user else 0))
    if map_user:
        # user_namespaces(7): without CAP_SETGID outside, setgroups must be given up first.
        Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1", encoding="ascii")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1", encoding="ascii")
    # What is mounted here must not travel back to where we came from.
    kernel.mount(b"none", b"/", b"", kernel.MS_REC | kernel.MS_PRIVATE)


def _mount(task: dict[str, Any]) -> None:
    from stowray.pipeline.overlay_mount import SOURCE

    here = os.open(".", os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.chdir(task["directory"])
        flags = 0 if task["writable"] else kernel.MS_RDONLY
        options = task["options"].encode("ascii")
        kernel.mount(SOURCE, os.fsencode(task["target"]), b"overlay", flags, options)
    finally:
        os.fchdir(here)
        os.close(here)
