"""What holds of the Ray that Stowray starts, and of what passes through it."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/

from __future__ import annotations

import asyncio
import inspect
import os
import re
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import ray

from stowray.actors import cluster, foreign
from stowray.actors.embedded import embedded_ray, started_below
from stowray.actors.follow import Follower
from stowray.pipeline import errors
from stowray.pipeline.errors import NodeError, StowrayError

if TYPE_CHECKING:
    from stowray.actors.embedded import RayAddress


def listeners(pid: int) -> list[str]:
    """Return the addresses on which a process listens for TCP, as /proc writes them."""
    inodes = set()
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry))
        except OSError:
            continue
        if match:
            inodes.add(match[1])
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            # State 0A is LISTEN.
            if fields[3] == "0A" and fields[9] in inodes:
                found.append(fields[1].partition(":")[0])
    return found


LOOPBACK = {
    "0100007F",  # 127.0.0.1
    "00000000000000000000000001000000",  # ::1
    "0000000000000000FFFF00000100007F",  # ::ffff:127.0.0.1
}


def test_nothing_listens_beyond_loopback(ray_address: RayAddress, engine: object) -> None:
    assert ray_address.token_path is not None
    started = started_below(ray_address.token_path.parent)
    heard = {
        (process.name, address) for process in [*started] for address in listeners(process.pid)
    } | {("driver", address) for address in listeners(os.getpid())}
    assert {"gcs_server", "raylet"} <= {name for name, _ in heard}, "the test saw no listeners"
    assert [entry for entry in heard if entry[1] not in LOOPBACK] == []


def test_the_token_is_in_no_environment_and_no_argument(ray_address: RayAddress) -> None:
    assert ray_address.token_path is not None
    token = ray_address.token_path.read_bytes()
    started = started_below(ray_address.token_path.parent)
    assert started
    for process in started:
        for what in ("environ", "cmdline"):
            assert token not in Path(f"/proc/{process.pid}/{what}").read_bytes()


def test_one_process_has_one_ray(ray_address: RayAddress) -> None:
    with pytest.raises(NodeError, match="connected to another Ray"), embedded_ray():
        pass


def subclasses(kind: type[StowrayError]) -> list[type[StowrayError]]:
    below = [found for child in kind.__subclasses__() for found in subclasses(child)]
    return [kind, *below]


def sample(kind: type[StowrayError]) -> StowrayError:
    if kind.__init__ is Exception.__init__:
        return kind("<what>")
    values = {"int": 7, "float": 1.5}
    parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]
    return kind(*(values.get(str(field.annotation), f"<{field.name}>") for field in parameters))


@pytest.mark.parametrize("kind", subclasses(StowrayError), ids=lambda kind: kind.__name__)
def test_every_error_comes_through_a_task_whole(
    ray_address: RayAddress, kind: type[StowrayError]
) -> None:
    error = sample(kind)

    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise error

    with pytest.raises(StowrayError) as caught:
        cluster.wait(fail.remote(), "a task", seconds=60)
    assert type(caught.value) is kind
    assert caught.value.args == error.args
    assert str(caught.value) == str(error)
    assert kind is StowrayError or errors.from_wire(*errors.to_wire(error)).args == error.args


def test_a_foreign_exception_becomes_one_sentence(ray_address: RayAddress) -> None:
    @ray.remote(num_cpus=0)
    def fail() -> None:
        raise ValueError("first line\nsecond line")

    with pytest.raises(NodeError, match=r"^a task: ValueError: first line$"):
        cluster.wait(fail.remote(), "a task", seconds=60)


def test_a_call_that_takes_too_long_is_left(ray_address: RayAddress) -> None:
    @ray.remote(num_cpus=0)
    def sleep() -> None:
        import time

        time.sleep(600)

    call = sleep.remote()
    with pytest.raises(errors.DeadlineError):
        cluster.wait(call, "a task", seconds=0.4)
    ray.cancel(call, force=True)


def test_who_follows_a_silent_actor_asks_ray_for_nothing_once_it_is_closed(
    ray_address: RayAddress,
) -> None:
    asked = Path(ray_address.token_path or "").parent / "asked"

    @ray.remote(num_cpus=0)
    class Silent:
        async def poll(self, run: str, version: int, seconds: float) -> None:
            Path(run).touch()
            await asyncio.sleep(600)

        async def close(self, run: str) -> None:
            return

    actor = Silent.remote()
    follower = Follower(actor, str(asked), lambda frame: None)
    while not asked.exists():
        time.sleep(0.01)
    follower.close()
    # Ray would end this process when the thread asked on after a shutdown.
    assert "follow" not in {thread.name for thread in threading.enumerate()}
    ray.kill(actor)


def test_a_node_tells_what_it_has_without_our_package(ray_address: RayAddress) -> None:
    (report,) = foreign.probe_nodes([ray_address.node_id], ["here"])
    assert report.error == ""
    assert report.uid == os.geteuid()
    foreign.require_like([report])


def test_living_nodes_are_told(ray_address: RayAddress) -> None:
    assert [node["NodeID"] for node in cluster.alive_nodes()] == [ray_address.node_id]
