"""The command group: finds a command, imports it only then, and turns errors into exit codes.

Invariant: stdout carries only the answer; what is said to a person goes to stderr; every failure
ends in the exit status that its class names.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import sys
from typing import TYPE_CHECKING

import click

from stowray import __version__
from stowray.cli.context import COMPLETION, Context, common_options
from stowray.cli.help import write_commands
from stowray.cli.streams import AnswerError
from stowray.log import Log
from stowray.pipeline.errors import InvalidReferenceError, StowrayError, UsageError, describe

if TYPE_CHECKING:
    from types import FrameType

    from click.shell_completion import CompletionItem

# name -> (module below stowray.cli, one line for the list of commands)
COMMANDS = {
    "pull": ("pull", "Fetch, verify and unpack images."),
    "resolve": ("look", "Print the digest that a reference points to."),
    "config": ("look", "Print an image's config, raw bytes as stored."),
    "key": ("look", "Print the two cache keys of an image."),
    "reference": ("look", "Show how references are understood."),
    "platform": ("look", "Show how platforms are understood."),
    "plan": ("look", "Show what a pull, or a pre-warm run, would do."),
    "images": ("stock", "List the images in the store."),
    "inspect": ("stock", "Show an image's layers, chain IDs and blob mapping."),
    "rm": ("stock", "Remove references from the store."),
    "gc": ("stock", "Remove what no reference needs."),
    "pin": ("stock", "Keep an image from being collected."),
    "unpin": ("stock", "Let a pinned image be collected again."),
    "verify": ("stock", "Re-hash blobs; compare trees with their layers (--deep)."),
    "rootfs": ("trees", "Write an image's root filesystem to a directory or file."),
    "mount": ("trees", "Mount an image's root filesystem."),
    "umount": ("trees", "Unmount what `mount` mounted."),
    "unshare": ("trees", "Run a command beside an image's mount in own namespaces."),
    "bundle": ("trees", "Write an OCI runtime bundle that runc starts."),
    "serve": ("serve", "Serve the store as a read-only registry."),
    "deliver": ("deliver", "Hand an image to containerd, podman, docker or an archive."),
    "bench": ("bench", "Measure pulls, stage by stage; compare registries or records."),
    "trace": ("trace", "Draw a run record as a timeline, for a browser or Perfetto."),
    "prewarm": ("prewarm", "Bring images to every node of a Ray cluster."),
    "status": ("prewarm", "Show which node has which images, checked on disk."),
    "doctor": ("doctor", "Check machine, store, registries and cluster; say what to do."),
    "completion": ("completion", "Print shell completion: commands, options, references."),
    "session": ("session", "Start, stop or show the warm private Ray."),
    "demo": ("demo", "Show the main job with a small image, no registry needed."),
}


class LazyGroup(click.Group):
    """A group that knows its commands' names and imports a command's module when it is run."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names in the order of the table."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"stowray.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, f"{cmd_name}_command")
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List commands without importing them."""
        write_commands(formatter, {name: line for name, (_, line) in COMMANDS.items()})

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands first: they are what is looked for."""
        self.format_commands(ctx, formatter)
        click.Command.format_options(self, ctx, formatter)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem[str]]:
        """Offer the commands without importing them, else the options."""
        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        from click.shell_completion import CompletionItem

        return [
            CompletionItem(name, help=line)
            for name, (_, line) in COMMANDS.items()
            if name.startswith(incomplete)
        ]

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find the command, with a hint for a near miss."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            hint = f" Did you mean {near[0]!r}?" if near else ""
            raise click.UsageError(f"No such command {args[0]!r}.{hint}", ctx)
        return super().resolve_command(ctx, args)


@click.group(
    cls=LazyGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Exit status: 0 done, 1 some failed, 2 usage, 3 not found, 4 unauthorized, 5 content is "
    "not what was promised, 6 registry or node unavailable, 7 storage, 130 interrupted.",
)
@click.version_option(__version__, prog_name="stowray")
@common_options
@click.pass_context
def cli(ctx: click.Context, /, **options: object) -> None:
    """Stow container images onto machines: verified, ready-to-run root filesystems.

    `stowray COMMAND --help` says more and has examples. New here: `stowray demo`.
    """
    ctx.obj = Context()
    ctx.obj.merge(options)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit status."""
    if COMPLETION in os.environ:
        from stowray.cli.complete import answer

        return answer(cli, os.environ[COMPLETION])
    signal.signal(signal.SIGTERM, _terminate)
    context = None
    # Click takes the words away as it reads them.
    as_json = "--log-json" in arguments
    try:
        with cli.make_context("stowray", arguments) as context:
            result = cli.invoke(context)
            sys.stdout.flush()
            return result if isinstance(result, int) else 0
    except click.exceptions.Exit as ending:
        return ending.exit_code
    except click.ClickException as error:
        if as_json:
            Log(as_json=True)("error", "failed", error.format_message(), type="UsageError")
        else:
            error.show()
        return 2
    except (KeyboardInterrupt, click.Abort):
        print("stowray: interrupted", file=sys.stderr)  # noqa: T201
        return 130
    except BrokenPipeError:
        # The reader of our answer went away; nothing is left to say to it.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except StowrayError as error:
        return fail(error, context.obj if context is not None else None)
    except FileNotFoundError:
        if _has_working_directory():
            raise
        return fail(UsageError("working directory", "it was removed: change to another one"), None)


def _has_working_directory() -> bool:
    try:
        os.getcwd()
    except FileNotFoundError:
        return False
    return True


def fail(error: StowrayError, context: Context | None, reference: str | None = None) -> int:
    """Tell the user of an error, as the result line of ``--json`` too, and return its status."""
    if reference is not None and isinstance(error, InvalidReferenceError):
        from stowray.pipeline.reference import redact

        # People paste URLs with passwords in them.
        reference = redact(reference)
    if context is not None and context.json and not isinstance(error, AnswerError):
        line: dict[str, object] = {"error": describe(error)}
        if reference is not None:
            line = {"reference": reference, **line}
        print(json.dumps(line))  # noqa: T201
    prefix = f"{reference}: " if reference is not None and reference not in str(error) else ""
    told: dict[str, object] = {"type": type(error).__name__, "exit_code": error.exit_code}
    if reference is not None:
        told["reference"] = reference
    (context or Context()).log("error", "failed", f"{prefix}{error}", **told)
    return error.exit_code


def _terminate(_signal: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
