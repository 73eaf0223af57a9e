"""A pre-warm as a job of a Ray cluster: `ray job submit … -- stowray prewarm …`.

Ray's dashboard, which takes jobs, is installed beside this environment, in one of its own: with it
every other Ray of the tests would start a dozen processes more.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import venv
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.invariants import check_store

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from tests.real.conftest import Published

SECONDS = 240.0


@pytest.fixture
def ray_program(fast_tmp: Path) -> Path:
    """The `ray` command with its dashboard; its environment sees all that this one has."""
    from importlib.metadata import version

    folder = fast_tmp / "dashboard"
    venv.create(folder, with_pip=True, symlinks=True)
    (own,) = (folder / "lib").glob("python*/site-packages")
    (own / "parent.pth").write_text(sysconfig.get_path("purelib"))
    wanted = f"ray[default]=={version('ray')}"
    done = subprocess.run(
        [folder / "bin" / "python", "-m", "pip", "install", "--quiet", wanted],
        capture_output=True,
        text=True,
        timeout=SECONDS,
    )
    if done.returncode:
        pytest.skip(f"{wanted} cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    program = folder / "bin" / "ray"
    program.write_text(
        f"#!{folder}/bin/python\n"
        "import sys\nfrom ray.scripts.scripts import main\nsys.exit(main())\n"
    )
    program.chmod(0o755)
    return program


@pytest.fixture
def ray(ray_program: Path, workspace: Path) -> Iterator[Callable[..., str]]:
    """Start a head with its dashboard; return what runs a `ray job` command there."""
    ports = _free_ports(4)
    temporary = Path(tempfile.mkdtemp(prefix="sw-ray-", dir="/tmp"))
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "XDG_", "STOWRAY_"))
    }
    environment = {
        **kept,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "XDG_RUNTIME_DIR": str(workspace),
        "STOWRAY_STORE": str(workspace / "{node}"),
        "STOWRAY_NODE": "head",
    }
    names = ("port", "dashboard-port", "dashboard-agent-listen-port", "metrics-export-port")
    log = (workspace / "ray.log").open("wb")
    head = subprocess.Popen(
        [
            *(ray_program, "start", "--head", "--block", "--num-cpus", "2"),
            *("--node-ip-address", "127.0.0.1", "--temp-dir", temporary),
            *("--include-dashboard", "true", "--object-store-memory", str(80 << 20)),
            *(f"--{name}={port}" for name, port in zip(names, ports, strict=True)),
        ],
        stdout=log,
        stderr=log,
        env=environment,
        start_new_session=True,
    )
    address = f"http://127.0.0.1:{ports[1]}"

    def run(*arguments: str) -> str:
        done = subprocess.run(
            [ray_program, "job", arguments[0], "--address", address, *arguments[1:]],
            capture_output=True,
            text=True,
            env=environment,
            timeout=SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    try:
        give_up = time.monotonic() + SECONDS
        while True:
            with contextlib.suppress(AssertionError):
                run("list")
                break
            assert time.monotonic() < give_up and head.poll() is None, _said(workspace)
        yield run
    finally:
        head.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            head.wait(timeout=60)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(head.pid, 9)
        head.wait()
        log.close()
        shutil.rmtree(temporary, ignore_errors=True)


def _said(workspace: Path) -> str:
    return (workspace / "ray.log").read_text(errors="replace")


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def test_a_job_warms_the_cluster_that_runs_it_and_the_next_one_finds_all(
    ray: Callable[..., str], publish: Callable[[str], Published], workspace: Path
) -> None:
    reference = publish("many").reference
    lines = []
    for _ in range(2):
        told = ray("submit", "--", "stowray", "--json", "prewarm", reference, "--progress", "none")
        assert "succeeded" in told
        lines += [json.loads(line) for line in told.splitlines() if line.startswith('{"')]
    assert [(line["node"], line["present"]) for line in lines] == [("head", True)] * 2
    first, again = lines
    assert (first["fetched_bytes"] > 0, again["fetched_bytes"]) == (True, 0)
    check_store(workspace / "head")
