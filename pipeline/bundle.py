"""OCI runtime bundles: a root filesystem and the ``config.json`` that runs it.

Invariant: ``config.json`` is written last, so that a bundle that can be started is complete; the
image's account files are read inside the image (symlinks included) and never on the host.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline import strict_json
from stowray.pipeline.errors import ManifestError, StorageError
from stowray.pipeline.files import make_directory, replace_file, translated
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.rootfs import flatten
from stowray.pipeline.runtime_spec import Host, RunConfig, resolve_user, runtime_config

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from stowray.pipeline.descriptor import ImageConfig
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.overlay import ChainView
    from stowray.pipeline.overlay_node import Node
    from stowray.pipeline.rootfs import Flattened, Link
    from stowray.pipeline.store import Store

_UNIFIED = Path("/sys/fs/cgroup/cgroup.controllers")
_ACCOUNT_LIMIT = 4 << 20
_LINKS = 40


def write_bundle(
    store: Store,
    config: Digest,
    chain_id: Digest | None,
    destination: Path,
    *,
    link: Link = "auto",
    arguments: Sequence[str] = (),
    terminal: bool = False,
    cancelled: Callable[[], bool] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Flattened:
    """Make a bundle of an image in the store: its config's digest and its chain ID."""
    from stowray.pipeline.documents import CONFIG_LIMIT, parse_config
    from stowray.pipeline.snapshot import Snapshots

    parsed = parse_config(store.read_blob(config, CONFIG_LIMIT), config)
    with Snapshots(store).held(chain_id, "bundle") as view:
        return make_bundle(
            view,
            parsed,
            config,
            destination,
            link=link,
            arguments=arguments,
            terminal=terminal,
            cancelled=cancelled,
            warn=warn,
        )


def make_bundle(
    view: ChainView,
    config: ImageConfig,
    digest: str,
    destination: Path,
    *,
    link: Link = "auto",
    arguments: Sequence[str] = (),
    terminal: bool = False,
    cancelled: Callable[[], bool] | None = None,
    warn: Callable[[str], None] | None = None,
) -> Flattened:
    """Make a bundle at ``destination`` (empty, or made with mode 0700) from the merged tree.

    ``digest`` is the config's, for messages. A plain user's bundle maps his own ID to root and runs
    as root, whomever the image names; ``warn`` is given a sentence if that is somebody else.
    """
    try:
        document = strict_json.parse_object(config.raw)
    except strict_json.JSONError as error:
        raise ManifestError(digest, f"config: {error}") from None
    run = RunConfig.parse(document, digest)
    user = resolve_user(
        run.user, read_inside(view, b"etc/passwd"), read_inside(view, b"etc/group"), digest
    )
    plain = None if view.privileged else (os.geteuid(), os.getegid())
    host = Host(unified_cgroups=_UNIFIED.exists(), user=plain)
    if warn is not None and host.replaces(user):
        warn(
            f"the image's user {user.uid}:{user.gid} is not mapped, a plain user's bundle knows "
            "root only, which is you outside: it runs as root"
        )
    content = runtime_config(run, user, host, arguments=arguments, terminal=terminal)
    destination = destination.absolute()
    with translated(destination, "make the bundle"):
        # Closed to others: there may be setuid files below (CVE-2021-41091).
        made = make_directory(destination)
        if not made and any(destination.iterdir()):
            raise StorageError(str(destination), "is not empty: name an empty or a new directory")
    try:
        result = flatten(view, destination / "rootfs", link, cancelled=cancelled)
        with translated(destination, "write the bundle's configuration"):
            text = json.dumps(content, indent="\t", ensure_ascii=True)
            replace_file(destination / "config.json", text.encode("ascii") + b"\n", mode=0o644)
    except BaseException:
        remove_tree(destination / "rootfs")
        if made:
            remove_tree(destination)
        raise
    return result


def read_inside(view: ChainView, path: bytes) -> bytes:
    """Return a small file of the image, symlinks resolved inside its root; empty if absent."""
    node = _resolve(view, path)
    if node is None or not node.is_file or node.size > _ACCOUNT_LIMIT:
        return b""
    descriptor = view.open(node)
    with open(descriptor, "rb") as file, translated(os.fsdecode(path), "read a file of the image"):
        return file.read(_ACCOUNT_LIMIT)


def _resolve(view: ChainView, path: bytes) -> Node | None:
    waiting = path.split(b"/")[::-1]
    here: list[bytes] = []
    links = 0
    node: Node | None = view.find(b"")
    while waiting:
        part = waiting.pop()
        if part in (b"", b"."):
            continue
        if part == b"..":
            # The root's parent is the root, as for a process inside.
            del here[-1:]
            continue
        node = view.find(b"/".join([*here, part]))
        if node is None:
            return None
        if node.is_symlink:
            links += 1
            if links > _LINKS:
                return None
            target = view.readlink(node)
            if target.startswith(b"/"):
                here.clear()
            waiting += target.split(b"/")[::-1]
        else:
            here.append(part)
    return view.find(b"/".join(here))
