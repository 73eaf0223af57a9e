"""Pre-warming machines whose cables are pulled: real `ray start` nodes in network namespaces.

Ray is told here to be patient: what is seen is that the run itself misses a machine.
"""

from __future__ import annotations

import base64
import json
import signal
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import trustme

from tests.cluster.prewarm import Driver, add_image, states
from tests.support.machines import machines, why_not
from tests.support.origin import origin
from tests.support.registry import FakeRegistry

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from tests.support.machines import Machines
    from tests.support.origin import Origin

NAMES = ("m0", "m1", "m2", "m3")
MIB = 1 << 20
PATIENT = {"health_check_failure_threshold": 1000, "health_check_timeout_ms": 600_000}

pytestmark = [pytest.mark.root, pytest.mark.skipif(bool(why_not()), reason=why_not())]


@dataclass(frozen=True)
class Site:
    """Four machines with a Ray, the head on the first, and a registry that all of them reach."""

    net: Machines
    address: str
    registry: FakeRegistry
    source: Origin

    @property
    def environment(self) -> Mapping[str, str]:
        return self.net.environment()

    def add_image(self, name: str, *sizes: int) -> str:
        return add_image(self.registry, name, *sizes).replace(self.registry.host, self.source.host)


@pytest.fixture(scope="module")
def machines_with_ray(fast_tmp: Path) -> Iterator[tuple[Machines, str]]:
    # A name of its own for each try.
    folder = Path(tempfile.mkdtemp(prefix="machines-", dir=fast_tmp))
    with machines(folder, NAMES) as net, net.ray(system=json.dumps(PATIENT)) as address:
        yield net, address


@pytest.fixture
def site(machines_with_ray: tuple[Machines, str]) -> Iterator[Site]:
    """The machines, all cables plugged in, before an empty registry."""
    net, address = machines_with_ray
    with FakeRegistry() as registry, origin(registry.host, listener=net.listen()) as source:
        try:
            yield Site(net, address, registry, source)
        finally:
            for name in NAMES:
                net.heal(name)


@pytest.fixture
def drive(site: Site, workspace: Path) -> Iterator[Callable[..., Driver]]:
    """Begin a pre-warm on the head's machine."""
    drivers: list[Driver] = []

    def begin(*references: str, **wanted: Any) -> Driver:
        told = {"settings": {"plain_http": [site.source.host]}, **wanted, "references": references}
        drivers.append(Driver(site, workspace, told, enter=site.net["m0"].enter))
        return drivers[-1]

    yield begin
    for driver in drivers:
        driver.end()


def arrived(folder: Path, node: str) -> int:
    """Return how many bytes of unfinished blobs a node's store holds."""
    found = (folder / node / "ingest").rglob("data*")
    return sum(path.stat().st_blocks * 512 for path in found if path.is_file())


def wait_for(driver: Driver, node: str, state: str) -> dict[str, Any]:
    """Read what the driver tells until a node is in a state."""
    while (change := driver.line())["nodes"].get(node) != state:
        continue
    return change


@pytest.fixture
def until() -> Callable[[Callable[[], bool]], None]:
    """Wait until something has come about; the test's own deadline ends a wait in vain."""
    import time

    def wait(is_so: Callable[[], bool]) -> None:
        while not is_so():
            time.sleep(0.01)

    return wait


def test_a_machine_that_is_cut_off_is_told_and_not_waited_for(
    site: Site,
    drive: Callable[..., Driver],
    workspace: Path,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference = site.add_image("slow", 12 * MIB)
    site.source.throttle(1 * MIB)
    driver = drive(reference)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NAMES))
    site.net.cut("m2")
    code, report = driver.finish()
    assert code == 1
    assert states(report) == {"m0": "ready", "m1": "ready", "m2": "dead", "m3": "ready"}
    (cell,) = [cell for cell in report["cells"] if cell["node"] == "m2"]
    assert (cell["present"], cell["error"]["type"]) == (False, "NodeError")
    assert "no answer for" in cell["error"]["message"]
    had = arrived(workspace, "m2")
    site.net.heal("m2")
    site.source.throttle(None)
    given = site.source.blob_bytes
    code, report = drive(reference).finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NAMES, "ready")
    assert had > 256 * 1024
    assert site.source.blob_bytes == given, "what nodes have comes from nodes"
    assert report["peer_bytes"] < 12 * MIB, "what was there came again"


def test_a_machine_that_comes_back_in_time_is_taken_in_again(
    site: Site,
    drive: Callable[..., Driver],
    workspace: Path,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference = site.add_image("back", 12 * MIB)
    site.source.hold_after(8 * MIB)
    driver = drive(reference, changes=True)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NAMES))
    site.net.cut("m2")
    wait_for(driver, "m2", "dead")
    site.net.heal("m2")
    wait_for(driver, "m2", "working")
    site.source.hold_after(None)
    code, report = driver.finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NAMES, "ready")


def test_a_short_cut_is_not_even_noticed(
    site: Site,
    drive: Callable[..., Driver],
    workspace: Path,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference = site.add_image("short", 6 * MIB)
    site.source.throttle(MIB)
    driver = drive(reference, changes=True)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NAMES))
    site.net.cut("m3")
    until(lambda: any((workspace / name / "snapshots").is_dir() for name in NAMES))
    site.net.heal("m3")
    code, report = driver.finish()
    assert code == 0, report
    assert states(report) == dict.fromkeys(NAMES, "ready")


def test_machines_get_the_login_and_the_authority_of_the_driver(
    machines_with_ray: tuple[Machines, str], workspace: Path
) -> None:
    net, address = machines_with_ray
    authority = trustme.CA()
    listener = net.listen()
    bridge = listener.getsockname()[0]
    with FakeRegistry(
        auth="basic",
        users={"me": "mypassword"},
        authority=authority,
        certificate_names=[bridge],
        listener=listener,
    ) as registry:
        host = f"{bridge}:{listener.getsockname()[1]}"
        reference = add_image(registry, "private", MIB, 1000).replace(registry.host, host)
        login = base64.b64encode(b"me:mypassword").decode()
        private = net.temporary / "private"
        files = {
            # Each machine has a temporary folder of its own: no other sees these.
            "auth.json": json.dumps({"auths": {host: {"auth": login}}}),
            f"hosts/{host}/hosts.toml": f"""
                server = "https://{host}"
                [host."https://{host}"]
                ca = "{private}/ca.pem"
            """,
            "ca.pem": authority.cert_pem.bytes().decode(),
        }
        for name, text in files.items():
            script = 'mkdir -p "$(dirname "$0")" && printf %s "$1" > "$0"'
            net["m0"].run(["sh", "-c", script, str(private / name), text])
        settings = {"authfile": f"{private}/auth.json", "hosts_dir": f"{private}/hosts"}
        told = {"references": [reference], "settings": settings, "plan": {"nodes.names": ["m2"]}}
        site = Site(net, address, registry, source=None)  # type: ignore[arg-type]
        driver = Driver(site, workspace, told, enter=net["m0"].enter)
        try:
            code, report = driver.finish()
        finally:
            driver.end()
        assert code == 0, json.dumps(report)
        assert states(report) == {"m2": "ready"}
        assert report["origin_bytes"] > MIB // 2, "the machine fetched it from the registry"
    for name in NAMES:
        found = net[name].run(["grep", "-rlE", f"mypassword|{login}", str(net.temporary)]).stdout
        left = [line for line in found.splitlines() if not line.startswith(f"{private}/")]
        assert left == [], "a secret stands in Ray's files"


def ours(site: Site, name: str) -> list[str]:
    """Return the processes of our actors on a machine."""
    told = site.net[name].run(["ps", "-eo", "args"]).stdout
    return [line for line in told.splitlines() if line.startswith("ray::") and "Actor" in line]


def test_actors_whose_driver_is_cut_off_and_dies_end_by_themselves(
    site: Site,
    drive: Callable[..., Driver],
    workspace: Path,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference = site.add_image("alone", 12 * MIB)
    site.source.hold_after(8 * MIB)
    driver = drive(reference)
    until(lambda: all(arrived(workspace, name) > 256 * 1024 for name in NAMES))
    assert all(ours(site, name) for name in NAMES)
    # Neither the driver nor Ray's head, on the same machine, can end them now.
    site.net.cut("m0")
    driver.send(signal.SIGKILL)
    until(lambda: not any(ours(site, name) for name in NAMES))
    site.net.heal("m0")
    site.source.hold_after(None)
    given = site.source.blob_bytes
    code, report = drive(reference).finish()
    assert code == 0, report
    assert site.source.blob_bytes - given < 8 * MIB, "what was there came again"
