"""The plan file of a pre-warm run, and the options that win over it.

Invariant: whatever is unknown or of the wrong kind is a UsageError that names the file and the key.

    images = ["debian:12", {reference = "nginx", platforms = ["linux/arm64"]}]
    [nodes]     # which; none given: all
    [limits]    # how much at a time
    [failure]   # what is put up with
"""

from __future__ import annotations

import math
import re
from dataclasses import fields
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import InvalidPlatformError, InvalidReferenceError, UsageError
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_plan import (
    RUNTIMES,
    FailurePolicy,
    ImageWish,
    Limits,
    NodeSelection,
    PrewarmPlan,
    Wave,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.source import parse_source
from stowray.pipeline.toml_text import parse_toml

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PLAN_LIMIT: Final = 4 << 20
# What TOML promises of whole numbers; larger ones would not fit where they are reckoned with.
_LARGEST: Final = (1 << 63) - 1
_UNITS: Final = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "ki": 1 << 10,
    "mi": 1 << 20,
    "gi": 1 << 30,
}
_BANDWIDTH = re.compile(r"([0-9]+(?:\.[0-9]+)?) ?([kmg]i?)?B?(?:/s)?", re.IGNORECASE)
_PERCENT = re.compile(r"([0-9]+(?:\.[0-9]+)?)%")


def wishes(references: Sequence[str], platforms: Sequence[str] = ()) -> list[str | dict[str, Any]]:
    """Return entries for a plan's ``images``: ``references`` for ``platforms``."""
    if not platforms:
        return list(references)
    return [{"reference": text, "platforms": list(platforms)} for text in references]


def load_plan(
    path: Path | None,
    *,
    references: Sequence[str | dict[str, Any]] = (),
    overrides: Mapping[str, Any] | None = None,
) -> PrewarmPlan:
    """Return the plan of the file and the arguments.

    ``references`` are added to the file's images, as :func:`wishes` writes them. ``overrides`` have
    the keys of the file with dots (``limits.fan_out``); None and empty ones are passed over.
    """
    origin = str(path) if path else "command line"
    document = _read(path) if path else {}
    images = document.setdefault("images", [])
    if not isinstance(images, list):
        raise UsageError(origin, "images must be a list of references")
    images.extend(references)
    for key, value in (overrides or {}).items():
        if value in (None, "", [], (), {}):
            continue
        section, dot, name = key.partition(".")
        table = document.setdefault(section, {}) if dot else document
        if not isinstance(table, dict):
            raise UsageError(origin, f"[{section}] must be a table")
        table[name if dot else key] = value
    return parse_plan(document, origin)


def parse_plan(document: Mapping[str, Any], origin: str) -> PrewarmPlan:
    """Return the plan of a TOML document; ``origin`` names it in errors."""
    check = _Checker(origin)
    check.known("", document, tuple(entry.name for entry in fields(PrewarmPlan)))
    images = _images(check, document.get("images", []))
    if not images:
        raise UsageError(origin, "images names no image: nothing to pre-warm")
    return PrewarmPlan(
        images=images,
        nodes=_nodes(check, check.table("nodes", document)),
        limits=_limits(check, check.table("limits", document)),
        failure=_failure(check, check.table("failure", document)),
        waves=_waves(check, document.get("waves", [])),
        deliver=_deliver(check, document.get("deliver", [])),
        lock=check.text("lock", document.get("lock", "")),
    )


def _read(path: Path) -> dict[str, Any]:
    from stowray.pipeline.files import read_given

    try:
        return parse_toml(read_given(path, PLAN_LIMIT).decode("utf-8"), str(path))
    except OSError as error:
        raise UsageError(str(path), f"cannot read the plan: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UsageError(str(path), f"not a TOML file: {error}") from error


class _Checker:
    """Checks of single values, each error with the file and the key."""

    def __init__(self, origin: str) -> None:
        self._origin = origin

    def fail(self, key: str, reason: str) -> UsageError:
        return UsageError(self._origin, f"{key} {reason}")

    def known(self, section: str, table: Mapping[str, Any], names: tuple[str, ...]) -> None:
        prefix = f"{section}." if section else ""
        for name in table:
            if name not in names:
                raise UsageError(
                    self._origin, f"unknown key {prefix + name!r}; known: {', '.join(names)}"
                )

    def table(self, key: str, document: Mapping[str, Any]) -> Mapping[str, Any]:
        value = document.get(key, {})
        if not isinstance(value, dict):
            raise self.fail(f"[{key}]", "must be a table")
        return value

    def text(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            raise self.fail(key, "must be a string")
        return value

    def texts(self, key: str, value: object) -> tuple[str, ...]:
        if not isinstance(value, list | tuple) or not all(
            isinstance(entry, str) and entry for entry in value
        ):
            raise self.fail(key, "must be a list of strings")
        return tuple(value)

    def flag(self, key: str, value: object) -> bool:
        if not isinstance(value, bool):
            raise self.fail(key, "must be true or false")
        return value

    def count(self, key: str, value: object, least: int) -> int:
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise self.fail(key, f"must be a whole number, at least {least}")
        if value > _LARGEST:
            raise self.fail(key, f"must not be more than {_LARGEST}")
        return value

    def number(self, key: str, value: object, *, most: float = math.inf) -> float:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number or not 0 <= value < math.inf or value > most:  # type: ignore[operator]
            limit = "" if most == math.inf else f" and not more than {most:g}"
            raise self.fail(key, f"must be a number, not negative{limit}")
        if value > _LARGEST:  # type: ignore[operator]
            raise self.fail(key, f"must not be more than {_LARGEST}")
        return float(value)  # type: ignore[arg-type]


def _images(check: _Checker, value: object) -> tuple[ImageWish, ...]:
    if not isinstance(value, list):
        raise check.fail("images", "must be a list of references")
    wishes: dict[str, ImageWish] = {}
    for number, entry in enumerate(value):
        key = f"images[{number}]"
        platforms: tuple[Platform, ...] = ()
        if isinstance(entry, dict):
            check.known(key, entry, ("reference", "platforms"))
            if "reference" not in entry:
                raise check.fail(key, "has no reference")
            platforms = _platforms(check, f"{key}.platforms", entry.get("platforms", []))
            entry = entry["reference"]
        reference = _reference(check, key, check.text(key, entry))
        known = wishes.get(reference.canonical)
        if known is not None and known.platforms != platforms:
            raise check.fail(key, f"names {reference.familiar} again with other platforms")
        wishes[reference.canonical] = ImageWish(reference, platforms)
    return tuple(wishes.values())


def _reference(check: _Checker, key: str, text: str) -> Reference:
    try:
        source = parse_source(text)
    except InvalidReferenceError as error:
        raise check.fail(key, f"is no reference: {error.reason}") from error
    if not isinstance(source, Reference):
        # A path means something on one node only.
        raise check.fail(key, f"is {source}, on disk: nodes can be pre-warmed from a registry")
    return source


def _platforms(check: _Checker, key: str, value: object) -> tuple[Platform, ...]:
    found: list[Platform] = []
    for text in check.texts(key, value):
        try:
            found.append(Platform.parse(text))
        except InvalidPlatformError as error:
            raise check.fail(key, f"has {error.text!r}: {error.reason}") from error
    return tuple(found)


def _nodes(check: _Checker, table: Mapping[str, Any]) -> NodeSelection:
    check.known("nodes", table, tuple(entry.name for entry in fields(NodeSelection)))
    labels: dict[str, tuple[str, ...]] = {}
    for name, value in check.table("labels", table).items():
        key = f"nodes.labels.{name}"
        labels[name] = (value,) if isinstance(value, str) else check.texts(key, value)
        if not labels[name]:
            raise check.fail(key, "has no value")
    wanted = table.get("resources", {})
    if isinstance(wanted, list | tuple):
        # A list names resources of which any amount will do.
        resources = dict.fromkeys(check.texts("nodes.resources", wanted), 1e-09)
    else:
        resources = {
            name: check.number(f"nodes.resources.{name}", value)
            for name, value in check.table("resources", table).items()
        }
    return NodeSelection(
        labels=labels,
        resources=resources,
        names=check.texts("nodes.names", table.get("names", [])),
        exclude_head=check.flag("nodes.exclude_head", table.get("exclude_head", False)),
    )


def _limits(check: _Checker, table: Mapping[str, Any]) -> Limits:
    check.known("limits", table, tuple(entry.name for entry in fields(Limits)))
    usual = Limits()
    return Limits(
        nodes_at_once=check.count("limits.nodes_at_once", table.get("nodes_at_once", 0), 0),
        origin_connections=check.count(
            "limits.origin_connections",
            table.get("origin_connections", usual.origin_connections),
            1,
        ),
        fan_out=check.count("limits.fan_out", table.get("fan_out", usual.fan_out), 1),
        bandwidth=_bandwidth(check, table.get("bandwidth", 0)),
    )


def _bandwidth(check: _Checker, value: object) -> int:
    """Return bytes per second of a number, or of a text such as ``200MB`` or ``100 MiB/s``."""
    key = "limits.bandwidth"
    if not isinstance(value, str):
        return check.count(key, value, 0)
    match = _BANDWIDTH.fullmatch(value.strip())
    # "Gb/s" would be read as gigabytes by some and as gigabits by others.
    if match is None or value.strip().removesuffix("/s").endswith("b"):
        raise check.fail(key, "must be bytes per second, for example 200000000 or '200MB/s'")
    rate = float(match[1]) * _UNITS[(match[2] or "").lower()]
    if rate > _LARGEST:
        raise check.fail(key, f"must not be more than {_LARGEST}")
    return int(rate)


def _failure(check: _Checker, table: Mapping[str, Any]) -> FailurePolicy:
    check.known("failure", table, tuple(entry.name for entry in fields(FailurePolicy)))
    usual = FailurePolicy()
    timeout = table.get("node_timeout_seconds", usual.node_timeout_seconds)
    least = table.get("minimum_ready", usual.minimum_ready)
    if isinstance(least, str):
        fraction = _fraction(check, "failure.minimum_ready", least)
    else:
        fraction = check.number("failure.minimum_ready", least, most=1.0)
    seconds = check.number("failure.node_timeout_seconds", timeout)
    if seconds == 0:
        raise check.fail("failure.node_timeout_seconds", "must be more than 0")
    return FailurePolicy(
        tries=check.count("failure.tries", table.get("tries", usual.tries), 1),
        node_timeout_seconds=seconds,
        deadline_seconds=check.number(
            "failure.deadline_seconds", table.get("deadline_seconds", usual.deadline_seconds)
        ),
        minimum_ready=fraction,
    )


def _waves(check: _Checker, value: object) -> tuple[Wave, ...]:
    if not isinstance(value, list | tuple):
        raise check.fail("waves", "must be a list such as [1, '10%', '100%']")
    waves: list[Wave] = []
    for number, entry in enumerate(value):
        key = f"waves[{number}]"
        if isinstance(entry, str):
            wave = Wave(fraction=_fraction(check, key, entry))
            if wave.fraction == 0:
                raise check.fail(key, "must be more than 0%")
        else:
            wave = Wave(count=check.count(key, entry, 1))
        last = waves[-1] if waves else None
        # Numbers and percentages cannot be compared before the nodes are known.
        if last and (0 < wave.count <= last.count or 0 < wave.fraction <= last.fraction):
            raise check.fail(key, "must be more than the wave before it")
        waves.append(wave)
    return tuple(waves)


def _fraction(check: _Checker, key: str, text: str) -> float:
    match = _PERCENT.fullmatch(text.strip())
    if match is None or float(match[1]) > 100:
        raise check.fail(key, "must be a percentage from 0% to 100%")
    return float(match[1]) / 100


def _deliver(check: _Checker, value: object) -> tuple[str, ...]:
    runtimes = tuple(dict.fromkeys(check.texts("deliver", value)))
    for runtime in runtimes:
        if runtime not in RUNTIMES:
            raise check.fail("deliver", f"has {runtime!r}; known: {', '.join(RUNTIMES)}")
    return runtimes
