"""Commands that hand out a root filesystem: ``rootfs``, ``mount``, ``unshare``, ``bundle``."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from stowray.cli.context import command
from stowray.cli.help import HelpfulCommand

if TYPE_CHECKING:
    from collections.abc import Callable

    from stowray.cli.context import Context
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.result import PullResult
    from stowray.pipeline.store import Store

_OFFLINE = click.option("--offline", is_flag=True, help="Do not pull what is missing.")
_POLICY = click.option(
    "--policy",
    type=click.Choice(["newer", "missing", "always", "never"]),
    default="missing",
    show_default=True,
    help="When to ask the registry.",
)


def _with_tree(
    context: Context,
    reference: str,
    policy: str,
    offline: bool,
    act: Callable[[Store, PullResult, Digest | None], dict[str, Any]],
    show: Callable[[dict[str, Any]], None] | None = None,
) -> int:
    """Pull ``reference`` if it is not here, then ``act`` on its tree and print the answer."""
    from stowray.cli.work import Work
    from stowray.pipeline.digest import Digest
    from stowray.pipeline.engine import PullOptions
    from stowray.pipeline.source import parse_source

    options = PullOptions(policy="never" if offline else policy)  # type: ignore[arg-type]

    def run(text: str, cancelled: Callable[[], bool]) -> dict[str, Any]:
        # The handle's lease holds the tree until the act is done.
        source = parse_source(text)
        image, lease = work.engine.hold_image(source, options, cancelled)
        with lease:
            result = work.engine.pull_image(source, image, options, cancelled)
            # An image may have no layers: its tree is empty and has no chain ID.
            chain_id = Digest(result.chain_id) if result.chain_id else None
            return act(work.engine.store, result, chain_id)

    def print_answer(answer: dict[str, Any]) -> None:
        print(json.dumps(answer) if context.json else answer["path"])  # noqa: T201

    with Work(context) as work:
        return work.each([reference], run, show or print_answer)


@command("rootfs", short_help="Write an image's root filesystem to a directory or file.")
@click.argument("reference", metavar="REF")
@click.argument("destination", metavar="DEST")
@click.option(
    "--format",
    "form",
    type=click.Choice(["dir", "tar", "squashfs"]),
    default="dir",
    show_default=True,
    help="A tree at DEST, or a new file DEST; tar to stdout where DEST is -.",
)
@click.option(
    "--link",
    type=click.Choice(["auto", "reflink", "copy", "hardlink"]),
    default="auto",
    show_default=True,
    help="hardlink shares files with the store: the result must not be written to.",
)
@_OFFLINE
@_POLICY
def rootfs_command(
    context: Context,
    reference: str,
    destination: str,
    form: str,
    link: str,
    offline: bool,
    policy: str,
) -> int:
    """Write the root filesystem of REF to DEST, which must not exist or be an empty directory.

    As a plain user a tree lacks devices and has your files only, which is said; tar and squashfs
    files keep both, whoever makes them. squashfs needs mksquashfs (squashfs-tools).
    """
    from stowray.cli.rootfs import prepare, write

    target = Path(destination).absolute()

    def act(store: Store, result: PullResult, chain_id: Digest | None) -> dict[str, Any]:
        answer = {
            "reference": result.reference,
            "path": destination if destination == "-" else str(target),
            "chain_id": result.chain_id,
            "format": form,
        }
        return answer | write(context, store, chain_id, destination, form, link)

    prepare(destination, form)
    show = (lambda _answer: None) if destination == "-" else None
    return _with_tree(context, reference, policy, offline, act, show)


@command("mount", short_help="Mount an image's root filesystem.")
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR")
@click.option("--rw", "upper", metavar="UPPERDIR", help="Writable: changes go to UPPERDIR.")
@_OFFLINE
@_POLICY
def mount_command(
    context: Context, reference: str, directory: str, upper: str | None, offline: bool, policy: str
) -> int:
    """Mount the root filesystem of REF at DIR, read-only, until `umount` or a reboot.

    The image is held against `gc` for that time. With --rw the directory for overlay's own use
    is made beside UPPERDIR. As a plain user see `unshare`.
    """
    from stowray.pipeline.mount import mount

    target = Path(directory).absolute()

    def act(store: Store, result: PullResult, chain_id: Digest | None) -> dict[str, Any]:
        mount(store, chain_id, target, rw_upper=Path(upper).absolute() if upper else None)
        return {
            "reference": result.reference,
            "path": str(target),
            "chain_id": result.chain_id,
            "read_only": upper is None,
        }

    return _with_tree(context, reference, policy, offline, act)


@command("umount", short_help="Unmount what `mount` mounted.")
@click.argument("directory", metavar="DIR")
def umount_command(context: Context, directory: str) -> int:
    """Unmount DIR and let its image go."""
    from stowray.pipeline.mount import umount

    umount(context.open_store(), Path(directory).absolute())
    if context.json:
        print(json.dumps({"path": str(Path(directory).absolute()), "mounted": False}))  # noqa: T201
    return 0


class _CommandAfterDashes(HelpfulCommand):
    """A command that leaves what comes after the first ``--`` as it is: another command's words."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Parse what comes before, and keep the rest for the function."""
        place = args.index("--") if "--" in args else len(args)
        ctx.meta[_WORDS] = tuple(args[place + 1 :])
        return super().parse_args(ctx, args[:place])


_WORDS = "stowray.words"


@command(
    "unshare",
    cls=_CommandAfterDashes,
    short_help="Run a command beside an image's mount in own namespaces.",
)
@click.argument("mounts", metavar="[REF DIR] -- COMMAND...", nargs=-1)
@_OFFLINE
@_POLICY
def unshare_command(context: Context, mounts: tuple[str, ...], offline: bool, policy: str) -> int:
    """Run COMMAND in a user and mount namespace of its own, with REF mounted at DIR.

    Works as a plain user; the mount ends with COMMAND, whose exit status is returned.
    """
    from stowray.pipeline.errors import UsageError
    from stowray.pipeline.unshare import run_unshared

    words: tuple[str, ...] = click.get_current_context().meta[_WORDS]
    if len(mounts) not in (0, 2) or not words:
        raise UsageError("unshare", "give REF DIR -- COMMAND..., or just -- COMMAND...")
    if not mounts:
        return run_unshared(None, None, None, words)
    status = 0

    def act(store: Store, _result: PullResult, chain_id: Digest | None) -> dict[str, Any]:
        nonlocal status
        status = run_unshared(store, chain_id, Path(mounts[1]).absolute(), words)
        return {}

    # No answer of ours: stdout belongs to the command.
    failed = _with_tree(context, mounts[0], policy, offline, act, show=lambda _answer: None)
    return failed or status


@command("bundle", short_help="Write an OCI runtime bundle that runc starts.")
@click.argument("reference", metavar="REF")
@click.argument("directory", metavar="DIR")
@_OFFLINE
@_POLICY
def bundle_command(
    context: Context, reference: str, directory: str, offline: bool, policy: str
) -> int:
    """Write config.json and rootfs of REF to DIR, for `runc run` and `crun run`.

    A plain user's bundle runs as root of its own user namespace, which is you outside of it, also
    where the image names another user: that is said.
    """
    from stowray.pipeline.bundle import write_bundle
    from stowray.pipeline.rootfs import check_destination

    target = Path(directory).absolute()
    check_destination(target)

    def act(store: Store, result: PullResult, chain_id: Digest | None) -> dict[str, Any]:
        from stowray.pipeline.digest import Digest as DigestType

        config = DigestType(result.config)
        write_bundle(
            store, config, chain_id, target, warn=partial(context.log, "warning", "bundle-user")
        )
        return {
            "reference": result.reference,
            "path": str(target),
            "chain_id": result.chain_id,
        }

    return _with_tree(context, reference, policy, offline, act)
