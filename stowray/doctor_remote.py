"""What stands between this machine and registries or a Ray cluster, found out by asking them.

Invariant: a registry is asked for documents only; what it and the files of logins say is shown
without anything secret: registries' names, never users, passwords or tokens.
"""

from __future__ import annotations

import os
import shutil
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from stowray.doctor import Finding
from stowray.pipeline.credentials import Credentials
from stowray.pipeline.errors import (
    ContentError,
    NotFoundError,
    StowrayError,
    UnauthorizedError,
    UnavailableError,
    escape,
)
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.text import seconds_text

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from stowray.pipeline.settings import Settings

# A doctor does not wait as long as a pull does.
ATTEMPTS = 2
DEADLINE_SECONDS = 30.0
# Asked for where only a registry was named; that it is not there is an answer too.
_NOBODY = "stowray-doctor/nobody:latest"


def examine_credentials(settings: Settings) -> Iterator[Finding]:
    """Yield which files of logins there are and for whom."""
    try:
        known = Credentials(os.environ, settings.registry.authfile).overview()
    except StowrayError as error:
        yield Finding("logins", "problem", escape(str(error)), "mend the file or log in again")
        return
    if not known:
        yield Finding("logins", "ok", "none found: registries are asked as anybody")
    for file in known:
        names = ", ".join(escape(name) for name in file.registries) or "none"
        found = f"{escape(str(file.path))}: {names}"
        if file.helpers:
            found += f"; by helpers: {', '.join(escape(name) for name in file.helpers)}"
        absent = [
            name for name in file.helpers if shutil.which(f"docker-credential-{name}") is None
        ]
        if absent:
            yield Finding(
                "logins",
                "warn",
                found,
                f"not on PATH: {', '.join(f'docker-credential-{escape(n)}' for n in absent)}",
            )
        else:
            yield Finding("logins", "ok", found)


def examine_references(settings: Settings, texts: Sequence[str]) -> Iterator[Finding]:
    """Yield, per reference or registry, whether it answers and lets us in."""
    quick = replace(settings.registry, attempts=ATTEMPTS, deadline_seconds=DEADLINE_SECONDS)
    warnings: list[str] = []
    registry = Registry(quick, warn=warnings.append)
    try:
        for text in texts:
            yield _examine_one(registry, text)
        for warning in warnings:
            yield Finding("registry", "warn", escape(warning), "see the settings of registries")
    finally:
        registry.close()


def _examine_one(registry: Registry, text: str) -> Finding:
    host = is_host(text)
    name = escape(text)
    begun = time.perf_counter()
    try:
        reference = Reference.parse(f"{text}/{_NOBODY}" if host else text)
        digest = registry.resolve(reference).descriptor.digest
    except NotFoundError as error:
        if host:
            return Finding("registry", "ok", f"{name} answers in {_took(begun)}")
        return Finding(
            "registry", "problem", escape(str(error)), "check repository and tag, and the login"
        )
    except UnauthorizedError as error:
        if host:
            return Finding("registry", "ok", f"{name} answers in {_took(begun)}, asks for a login")
        return Finding("registry", "problem", escape(str(error)), "log in, or give --authfile")
    except UnavailableError as error:
        return Finding("registry", "problem", escape(str(error)), _reach_advice(error))
    except ContentError as error:
        return Finding("registry", "problem", escape(str(error)), "a proxy may answer in its place")
    except StowrayError as error:
        return Finding("registry", "problem", escape(str(error)), "check how it is written")
    return Finding("registry", "ok", f"{name} is {digest}, told in {_took(begun)}")


def _took(begun: float) -> str:
    return seconds_text(time.perf_counter() - begun)


def _reach_advice(error: UnavailableError) -> str:
    text = str(error).lower()
    if "certificate" in text or "tls" in text or "ssl" in text:
        return "trust its authority (registry.ca_file), or give --plain-http if it has no TLS"
    if any(os.environ.get(name) for name in ("https_proxy", "HTTPS_PROXY", "http_proxy")):
        return "check name, port and the proxy of the environment (https_proxy, no_proxy)"
    return "check name, port and firewall; behind a proxy set https_proxy"


def is_host(text: str) -> bool:
    """Return whether a word names a registry and no image: ``ghcr.io``, ``10.0.0.5:5000``.

    ``debian:12`` is an image: without a dot, only ``localhost`` is a registry.
    """
    if "/" in text or "@" in text:
        return False
    name, _, port = text.rpartition(":")
    name, port = (name, port) if name else (text, "")
    if name == "localhost" or name.startswith("["):
        return True
    return "." in name and (not port or port.isdecimal())


def examine_ray(settings: Settings) -> Iterator[Finding]:
    """Yield the installed Ray, and the nodes of the cluster that was named."""
    from importlib import metadata

    try:
        version = metadata.version("ray")
    except metadata.PackageNotFoundError:
        yield Finding("ray", "warn", "not installed", "pip install ray: pulls work without it")
        return
    address = settings.address or os.environ.get("RAY_ADDRESS", "")
    if not address:
        yield Finding("ray", "ok", f"{version}; no cluster named (--address)")
        return
    yield from _examine_cluster(settings, address, version)


def _examine_cluster(settings: Settings, address: str, version: str) -> Iterator[Finding]:
    from contextlib import ExitStack

    from stowray.actors import cluster
    from stowray.actors.connect import connect
    from stowray.actors.foreign import complaint, probe_nodes

    with ExitStack() as stack:
        try:
            ray, _ = connect(settings, stack)
            nodes = cluster.alive_nodes()
        except StowrayError as error:
            yield Finding(
                "ray", "problem", escape(str(error)), "run on a node of the cluster; check its port"
            )
            return
        yield Finding("ray", "ok", f"{version}; {ray.address} has {len(nodes)} nodes")
        reports = probe_nodes(
            [node["NodeID"] for node in nodes], [node["NodeManagerAddress"] for node in nodes]
        )
    for report in reports:
        name = escape(report.node or report.host or report.address)
        wrong = complaint(report)
        if wrong:
            yield Finding(
                f"node {name}",
                "problem",
                f"{report.address} {escape(wrong)}",
                "install the same stowray and Python on every node",
            )
        else:
            yield Finding(
                f"node {name}",
                "ok",
                f"{report.address}: stowray {report.version}, Python {report.python}, "
                f"user {report.uid}",
            )
