"""Programs that use Ray, seen from outside: what they leave behind, however they end."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import processes, scratch, session, session_state
from stowray.actors.embedded import started_below
from stowray.pipeline.digest import Digest
from stowray.pipeline.engine import LocalEngine, PullOptions
from stowray.pipeline.errors import DeadlineError
from stowray.pipeline.progress import FINAL, Progress
from stowray.pipeline.run_record import Run, RunRecord
from stowray.pipeline.settings import Settings
from stowray.pipeline.source import parse_source
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry, Fault
from tests.support.tars import archive, directory, file
from tests.unit.test_metrics import samples

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from stowray.actors.embedded import RayAddress
    from stowray.actors.processes import Process

ROOT = Path(__file__).parents[2]


# Two idle helpers of Ray look for their killed raylet for a minute before they end as well.
HELPERS = ("ray::DashboardA", "ray::RuntimeEnv")


def workers(found: list[Process]) -> list[Process]:
    """Return those of ``found`` that could still do something."""
    return [process for process in found if process.name not in HELPERS]


class Driver:
    """One driver process, and all that runs below it."""

    def __init__(
        self, *arguments: str, cwd: Path, temporary: Path, variables: dict[str, str]
    ) -> None:
        dropped = ("RAY_", "XDG_")
        kept = {name: v for name, v in os.environ.items() if not name.startswith(dropped)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.driver", *arguments],
            stdout=subprocess.PIPE,
            text=True,
            cwd=cwd,
            env={
                **kept,
                "PYTHONPATH": str(ROOT),
                "TMPDIR": str(temporary),
                "XDG_RUNTIME_DIR": str(cwd),
                **variables,
            },
            start_new_session=True,
        )

    def line(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def below(self) -> list[Process]:
        return processes.descendants(self.process.pid)

    def end(self) -> None:
        if self.process.poll() is None:
            # As Ctrl-C at a terminal does: to the whole process group.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()


@pytest.fixture
def here(workspace: Path) -> Path:
    """A working directory with packages of the same names as ours in it."""
    for name in ("pipeline", "actors"):
        (workspace / name).mkdir()
        (workspace / name / "__init__.py").write_text("raise ImportError('a decoy was imported')\n")
    return workspace


@pytest.fixture
def temporary() -> Iterator[Path]:
    """A folder for temporary files whose path is short enough for Ray's sockets."""
    with tempfile.TemporaryDirectory(prefix="s", dir="/tmp") as folder:
        yield Path(folder)


@pytest.fixture
def drive(here: Path, temporary: Path) -> Iterator[Callable[..., Driver]]:
    drivers: list[Driver] = []

    def begin(*arguments: str, **variables: str) -> Driver:
        drivers.append(Driver(*arguments, cwd=here, temporary=temporary, variables=variables))
        return drivers[-1]

    yield begin
    for driver in drivers:
        below = driver.below()
        driver.end()
        processes.end(below, grace_seconds=5.0)


def add_slow(registry: FakeRegistry) -> tuple[str, str]:
    """Add an image whose one layer takes long; return its reference and its blob's path."""
    registry.add_image("a/b", "1", [archive(directory("d"), file("d/f", os.urandom(2 << 20)))])
    (blob,) = [digest for digest, data in registry.blobs.items() if len(data) > 1 << 20]
    registry.fault(f"/blobs/{blob}", Fault(trickle=(16 * 1024, 0.3)))
    return f"{registry.host}/a/b:1", f"/blobs/{blob}"


def resume(store: Path, reference: str) -> None:
    progress = Progress()
    engine = LocalEngine(Settings(store=str(store)), progress=progress)
    try:
        engine.pull(parse_source(reference), PullOptions())
    finally:
        engine.close()
        progress.close()


def partial(store: Path) -> int:
    """Return how many bytes of unfinished blobs the store holds."""
    ingest = store / "ingest"
    return sum(path.stat().st_size for path in ingest.rglob("*") if path.is_file())


def is_free(store: Path, digest: Digest, size: int) -> bool:
    """Return whether nobody writes that blob any more."""
    ingest = Store.open(store).acquire(digest, size)
    if ingest is not None:
        ingest.close()
    return ingest is not None


def test_ctrl_c_ends_an_embedded_ray_whole_and_keeps_what_was_fetched(
    drive: Callable[..., Driver],
    here: Path,
    temporary: Path,
    registry: FakeRegistry,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference, path = add_slow(registry)
    store = here / "store"
    driver = drive("ray", str(store), reference)
    assert driver.line() == "connected True"
    until(lambda: partial(store) > 64 * 1024 or driver.process.poll() is not None)
    below = driver.below()
    assert {"raylet", "gcs_server"} <= {process.name for process in below}
    assert len(list(temporary.glob(f"{scratch.PREFIX}*"))) == 1
    os.killpg(driver.process.pid, signal.SIGINT)
    assert driver.process.wait() == 130
    assert driver.line() == "handlers kept True"
    assert [process for process in below if process.is_alive] == []
    assert list(temporary.glob(f"{scratch.PREFIX}*")) == []
    registry.clear_faults()
    resume(store, reference)
    assert registry.seen(path)[-1].range is not None, "what was fetched is fetched again"


def test_a_killed_driver_takes_its_ray_along_and_the_folder_is_swept(
    drive: Callable[..., Driver],
    here: Path,
    temporary: Path,
    registry: FakeRegistry,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference, _ = add_slow(registry)
    driver = drive("ray", str(here / "store"), reference)
    assert driver.line() == "connected True"
    below = driver.below()
    (left,) = temporary.glob(f"{scratch.PREFIX}*")
    driver.process.kill()
    until(lambda: not any(process.is_alive for process in workers(below)))
    processes.end(below, grace_seconds=0.0)
    assert scratch.sweep(temporary) == [left]
    registry.clear_faults()
    resume(here / "store", reference)


@pytest.mark.slow
def test_a_dead_head_ends_the_driver_with_a_sentence(
    drive: Callable[..., Driver],
    here: Path,
    temporary: Path,
    registry: FakeRegistry,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    reference, _ = add_slow(registry)
    driver = drive("ray", str(here / "store"), reference)
    assert driver.line() == "connected True"
    until(lambda: partial(here / "store") > 64 * 1024 or driver.process.poll() is not None)
    below = driver.below()
    (head,) = [process for process in below if process.name == "gcs_server"]
    head.send(signal.SIGKILL)
    # Ray itself would end the program after 60 s, without an exception and without this line.
    assert driver.line().startswith("NodeError")
    assert driver.line() == "handlers kept True"
    assert driver.process.wait() == 6
    assert [process for process in below if process.is_alive] == []
    # Ray's own exit handler may make empty folders again, which a later start sweeps away.
    assert [path for path in temporary.rglob("*") if path.is_file()] == []


@pytest.fixture
def own_session(
    here: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[session_state.Session]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(here))
    monkeypatch.setenv("TMPDIR", str(temporary))
    started = session.start(Settings(node="here"))
    assert started.session is not None
    yield started.session
    session.stop(Settings())


def test_a_session_serves_commands_and_is_ended_by_pid(
    own_session: session_state.Session,
    drive: Callable[..., Driver],
    here: Path,
    registry: FakeRegistry,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    assert session.status(Settings()).running
    assert session.start(Settings()).session == own_session, "start is idempotent"

    registry.add_image("a/quick", "1", [archive(file("f", b"x"))])
    quick = f"{registry.host}/a/quick:1"
    for store in ("one", "two"):
        driver = drive("auto", str(here / store), quick)
        assert driver.line() == "connected False", "through its door, without Ray"
        assert driver.line().startswith("ray ")
        assert driver.line() == "handlers kept True"
        assert driver.process.wait() == 0

    # A driver that is killed must not leave its pull running in the crew that stays.
    reference, path = add_slow(registry)
    driver = drive("auto", str(here / "one"), reference)
    driver.line()
    until(lambda: partial(here / "one") > 64 * 1024 or driver.process.poll() is not None)
    driver.process.kill()
    digest = Digest(path.removeprefix("/blobs/"))
    until(lambda: is_free(here / "one", digest, len(registry.blobs[digest])))
    registry.clear_faults()
    driver = drive("auto", str(here / "one"), reference)
    driver.line()
    assert driver.line().startswith("ray ")
    assert registry.seen(path)[-1].range is not None

    everything = [own_session.host, *processes.descendants(own_session.host.pid)]
    assert {process.name for process in own_session.processes} >= {"raylet", "gcs_server"}
    stopped = session.stop(Settings())
    assert stopped.state == "none"
    assert [process for process in everything if process.is_alive] == []
    assert not Path(own_session.directory).exists()
    assert session_state.find_session(session_state.state_folder()) is None


def test_a_pause_holds_for_pulls_of_one_store_through_one_session_and_for_no_other_store(
    own_session: session_state.Session,
    drive: Callable[..., Driver],
    here: Path,
    registry: FakeRegistry,
) -> None:
    """Seen from outside, by whatever means: it holds without the files of limits too.

    What those files do between processes of a store is proven in tests/unit/test_node_limits.py.
    """
    references = []
    for name in ("first", "second", "third"):
        registry.add_image(f"a/{name}", "1", [archive(file("f", name.encode()))])
        references.append(f"{registry.host}/a/{name}:1")
    pause = 20.0
    asked = threading.Event()
    told = Fault(status=429, headers=(("Retry-After", f"{pause:.0f}"),), then=asked.set)
    registry.fault("a/first/blobs/", told)
    first = drive("auto", str(here / "one"), references[0])
    assert first.line() == "connected False"
    assert asked.wait(120)
    (begun,) = [request.time for request in registry.seen("a/first/blobs/")]
    elsewhere = drive("auto", str(here / "other"), references[2])
    second = drive("auto", str(here / "one"), references[1])
    for driver in (first, second, elsewhere):
        assert driver.process.wait() == 0
    # The plan of the second one may have been asked for before the pause was known.
    later = [request.time - begun for request in registry.seen("a/second/blobs/")]
    assert min(later) >= pause - 0.1
    assert min(request.time for request in registry.seen("a/third/blobs/")) - begun < min(later)


def test_a_pull_through_a_session_leaves_the_figures_of_a_local_one(
    own_session: session_state.Session, here: Path, registry: FakeRegistry
) -> None:
    """Bytes by source, stages, retries, the log's events and the record's spans."""
    registry.add_image("a/b", "1", [archive(file("f", b"x")), archive(file("g", b"y"))])
    reference = f"{registry.host}/a/b:1"

    def pulled(engine: str) -> tuple[dict[Any, float], set[tuple[str, str]], Run]:
        registry.fault("a/b/blobs/", Fault(status=503))
        figures, record = here / f"{engine}.prom", here / f"{engine}.run"
        command = [sys.executable, "-m", "stowray", "--store", str(here / engine), "--log-json"]
        command += ["--engine", engine, "pull", "--metrics", str(figures), "--record", str(record)]
        done = subprocess.run(
            [*command, reference], capture_output=True, text=True, check=False, cwd=ROOT
        )
        assert done.returncode == 0, done.stderr
        lines = [json.loads(line) for line in done.stderr.splitlines()]
        (run,) = RunRecord.read(record).runs
        return (
            samples(figures.read_text()),
            {(line["event"], line["id"]) for line in lines if line.get("id")},
            run,
        )

    (near, said_near, local), (far, said_far, remote) = pulled("local"), pulled("ray")
    assert far["stowray_retries_total", ()] == near["stowray_retries_total", ()] == 1
    assert local.result is not None and remote.result is not None
    assert (local.result["engine"], remote.result["engine"]) == ("local", "ray")
    measured = ("_seconds_sum", "_timestamp_seconds", "_free_bytes")
    assert {key for key in near if key not in far} == set()
    for key, value in near.items():
        if not key[0].endswith(measured):
            assert far[key] == value, key
    for stage, seconds in remote.result["seconds"].items():
        assert far["stowray_stage_duration_seconds_sum", (("stage", stage),)] == seconds
        assert seconds > 0, stage
    # Whether what begins and ends between two looks is seen to have begun is chance.
    final = {status for status in FINAL if status != "exists"}
    for found in (said_near, said_far):
        found -= {line for line in found if line[0].partition(".")[2] not in final}
    assert said_far == said_near

    def spans(run: Run) -> dict[tuple[str, str], tuple[str, int, int]]:
        return {(s.kind, s.id): (s.status, s.total, s.retries) for s in run.spans}

    assert spans(remote) == spans(local)
    # By the name of the one who pulls, whatever the session was called when it was started.
    assert {span.node for span in remote.spans} == {span.node for span in local.spans}
    for span in remote.spans:
        assert span.completed is not None
        assert span.started <= span.active <= span.end <= remote.seconds + 0.1


def test_a_session_that_is_not_up_in_time_leaves_nothing(
    here: Path, temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(here))
    monkeypatch.setenv("TMPDIR", str(temporary))
    before = processes.descendants(os.getpid())
    with pytest.raises(DeadlineError, match="starting the session"):
        session.start(Settings(), seconds=2.0)
    assert session.status(Settings()).state == "none"
    after = processes.descendants(os.getpid())
    assert [process for process in after if process not in before] == []


def test_a_session_whose_host_was_killed_is_replaced_and_an_idle_one_ends(
    own_session: session_state.Session, until: Callable[[Callable[[], bool]], None]
) -> None:
    everything = processes.descendants(own_session.host.pid)
    own_session.host.send(signal.SIGKILL)
    until(lambda: not any(process.is_alive for process in workers(everything)))
    assert session.status(Settings()).state == "dead"
    assert not session_state.is_warm(Settings())
    again = session.start(Settings(node="here"), idle_seconds=1.0)
    assert again.session is not None
    assert again.session.host != own_session.host
    assert [process for process in everything if process.is_alive] == []
    assert not Path(own_session.directory).exists()
    until(lambda: session.status(Settings()).state == "none")


ATTACH = """
import sys
import tempfile
from pathlib import Path
from stowray.actors.embedded import attached_ray
from stowray.pipeline.errors import StowrayError
address, token = sys.argv[1:3]
try:
    with attached_ray(address, token_path=Path(token), seconds=float(sys.argv[3])) as found:
        print("attached", found.is_own)
except StowrayError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize(
    ("address", "token", "seconds", "expected"),
    [
        pytest.param("", "", "60", "attached False", id="right"),
        pytest.param("", "wrong", "2", "DeadlineError connecting to the Ray at", id="wrong token"),
        pytest.param("", "missing", "60", "NodeError", id="no token file"),
        pytest.param("127.0.0.1:1", "", "60", "NodeError 127.0.0.1:1: no Ray answers", id="dead"),
        pytest.param("nonsense", "", "60", "NodeError nonsense: cannot connect", id="nonsense"),
    ],
)
def test_every_way_into_a_ray_ends(
    ray_address: RayAddress,
    workspace: Path,
    address: str,
    token: str,
    seconds: str,
    expected: str,
) -> None:
    assert ray_address.token_path is not None
    path = workspace / token if token else ray_address.token_path
    if token == "wrong":
        path.write_text("f" * 64)
    done = subprocess.run(
        [sys.executable, "-c", ATTACH, address or ray_address.address, str(path), seconds],
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.startswith(expected), done.stderr
    assert started_below(ray_address.token_path.parent), "the Ray that was there has ended"


def test_a_cluster_of_somebody_else_is_used_and_left_as_it_was(
    ray_address: RayAddress,
    drive: Callable[..., Driver],
    here: Path,
    registry: FakeRegistry,
    until: Callable[[Callable[[], bool]], None],
) -> None:
    assert ray_address.token_path is not None
    folder = ray_address.token_path.parent

    def crews() -> int:
        return [process.name for process in started_below(folder)].count("ray::NodeActor")

    registry.add_image("a/b", "1", [archive(file("f", b"x"))])
    before = crews()
    driver = drive(
        "ray",
        str(here / "store"),
        f"{registry.host}/a/b:1",
        # What the owner of a cluster tells its users to set.
        RAY_ADDRESS=ray_address.address,
        RAY_AUTH_MODE="token",
        RAY_AUTH_TOKEN_PATH=str(ray_address.token_path),
        RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER="0",
    )
    assert driver.line() == "connected True"
    assert driver.line().startswith("ray ")
    assert driver.line() == "handlers kept True"
    assert driver.process.wait() == 0
    until(lambda: crews() == before)


def test_a_worker_uses_the_ray_it_is_in(
    ray_address: RayAddress, registry: FakeRegistry, here: Path
) -> None:
    import ray

    registry.add_image("a/b", "1", [archive(file("f", b"x"))])
    reference, store = f"{registry.host}/a/b:1", str(here / "store")

    @ray.remote(num_cpus=0)
    def pull(engine: str) -> tuple[str, int]:
        import stowray

        result = stowray.pull(reference, store=store, engine=engine)
        return result.engine, result.fetched_bytes

    # A hundred tasks must not start a hundred crews: by itself a worker works alone.
    assert ray.get(pull.remote("auto"))[0] == "local"
    assert ray.get(pull.remote("ray")) == ("ray", 0)
