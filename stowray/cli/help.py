"""How ``--help`` reads: what a command does, examples, its own options, then those of all commands.

The sections are what the reference pages are made of too, so that neither says more than the other.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Collection

# In the order of a user's day; every command is in exactly one group.
GROUPS = {
    "Pull images": ("pull", "plan", "resolve", "config", "key", "reference", "platform"),
    "Use them": ("rootfs", "mount", "umount", "unshare", "bundle", "deliver", "serve"),
    "Keep the store": ("images", "inspect", "rm", "gc", "pin", "unpin", "verify"),
    "Many nodes": ("prewarm", "status", "session"),
    "Look closer": ("doctor", "bench", "trace", "completion", "demo"),
}

EXAMPLES: dict[str, tuple[str, ...]] = {
    "pull": (
        "stowray pull debian:12 alpine:3.20",
        "stowray pull --platform linux/arm64 --no-unpack debian:12",
        "stowray pull --json debian:12 | jq .fetched_bytes",
    ),
    "plan": ("stowray plan debian:12", "stowray plan --json debian:12 | jq .fetch_bytes"),
    "resolve": ("stowray resolve debian:12",),
    "config": ("stowray config debian:12 | jq .config.Env",),
    "key": ("stowray key debian:12",),
    "reference": ("stowray reference debian ghcr.io/org/app:1",),
    "platform": ("stowray platform linux/arm/v7",),
    "rootfs": (
        "stowray rootfs debian:12 ./tree",
        "stowray rootfs --format squashfs debian:12 debian.squashfs",
    ),
    "mount": ("stowray mount debian:12 /mnt/debian",),
    "umount": ("stowray umount /mnt/debian",),
    "unshare": ("stowray unshare debian:12 ./mnt -- ls ./mnt",),
    "bundle": ("stowray bundle debian:12 ./bundle", "runc run --bundle ./bundle demo"),
    "deliver": (
        "stowray deliver debian:12 --to podman",
        "stowray deliver debian:12 --to oci-archive:debian.tar",
    ),
    "serve": ("stowray serve --listen 127.0.0.1:5001",),
    "images": ("stowray images", "stowray images --json | jq -r .reference"),
    "inspect": ("stowray inspect debian:12",),
    "rm": ("stowray rm debian:12 && stowray gc",),
    "gc": ("stowray gc --dry-run", "stowray gc --max-size 50G"),
    "pin": ("stowray pin debian:12",),
    "unpin": ("stowray unpin debian:12",),
    "verify": ("stowray verify", "stowray verify --deep --repair debian:12"),
    "prewarm": ("stowray prewarm --address 10.0.0.5:6379 debian:12",),
    "status": ("stowray status --address 10.0.0.5:6379 debian:12",),
    "session": ("stowray session start", "stowray session stop"),
    "doctor": ("stowray doctor", "stowray doctor debian:12 ghcr.io"),
    "bench": (
        "stowray bench debian:12 --runs 10 --record before.run",
        "stowray bench --compare before.run after.run",
        "stowray bench one.example/app:1 other.example/app:1 --html compared.html",
    ),
    "trace": (
        "stowray pull --record pull.run debian:12",
        "stowray trace pull.run -o timeline.html",
    ),
    "completion": ('eval "$(stowray completion bash)"',),
    "demo": ("stowray demo",),
}


class HelpfulCommand(click.Command):
    """A command whose help shows examples, and its own options before the common ones."""

    common: Collection[str] = ()

    def format_help_text(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the description and the examples."""
        super().format_help_text(ctx, formatter)
        examples = EXAMPLES.get(self.name or "", ())
        if examples:
            with formatter.section("Examples"):
                for line in examples:
                    formatter.write(f"{'':{formatter.current_indent}}{line}\n")

    def option_rows(
        self, ctx: click.Context
    ) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return the command's own options and the common ones, each with its help."""
        own: list[tuple[str, str]] = []
        common: list[tuple[str, str]] = []
        for parameter in self.get_params(ctx):
            record = parameter.get_help_record(ctx)
            if record is not None and isinstance(parameter, click.Option):
                (common if parameter.name in self.common else own).append(record)
        return own, common

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the options in two lists."""
        own, common = self.option_rows(ctx)
        if own:
            with formatter.section("Options"):
                formatter.write_dl(own)
        if common:
            with formatter.section("Options of every command"):
                formatter.write_dl(common)


def write_commands(formatter: click.HelpFormatter, lines: dict[str, str]) -> None:
    """Write the list of commands, group by group; ``lines`` says what each does."""
    width = max(map(len, lines))
    grouped = {name for names in GROUPS.values() for name in names}
    rest = tuple(name for name in lines if name not in grouped)
    for title, names in {**GROUPS, "Others": rest}.items():
        rows = [(name.ljust(width), lines[name]) for name in names if name in lines]
        if rows:
            with formatter.section(title):
                formatter.write_dl(rows)
