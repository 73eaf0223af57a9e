"""The door of a session: calls get through to the crew, and nobody waits for what has ended."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/
from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.actors import door, door_link
from stowray.actors.door import Door, socket_name
from stowray.actors.door_link import DoorLink
from stowray.pipeline.errors import CancelledError, NodeError, NotFoundError
from stowray.pipeline.frames import receive_frame, send_frame

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

WAIT_SECONDS = 60


def never() -> bool:
    return False


class Crew:
    """Plays the crew behind the door."""

    is_session = True

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.begun = threading.Event()
        self.given_up = threading.Event()

    def resolve(self, request: dict[str, Any], _cancelled: Callable[[], bool]) -> dict[str, Any]:
        self.requests.append(request)
        if request["run"] == "missing":
            raise NotFoundError("registry.example/app:1", "no such tag")
        return {"documents": {"sha256:00": b"\x00\xff"}, "events": [], "requests": 2}

    def pull(
        self,
        request: dict[str, Any],
        cancelled: Callable[[], bool],
        take: Callable[[bytes], None],
    ) -> dict[str, Any]:
        self.requests.append(request)
        for number in range(3):
            take(bytes([number]))
        if request["run"] == "endless":
            self.begun.set()
            while not cancelled():
                self.given_up.wait(0.01)
            self.given_up.set()
            raise CancelledError("pull")
        return {"result": {"layers": [1, 2]}}


@pytest.fixture
def crew() -> Crew:
    return Crew()


@pytest.fixture
def path(tmp_path: Path, crew: Crew) -> Iterator[Path]:
    place = tmp_path / "door"
    with closing(Door(place, crew)):
        yield place


def test_calls_reach_the_crew_and_its_answers_come_back(path: Path, crew: Crew) -> None:
    link = DoorLink(path)
    request = {"run": "1", "documents": {"sha256:01": b"\xff"}, "settings": {"none": None}}
    assert link.resolve(request, never) == {
        "documents": {"sha256:00": b"\x00\xff"},
        "events": [],
        "requests": 2,
    }
    frames: list[bytes] = []
    assert link.pull(request, never, frames.append) == {"result": {"layers": [1, 2]}}
    assert frames == [b"\x00", b"\x01", b"\x02"]
    assert crew.requests == [request, request]


def test_an_error_keeps_its_class_and_its_words(path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"registry\.example/app:1.*no such tag"):
        DoorLink(path).resolve({"run": "missing"}, never)


def test_a_cancelled_call_is_cancelled_behind_the_door(path: Path, crew: Crew) -> None:
    with pytest.raises(CancelledError):
        DoorLink(path).pull({"run": "endless"}, crew.begun.is_set, lambda _frame: None)
    assert crew.given_up.wait(WAIT_SECONDS)


def test_an_interrupted_caller_leaves_nothing_running(path: Path, crew: Crew) -> None:
    def interrupted() -> bool:
        if crew.begun.is_set():
            raise KeyboardInterrupt
        return False

    with pytest.raises(KeyboardInterrupt):
        DoorLink(path).pull({"run": "endless"}, interrupted, lambda _frame: None)
    assert crew.given_up.is_set(), "it is told before the caller goes on"


def test_the_call_of_a_killed_caller_is_cancelled(path: Path, crew: Crew) -> None:
    program = (
        "import sys; from pathlib import Path; from stowray.actors.door_link import DoorLink\n"
        "DoorLink(Path(sys.argv[1])).pull({'run': 'endless'}, lambda: False, lambda _: None)"
    )
    with subprocess.Popen([sys.executable, "-c", program, path]) as caller:
        try:
            assert crew.begun.wait(WAIT_SECONDS)
        finally:
            caller.kill()
    assert crew.given_up.wait(WAIT_SECONDS)


def test_pulls_through_the_door_need_no_ray(path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; import stowray.actors.engine\n"
        "from stowray.actors.door_link import DoorLink\n"
        "DoorLink(Path(sys.argv[1])).resolve({'run': '1'}, lambda: False)\n"
        "print('ray' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, path], check=True, capture_output=True, text=True
    )
    assert done.stdout == "False\n"


def test_many_callers_are_served_side_by_side(path: Path, crew: Crew) -> None:
    stop = threading.Event()
    ends: list[type[BaseException]] = []

    def wait() -> None:
        try:
            DoorLink(path).pull({"run": "endless"}, stop.is_set, lambda _frame: None)
        except CancelledError as error:
            ends.append(type(error))

    threads = [threading.Thread(target=wait) for _ in range(20)]
    for thread in threads:
        thread.start()
    try:
        assert crew.begun.wait(WAIT_SECONDS)
        assert DoorLink(path).resolve({"run": "1"}, never)["requests"] == 2
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ends == [CancelledError] * 20


def test_the_socket_is_its_owner_s_alone_and_goes_with_the_door(tmp_path: Path, crew: Crew) -> None:
    place = tmp_path / "door"
    with closing(Door(place, crew)):
        assert stat.S_IMODE(place.lstat().st_mode) == 0o600
    assert not place.exists()
    with pytest.raises(NodeError, match="does not answer"):
        DoorLink(place).resolve({"run": "1"}, never)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can play another user")
def test_another_user_is_not_let_in(crew: Crew) -> None:
    program = (
        "import os, socket, sys; os.setgroups([]); os.setgid(65534); os.setuid(65534)\n"
        "door = socket.socket(socket.AF_UNIX)\n"
        "door.connect(sys.argv[1])\n"
        "print(door.recv(1))"
    )
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "door"
        with closing(Door(place, crew)):
            place.parent.chmod(0o755)
            place.chmod(0o666)
            done = subprocess.run(
                [sys.executable, "-c", program, place], check=True, capture_output=True, text=True
            )
    assert done.stdout == "b''\n", "hung up on before a word was said"
    assert not crew.requests


def test_a_path_longer_than_a_socket_address_serves_too(tmp_path: Path, crew: Crew) -> None:
    folder = tmp_path / ("long" * 30) / ("longer" * 30)
    folder.mkdir(parents=True)
    place = folder / "door"
    with closing(Door(place, crew)):
        assert DoorLink(place).resolve({"run": "1"}, never)["requests"] == 2


@pytest.mark.parametrize(
    "word", [b"GET / HTTP/1.1\r\n\r\n", b"\x00\x00\x00\x01\xc1", b"\x00\x00\x00\x02\x90\x90"]
)
def test_who_talks_nonsense_is_hung_up_on_and_others_are_served(path: Path, word: bytes) -> None:
    with _knock(path) as stranger:
        stranger.sendall(word)
        stranger.shutdown(socket.SHUT_WR)
        # Unread bytes turn a hang-up into a reset.
        with suppress(ConnectionResetError):
            assert stranger.recv(1) == b""
    assert DoorLink(path).resolve({"run": "1"}, never)["requests"] == 2


@pytest.mark.parametrize("message", [["open", {}], "resolve", [1, 2, 3], {"run": "1"}])
def test_a_message_that_is_no_call_ends_the_connection(path: Path, message: object) -> None:
    with _knock(path) as stranger:
        send_frame(stranger, message)
        assert receive_frame(stranger) is None


def test_a_stale_socket_is_replaced(tmp_path: Path, crew: Crew) -> None:
    place = tmp_path / "door"
    dead = socket.socket(socket.AF_UNIX)
    with socket_name(place) as name:
        dead.bind(name)
    dead.close()
    with closing(Door(place, crew)):
        assert DoorLink(place).resolve({"run": "1"}, never)["requests"] == 2


class Host:
    """Plays a session's host that goes wrong after the call has come in."""

    def __init__(self, path: Path) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        with socket_name(path) as name:
            self._listener.bind(name)
        self._listener.listen()

    def take(self) -> socket.socket:
        connection, _ = self._listener.accept()
        receive_frame(connection)
        return connection

    def close(self) -> None:
        self._listener.close()


def test_a_host_that_dies_in_mid_call_ends_the_call(tmp_path: Path) -> None:
    with closing(Host(tmp_path / "door")) as host:
        thread = threading.Thread(target=lambda: host.take().close())
        thread.start()
        with pytest.raises(NodeError, match="the session ended"):
            DoorLink(tmp_path / "door").resolve({"run": "1"}, never)
        thread.join()


def test_a_host_that_is_silent_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door_link, "SILENT_SECONDS", 0.5)
    kept: list[socket.socket] = []
    with closing(Host(tmp_path / "door")) as host:
        thread = threading.Thread(target=lambda: kept.append(host.take()))
        thread.start()
        with pytest.raises(NodeError, match=r"silent for 0\.5 s"):
            DoorLink(tmp_path / "door").resolve({"run": "1"}, never)
        thread.join()
    kept[0].close()


def test_a_call_that_takes_longer_than_the_patience_with_silence_is_waited_for(
    path: Path, crew: Crew, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(door, "PULSE_SECONDS", 0.05)
    monkeypatch.setattr(door_link, "SILENT_SECONDS", 3.0)
    until = time.monotonic() + 4.0
    with pytest.raises(CancelledError):
        DoorLink(path).pull(
            {"run": "endless"}, lambda: time.monotonic() > until, lambda _frame: None
        )
    assert crew.given_up.is_set()


def _knock(path: Path) -> socket.socket:
    connection = socket.socket(socket.AF_UNIX)
    connection.settimeout(WAIT_SECONDS)
    with socket_name(path) as name:
        connection.connect(name)
    return connection
