"""The field's own tools as judges and as competitors: skopeo, umoci, podman, ctr, runc.

Invariant: a peer only ever writes below a throwaway folder nested two levels deep. umoci 0.4.7,
given the entry `.wh...`, deletes the parent of its destination.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

PEER_SECONDS = 300


@dataclass(frozen=True)
class Completed:
    """What a finished program said."""

    status: int
    stdout: str
    stderr: str


class PeerError(Exception):
    """A peer failed; fields ``(command, status, stderr)``."""


def missing(*programs: str) -> list[str]:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    return [program for program in programs if shutil.which(program, path=path) is None]


def require(*programs: str) -> None:
    """Skip the calling test, saying why, where a program is not installed."""
    absent = missing(*programs)
    if absent:
        pytest.skip(f"not installed: {', '.join(absent)} (make deps)")


def run(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Completed:
    """Run a program; a failing one raises with what it said."""
    completed = attempt(command, env=env)
    if completed.status:
        raise PeerError(" ".join(command), completed.status, completed.stderr[-2000:])
    return completed


def attempt(command: Sequence[str], *, env: Mapping[str, str] | None = None) -> Completed:
    path = os.environ.get("PATH", "") + ":/usr/sbin:/sbin"
    result = subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        timeout=PEER_SECONDS,
        check=False,
        env={**os.environ, "PATH": path, **(env or {})},
    )
    return Completed(
        result.returncode,
        result.stdout.decode(errors="replace"),
        result.stderr.decode(errors="replace"),
    )


def skopeo_copy(source: str, target: str, *options: str) -> None:
    run(["skopeo", "copy", "--quiet", "--src-tls-verify=false", *options, source, target])


def skopeo_inspect(source: str, *options: str) -> str:
    return run(["skopeo", "inspect", "--tls-verify=false", *options, source]).stdout


def umoci_unpack(layout: Path, tag: str, scratch: Path) -> Path:
    """Unpack a tagged image of an OCI layout; return its root filesystem."""
    bundle = scratch / "throwaway" / "two-levels" / "bundle"
    bundle.parent.mkdir(parents=True)
    command = ["umoci", "unpack", "--image", f"{layout}:{tag}"]
    if os.geteuid() != 0:
        command.append("--rootless")
    run([*command, str(bundle)])
    return bundle / "rootfs"


def versions() -> dict[str, str]:
    """The first line that each peer here says about its version."""
    asked = {
        "docker-registry": ["docker-registry", "--version"],
        "skopeo": ["skopeo", "--version"],
        "umoci": ["umoci", "--version"],
        "podman": ["podman", "--version"],
        "ctr": ["ctr", "--version"],
        "runc": ["runc", "--version"],
    }
    said: dict[str, str] = {}
    for name, command in asked.items():
        if not missing(command[0]):
            completed = attempt(command)
            lines = (completed.stdout or completed.stderr).strip().splitlines()
            said[name] = lines[0] if lines else f"exit {completed.status}"
    return said
