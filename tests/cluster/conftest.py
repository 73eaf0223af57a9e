"""One embedded Ray and one crew for all cluster tests; what a test kills, the crew replaces."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

# Ray reads it once, at its first import, which the tests below bring about.
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"

from stowray.actors.embedded import embedded_ray
from stowray.actors.engine import RayEngine
from stowray.pipeline.progress import Progress
from stowray.pipeline.settings import RegistrySettings, Settings, UnpackSettings
from tests.cluster.prewarm import Driver
from tests.support.origin import Origin, origin
from tests.support.ray_cluster import RayCluster, ray_cluster
from tests.support.registry import FakeRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.actors.embedded import RayAddress

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).parent / "stowray"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.cluster)


@pytest.fixture(scope="session")
def ray_address() -> Iterator[RayAddress]:
    with embedded_ray(num_cpus=2) as address:
        yield address
    with warnings.catch_warnings():
        # Ray lets go of its child processes without asking how they ended, which Python minds
        # whenever it happens to collect them: let it be here.
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


@pytest.fixture(scope="session")
def crew_settings(fast_tmp: Path) -> Settings:
    return Settings(
        store=str(fast_tmp / "cluster-store"),
        node="here",
        engine="ray",
        registry=RegistrySettings(connections=4, stall_timeout_seconds=60.0),
        unpack=UnpackSettings(workers=2),
    )


@pytest.fixture(scope="session")
def engine(ray_address: RayAddress, crew_settings: Settings) -> Iterator[RayEngine]:
    """The engine whose crew all tests share: starting one takes seconds."""
    progress = Progress(node="driver")
    engine = RayEngine(crew_settings, progress=progress)
    engine.connect()
    yield engine
    engine.close()
    progress.close()


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    with FakeRegistry() as registry:
        yield registry


@pytest.fixture
def source(registry: FakeRegistry) -> Iterator[Origin]:
    """What stands before the registry and can hold it back."""
    with origin(registry.host) as proxy:
        yield proxy


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait until something has come about; the test's own deadline ends a wait in vain."""
    import time

    def wait(is_so: Callable[[], bool]) -> None:
        while not is_so():
            time.sleep(0.01)

    return wait


@pytest.fixture(scope="session")
def four_nodes(fast_tmp: Path) -> Iterator[RayCluster]:
    """A cluster of n0 (the head) to n3; what a test takes away it brings back."""
    folder = fast_tmp / "four-nodes"
    folder.mkdir()
    names = ["n0", "n1", "n2", "n3"]
    # Ray gives up a silent node after 5 s here instead of 15.
    system = {"health_check_period_ms": 1000, "health_check_failure_threshold": 5}
    with ray_cluster(folder, names, system=system) as cluster:
        yield cluster


@pytest.fixture
def drive(four_nodes: RayCluster, workspace: Path) -> Iterator[Callable[..., Driver]]:
    """Begin a pre-warm of the four nodes, their stores in this test's folder."""
    drivers: list[Driver] = []

    def begin(*references: str, variables: dict[str, str] | None = None, **wanted: Any) -> Driver:
        told = {"references": references, **wanted}
        drivers.append(Driver(four_nodes, workspace, told, **(variables or {})))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


@pytest.fixture
def start(four_nodes: RayCluster, workspace: Path) -> Callable[..., subprocess.Popen[str]]:
    """Begin the command on the four nodes, their stores in this test's folder."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("RAY_", "XDG_", "STOWRAY_"))
    }

    def begin(*arguments: str | Path, progress: str = "none") -> subprocess.Popen[str]:
        common = ["--address", four_nodes.address, "--store", str(workspace / "{node}")]
        return subprocess.Popen(
            [str(PROGRAM), *common, "--progress", progress, *map(str, arguments)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**kept, **four_nodes.environment, "XDG_RUNTIME_DIR": str(workspace)},
        )

    return begin
