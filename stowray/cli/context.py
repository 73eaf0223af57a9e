"""The common options of every command, and what is made from them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import click

from stowray.cli.help import HelpfulCommand

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from stowray.log import Log
    from stowray.pipeline.engine import LocalEngine
    from stowray.pipeline.progress import Progress
    from stowray.pipeline.settings import Settings
    from stowray.pipeline.store import Store

# Set by the code of `stowray completion`: the shell asks what could come next.
COMPLETION = "_STOWRAY_COMPLETE"

_COMMON: tuple[Callable[[Any], Any], ...] = (
    click.option("--store", metavar="DIR", help="Where images are kept (env STOWRAY_STORE)."),
    click.option(
        "--engine",
        type=click.Choice(["auto", "local", "ray"]),
        help="Who does the work: this process, or actors on Ray.",
    ),
    click.option("--address", metavar="RAY", help="The Ray cluster to attach to, HOST:PORT."),
    click.option("--platform", metavar="OS/ARCH[/VARIANT]", help="Instead of this machine's."),
    click.option("--config", metavar="FILE", help="Settings, TOML (env STOWRAY_CONFIG)."),
    click.option("--authfile", metavar="FILE", help="Logins, as podman or docker wrote them."),
    click.option("--hosts-dir", metavar="DIR", help="Mirrors, as containerd's hosts.toml files."),
    click.option(
        "--plain-http",
        metavar="HOST[:PORT]",
        multiple=True,
        help="Speak HTTP to this registry; loopback needs no leave. Repeatable.",
    ),
    click.option(
        "--progress",
        type=click.Choice(["auto", "tty", "plain", "json", "none"]),
        help="How progress is shown on stderr.",
    ),
    click.option("--json", is_flag=True, default=None, help="Answer in JSON lines on stdout."),
    click.option("-q", "--quiet", is_flag=True, default=None, help="Errors only, no progress."),
    click.option("-v", "--verbose", count=True, help="Say more."),
    click.option("--log-json", is_flag=True, default=None, help="Log on stderr as JSON lines."),
)


def common_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Give a command the common options."""
    for option in reversed(_COMMON):
        function = option(function)
    return function


class Context:
    """What the options of this run say; makes settings, store and engine when they are needed."""

    def __init__(self) -> None:
        self._values: dict[str, Any] = {}
        self._settings: Settings | None = None

    def merge(self, options: dict[str, Any]) -> None:
        """Take over options given at one level; the command's own win over the group's."""
        for name, value in options.items():
            if value not in (None, (), 0, False):
                self._values[name] = value

    def value(self, name: str, default: Any = None) -> Any:
        """Return one option's value."""
        return self._values.get(name, default)

    @property
    def json(self) -> bool:
        """Return whether the answer is JSON."""
        return bool(self.value("json"))

    @property
    def log(self) -> Log:
        """Return what says things on stderr, as loud as the options want it."""
        from stowray.log import Log

        lowest = "debug" if self.value("verbose") else "info"
        return Log(
            as_json=bool(self.value("log_json")), lowest="error" if self.value("quiet") else lowest
        )

    @property
    def settings(self) -> Settings:
        """Return the settings: defaults, file, environment, options, in rising order."""
        if self._settings is None:
            from stowray.pipeline.settings import load_settings

            self._settings = load_settings(
                config=self.value("config"),
                overrides={
                    "store": self.value("store"),
                    "engine": self.value("engine"),
                    "address": self.value("address"),
                    "platform": self.value("platform"),
                    "authfile": self.value("authfile"),
                    "hosts_dir": self.value("hosts_dir"),
                    "plain_http": list(self.value("plain_http", ())),
                },
            )
        return self._settings

    def pass_on(self) -> list[str]:
        """Return the options that a `stowray` started by this one needs to do the same elsewhere.

        Without the store, and without what only concerns the answer of this one.
        """
        words = []
        for name in ("engine", "address", "platform", "config", "authfile", "hosts_dir"):
            value = self.value(name)
            if value:
                words += [f"--{name.replace('_', '-')}", str(value)]
        for host in self.value("plain_http", ()):
            words += ["--plain-http", host]
        return words

    def store_path(self) -> Path:
        """Return where the store is."""
        return self.settings.store_path()

    def open_store(self, *, create: bool = False) -> Store:
        """Open the store; without ``create`` a missing one is a NotFoundError."""
        from stowray.pipeline.errors import NotFoundError
        from stowray.pipeline.store import Store

        path = self.store_path()
        if not create and not os.path.lexists(path) and _can_be_seen(path):
            raise NotFoundError("a store", f"{path} (pull an image first, or give --store)")
        return Store.open(path, create=create)

    def engine(self, progress: Progress, *, fork_workers: bool) -> LocalEngine:
        """Return the engine that the options and the state of this machine select."""
        from stowray.api import make_engine

        return make_engine(self.settings, progress=progress, fork_workers=fork_workers)


def _can_be_seen(path: Path) -> bool:
    """Return whether this user may know that nothing is at ``path``."""
    try:
        path.lstat()
    except PermissionError:
        return False
    except OSError:
        return True
    return True


def command(
    name: str, *, cls: type[HelpfulCommand] = HelpfulCommand, **settings: Any
) -> Callable[[Callable[..., Any]], click.Command]:
    """Make a click command with the common options whose function takes a Context first."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        names = {parameter.name or "" for parameter in _common_parameters()}

        @click.pass_context
        def invoke(ctx: click.Context, /, **options: Any) -> Any:
            context = ctx.obj if isinstance(ctx.obj, Context) else Context()
            common = {key: options.pop(key) for key in list(options) if key in names}
            context.merge(common)
            ctx.obj = context
            return function(context, **options)

        invoke.__doc__ = function.__doc__
        invoke.__click_params__ = getattr(function, "__click_params__", [])  # type: ignore[attr-defined]
        made = click.command(name, cls, **settings)(common_options(invoke))
        made.common = names
        if COMPLETION in os.environ:
            from stowray.cli.complete import completed

            completed(made)
        return made

    return decorate


def _common_parameters() -> list[click.Parameter]:
    @common_options
    def probe() -> None: ...

    parameters: list[click.Parameter] = probe.__click_params__  # type: ignore[attr-defined]
    return parameters
