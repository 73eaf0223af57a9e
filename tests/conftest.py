"""What all tests share: who may run where, and the real parts that are made once per session."""

from __future__ import annotations

import os
import signal
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.support import docker_registry, peers
from tests.support.catalogue import Catalogue

if TYPE_CHECKING:
    from collections.abc import Iterator

# On a busy machine any example may take a second: that is no finding about the code.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
# A shell without job control has what it starts in the background ignore Ctrl-C, and so would all
# programs that the tests start and interrupt.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Say why a test cannot run here."""
    for item in items:
        if item.get_closest_marker("root") and os.geteuid() != 0:
            item.add_marker(pytest.mark.skip(reason="needs root"))
        wanted = item.get_closest_marker("peers")
        if wanted:
            absent = peers.missing(*(wanted.args or ("docker-registry", "skopeo", "umoci")))
            if absent:
                reason = f"not installed: {', '.join(absent)} (make deps)"
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def fast_tmp() -> Iterator[Path]:
    """A folder of this session in memory where there is one: stores and registries of real tests.

    A store in it does what it does on a disk; only `fsync` costs nothing.
    """
    memory = Path("/dev/shm")
    parent = memory if memory.is_dir() and os.access(memory, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="stowray-tests-", dir=parent) as folder:
        yield Path(folder)


@pytest.fixture
def workspace(fast_tmp: Path) -> Iterator[Path]:
    """A folder of this test below `fast_tmp`, removed at its end."""
    with tempfile.TemporaryDirectory(prefix="test-", dir=fast_tmp) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def catalogue() -> Catalogue:
    """The test images, kept between sessions (`STOWRAY_TEST_CACHE`)."""
    return Catalogue()


@pytest.fixture(scope="session")
def real_registry(fast_tmp: Path) -> Iterator[docker_registry.DockerRegistry]:
    """A `docker-registry` of this session, empty at first."""
    peers.require(docker_registry.PROGRAM)
    with docker_registry.running(fast_tmp / "registry") as registry:
        yield registry
