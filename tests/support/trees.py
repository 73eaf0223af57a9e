"""Reads what Stowray made into the records that trees are compared by."""

from __future__ import annotations

import hashlib
import os
import stat
from typing import TYPE_CHECKING

from tests.support.judge import KINDS, Node

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.overlay import ChainView


def read_view(view: ChainView) -> dict[bytes, Node]:
    """Read every visible name of a stack of layer trees, the root as ``b"."``."""
    nodes = list(view.walk())
    groups: dict[tuple[int, int], list[bytes]] = {}
    for node in nodes:
        if not node.is_directory:
            groups.setdefault(node.inode, []).append(node.path)
    tree: dict[bytes, Node] = {}
    for node in nodes:
        names = groups.get(node.inode, []) if not node.is_directory else []
        content = b""
        if node.is_file:
            with open(view.open(node), "rb") as stream:
                content = stream.read()
            assert len(content) == node.size
        tree[node.path or b"."] = Node(
            kind=KINDS[node.file_type],
            mode=f"{node.mode:04o}",
            uid=node.uid,
            gid=node.gid,
            size=len(content),
            mtime_ns=node.mtime_ns,
            target=view.readlink(node) if node.is_symlink else b"",
            links=tuple(sorted(names)) if len(names) > 1 else (),
            xattrs=tuple(sorted((os.fsdecode(k), v) for k, v in view.xattrs(node).items())),
            device=node.device,
            content=hashlib.sha256(content).hexdigest() if node.is_file else "",
        )
    return tree


def snapshot(path: Path) -> dict[str, tuple[object, ...]]:
    """Everything that can be told of a directory on the host, to see whether it was touched."""
    found: dict[str, tuple[object, ...]] = {}
    for folder, folders, files in os.walk(path):
        for name in [".", *folders, *files]:
            item = os.path.join(folder, name)
            status = os.lstat(item)
            content = b""
            if stat.S_ISREG(status.st_mode):
                with open(item, "rb") as stream:
                    content = stream.read()
            found[item] = (
                status.st_mode,
                status.st_uid,
                status.st_gid,
                status.st_nlink,
                status.st_ino,
                status.st_size,
                status.st_mtime_ns,
                status.st_ctime_ns,
                content,
                tuple(os.listxattr(item, follow_symlinks=False)),
            )
    return found
