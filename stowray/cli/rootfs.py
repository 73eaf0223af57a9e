"""Carry out ``rootfs``: a tree, a tar or a squashfs file, and what was left out of it."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stowray.cli.streams import answering
from stowray.pipeline.errors import UsageError

if TYPE_CHECKING:
    from stowray.cli.context import Context
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.store import Store

_SHOWN = 5


def prepare(destination: str, form: str) -> None:
    """Raise before anything is pulled if ``destination`` cannot take the result."""
    if not destination:
        raise UsageError("DEST", "is empty: name a directory or a file")
    if destination == "-":
        if form != "tar":
            raise UsageError(destination, "only --format tar can go to stdout")
        if sys.stdout.isatty():
            raise UsageError(destination, "a terminal cannot show a tar: send it to a file or pipe")
    elif form == "dir":
        from stowray.pipeline.rootfs import check_destination

        check_destination(Path(destination).absolute())
    else:
        from stowray.pipeline.rootfs_file import check_file

        check_file(Path(destination).absolute(), form)  # type: ignore[arg-type]


def write(
    context: Context,
    store: Store,
    chain_id: Digest | None,
    destination: str,
    form: str,
    link: str,
) -> dict[str, Any]:
    """Write the tree, tell on stderr what was left out, and return the figures of the answer."""
    target = Path(destination).absolute()
    if form == "dir":
        from stowray.pipeline.rootfs import write_rootfs

        made = write_rootfs(store, chain_id, target, link=link)  # type: ignore[arg-type]
        _tell(context, made.skipped)
        figures: dict[str, Any] = {"link": link, "entries": made.entries, "size": made.size}
        return {**figures, "skipped": made.skipped}
    from stowray.pipeline.rootfs_file import write_file, write_stream

    if destination == "-":
        sys.stdout.flush()
        with answering():
            written = write_stream(store, chain_id, sys.stdout.fileno())
    else:
        written = write_file(store, chain_id, target, form)  # type: ignore[arg-type]
    _tell(context, list(written.skipped))
    return {"entries": written.entries, "size": written.size, "skipped": list(written.skipped)}


def _tell(context: Context, skipped: list[str]) -> None:
    if not skipped or context.value("quiet"):
        return
    shown = skipped if context.value("verbose") else skipped[:_SHOWN]
    more = len(skipped) - len(shown)
    names = ", ".join(shown) + (f" and {more} more (-v)" if more else "")
    why = "this user may not make them" if os.geteuid() != 0 else "they cannot be made here"
    context.log("warning", "left-out", f"left out, {why}: {names}")
