"""All that is said to Ray: which actor runs where and how, and what its failures mean.

The modules of the actors are imported where they are started, because they import this one.
Invariant: ``ray.remote`` is called here only; actors of a run are unnamed and end with their
driver, those of a session are detached and bear the protocol's number in their name, so that no
program ever talks to an actor of another make. Ray's exceptions go no further than this module.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
import threading
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar, cast

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from stowray.actors.processes import Process
from stowray.actors.session_state import PROTOCOL
from stowray.pipeline.errors import (
    CancelledError,
    DeadlineError,
    NodeError,
    StorageError,
    StowrayError,
)

if TYPE_CHECKING:
    from collections.abc import Callable

    from ray.actor import ActorClass, ActorProxy

    from stowray.actors.fetcher import FetchActor
    from stowray.actors.node import NodeActor
    from stowray.actors.progress import ProgressActor
    from stowray.actors.resolver import ResolverActor
    from stowray.actors.unpacker import UnpackActor

Value = TypeVar("Value")

NODES_SECONDS = 10.0
WAIT_SECONDS = 0.2
LOST = "the process ended in mid-work"
UNPLACED = "cannot be placed on its node"
_LOSSES = (
    ray.exceptions.RayActorError,
    ray.exceptions.WorkerCrashedError,
    ray.exceptions.NodeDiedError,
    ray.exceptions.LocalRayletDiedError,
)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an actor lives: the node, and for a session the name under which it is found."""

    node_id: str
    name: str = ""
    restarts: int = 0

    def options(self) -> dict[str, Any]:
        """Return the options of an actor at this place."""
        options: dict[str, Any] = {
            # A node without a free processor is served too; what an actor uses is mostly I/O.
            "num_cpus": 0,
            # Calls are idempotent and repeated by whoever made them; Ray repeats nothing.
            "max_restarts": self.restarts,
            "max_task_retries": 0,
            "scheduling_strategy": NodeAffinitySchedulingStrategy(self.node_id, soft=False),
        }
        if self.name:
            options |= {"name": self.name, "lifetime": "detached"}
        return options


def session_name(role: str) -> str:
    """Return the name under which a session's actor is found."""
    return f"stowray/{PROTOCOL}/{role}"


def start_resolver(placement: Placement) -> ActorProxy[ResolverActor]:
    """Start the resolver of a run or session."""
    from stowray.actors.resolver import ResolverActor

    remote = _remote(ResolverActor, work=32, control=2, leases=1, life=1)
    return remote.options(**placement.options()).remote()


def start_progress(placement: Placement) -> ActorProxy[ProgressActor]:
    """Start the progress actor of a run or session."""
    from stowray.actors.progress import ProgressActor

    remote = _remote(ProgressActor, notes=2, watchers=64, life=1)
    return remote.options(**placement.options()).remote()


def start_node(
    placement: Placement, node: str, unpackers: int, *, stays: bool, lazy: bool = False
) -> ActorProxy[NodeActor]:
    """Start the actor that owns the stores of one node; ``stays``: beyond the run, in a session.

    A ``lazy`` one starts the members of its pools when there is something for them to do.
    """
    from stowray.actors.node import NodeActor

    remote = _remote(NodeActor, pulls=64, notes=2, control=4, life=1)
    return remote.options(**placement.options()).remote(node, unpackers, stays, lazy)


def start_fetcher(node_id: str) -> ActorProxy[FetchActor]:
    """Start a fetcher on a node."""
    from stowray.actors.fetcher import FetchActor

    remote = _remote(FetchActor, work=64, control=2, life=1)
    return remote.options(**Placement(node_id).options()).remote()


def start_unpacker(node_id: str) -> ActorProxy[UnpackActor]:
    """Start an unpacker on a node."""
    from stowray.actors.unpacker import UnpackActor

    remote = _remote(UnpackActor, work=16, control=2, life=1)
    return remote.options(**Placement(node_id).options()).remote()


def ask_by_value(function: Callable[[], Value], node_id: str) -> ray.ObjectRef[Value]:
    """Run a function of the standard library only on a node, without our package there."""
    module = sys.modules[function.__module__]
    ray.cloudpickle.register_pickle_by_value(module)  # type: ignore[no-untyped-call]
    try:
        task = ray.remote(function).options(
            num_cpus=0,
            max_retries=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(node_id, soft=False),
        )
        return task.remote()
    finally:
        ray.cloudpickle.unregister_pickle_by_value(module)  # type: ignore[no-untyped-call]


def end(actor: Any) -> None:
    """End an actor's process at once; one that is gone already is no error."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError, RuntimeError):
        ray.kill(actor, no_restart=True)


def restart(actor: Any) -> None:
    """End an actor's process; Ray starts it anew as often as it was told to."""
    with contextlib.suppress(ray.exceptions.RayError, ValueError, RuntimeError):
        ray.kill(actor, no_restart=False)


def when_ended(actor: Any, callback: Callable[[], None]) -> None:
    """Call ``callback``, on a thread of Ray's, when the actor's process has ended.

    The actor's ``live`` never returns, so that its call ends only with the process; and that ends
    with the one that asks, which is on the same node.
    """
    actor.live.remote(Process.own().to_dict()).future().add_done_callback(lambda _done: callback())


def own_handle() -> Any:
    """Return the handle of the actor that asks, for others to call it."""
    return ray.get_runtime_context().current_actor


def own_node_id() -> str:
    """Return the ID of the node that this process runs on."""
    return str(ray.get_runtime_context().get_node_id())


def wait(
    reference: ray.ObjectRef[Value],
    where: str,
    *,
    seconds: float | None = None,
    look: Callable[[], None] | None = None,
) -> Value:
    """Return the result of a call; raises our errors only.

    ``look`` is called a few times a second and ends the wait by raising.
    """
    waited = 0.0
    while True:
        ready, _ = ray.wait([reference], timeout=WAIT_SECONDS)
        if ready:
            break
        waited += WAIT_SECONDS
        if seconds is not None and waited >= seconds:
            raise DeadlineError(where, seconds)
        if look is not None:
            look()
    try:
        return ray.get(reference)
    except (ray.exceptions.RayError, StowrayError) as error:
        raise translate(error, where) from None


async def ask(reference: ray.ObjectRef[Value], where: str, seconds: float | None = None) -> Value:
    """Return the result of a call from within an event loop; raises our errors only.

    A call that takes longer than ``seconds``, or whose asker is cancelled, runs on unheard.
    """
    future = asyncio.wrap_future(reference.future())
    # Ray sets the result also when nobody wants it any more.
    future.add_done_callback(lambda done: done.cancelled() or done.exception())
    try:
        async with asyncio.timeout(seconds):
            return await asyncio.shield(future)
    except (ray.exceptions.RayError, StowrayError) as error:
        raise translate(error, where) from None
    except TimeoutError:
        raise DeadlineError(where, seconds or 0.0) from None


def forget(reference: ray.ObjectRef[Any]) -> None:
    """Let a call run on whose result nobody wants, whatever becomes of it.

    Ray prints errors of calls that nobody asked for.
    """
    reference.future().add_done_callback(lambda done: done.exception())


def is_lost(error: BaseException) -> bool:
    """Return whether ``error``, translated, says that the process is gone or out of reach."""
    return isinstance(error, NodeError) and error.reason == LOST


def is_homeless(error: BaseException) -> bool:
    """Return whether ``error``, translated, says that the node of an actor is gone."""
    return isinstance(error, NodeError) and error.reason == UNPLACED


def was_restarted() -> bool:
    """Return whether Ray has started the actor that asks once before."""
    with warnings.catch_warnings():
        # Ray's own use of what it has deprecated, printed in every driver's output.
        warnings.simplefilter("ignore")
        return bool(ray.get_runtime_context().was_current_actor_reconstructed)


def settle(reference: ray.ObjectRef[Any], seconds: float) -> None:
    """Wait until a call that nobody wants the result of has ended, at most ``seconds``."""
    with contextlib.suppress(ray.exceptions.RayError):
        ray.wait([reference], timeout=seconds)


def is_loss(error: BaseException) -> bool:
    """Return whether the process that had the call is gone or out of reach."""
    return isinstance(error, _LOSSES) and not isinstance(
        error, ray.exceptions.ActorUnschedulableError
    )


def translate(error: BaseException, where: str) -> StowrayError:
    """Return what ``error``, raised by a call to ``where``, means in our terms."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, StowrayError):
            return cause
        return NodeError(where, f"{type(cause).__name__}: {_one_line(cause)}")
    if isinstance(error, StowrayError):
        return error
    if isinstance(error, ray.exceptions.TaskCancelledError):
        return CancelledError(where)
    if isinstance(error, ray.exceptions.GetTimeoutError):
        return DeadlineError(where, NODES_SECONDS)
    if isinstance(error, ray.exceptions.ActorUnschedulableError):
        return NodeError(where, UNPLACED)
    if isinstance(error, ray.exceptions.RuntimeEnvSetupError):
        return NodeError(where, f"its environment cannot be set up: {_one_line(error)}")
    if isinstance(error, ray.exceptions.OutOfDiskError):
        return StorageError(where, "the disk of Ray's object store is full")
    if isinstance(error, ray.exceptions.OutOfMemoryError):
        return NodeError(where, "ended by Ray's memory monitor: the node is short of memory")
    if isinstance(error, _LOSSES):
        return NodeError(where, LOST)
    return NodeError(where, f"{type(error).__name__}: {_one_line(error)}")


def alive_nodes(seconds: float = NODES_SECONDS) -> list[dict[str, Any]]:
    """Return Ray's description of every living node; DeadlineError when the head is silent.

    ``ray.nodes()`` waits for a dead head for ever, so it is asked from a thread that may be left.
    """
    answers: list[list[dict[str, Any]]] = []

    def ask_head() -> None:
        # Whoever left the Ray meanwhile wants no answer any more.
        with contextlib.suppress(ray.exceptions.RayError):
            answers.append(ray.nodes())  # type: ignore[no-untyped-call]

    thread = threading.Thread(target=ask_head, name="ray-nodes", daemon=True)
    thread.start()
    thread.join(seconds)
    if not answers:
        raise DeadlineError("asking the head of the Ray cluster for its nodes", seconds)
    return [node for node in answers[0] if node["Alive"]]


def _remote(actor: type[Value], **groups: int) -> ActorClass[Value]:
    # `.options()` takes no concurrency groups, and the stubs know no decorator that does.
    remote = cast("Any", ray.remote)
    return cast("ActorClass[Value]", remote(concurrency_groups=groups)(actor))


def _one_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
