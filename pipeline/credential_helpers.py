"""Programs that give out logins: ``docker-credential-NAME get``.

Invariant: a helper runs once per server, and again only when its login was refused or has expired,
or some time after it failed; it ends within its deadline, and at once when nobody waits for it any
more; nobody who asks for something else waits for it. What it says is shown redacted, and its
answer is never quoted.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING, Final

from stowray.pipeline.credential import TOKEN_USER, Credential
from stowray.pipeline.errors import CancelledError, UnauthorizedError
from stowray.pipeline.flight import SingleFlight
from stowray.pipeline.redact import redact_text

if TYPE_CHECKING:
    import subprocess
    from collections.abc import Callable, Collection, Mapping

HELPER_SECONDS: Final = 30.0
FAILURE_SECONDS: Final = 30.0
POLL_SECONDS: Final = 0.05
OUTPUT_LIMIT: Final = 4096
ANSWER_LIMIT: Final = 1 << 20
PIECE_SIZE: Final = 64 << 10
_MENTIONS_SECRET: Final = re.compile(r"[\"']Secret[\"']", re.IGNORECASE)
NOT_FOUND: Final = "credentials not found in native keychain"


class CredentialHelpers:
    """Asks helpers; thread-safe."""

    def __init__(self, environment: Mapping[str, str], seconds: float = HELPER_SECONDS) -> None:
        self._environment = dict(environment)
        self._seconds = seconds
        self._lock = threading.Lock()
        self._answers: dict[tuple[str, str], Credential | None] = {}
        self._failures: dict[tuple[str, str], tuple[float, UnauthorizedError]] = {}
        self._flights: SingleFlight[Credential | None] = SingleFlight(0)

    def ask(
        self, suffix: str, server: str, registry: str, cancelled: Callable[[], bool]
    ) -> Credential | None:
        """Return the login that a helper has for ``server``, None when it has none.

        Raises UnauthorizedError when the helper fails, CancelledError soon after ``cancelled()``.
        """
        key = (suffix, server)

        def fly(abandoned: Callable[[], bool]) -> Credential | None:
            # Another flight may have landed between the look below and this one.
            is_known, answer = self._known(key)
            if is_known:
                return answer
            try:
                answer = self._run(f"docker-credential-{suffix}", server, registry, abandoned)
            except UnauthorizedError as error:
                with self._lock:
                    self._failures[key] = (time.monotonic() + FAILURE_SECONDS, error)
                raise
            with self._lock:
                self._answers[key] = answer
            return answer

        is_known, answer = self._known(key)
        return answer if is_known else self._flights.do(key, fly, cancelled)

    def _known(self, key: tuple[str, str]) -> tuple[bool, Credential | None]:
        """Return whether a helper has answered, and what; raise the error of one that failed."""
        with self._lock:
            failure = self._failures.get(key)
            if failure is not None and time.monotonic() < failure[0]:
                raise failure[1]
            return key in self._answers, self._answers.get(key)

    def known(self) -> tuple[Credential, ...]:
        """Return what helpers have answered so far."""
        with self._lock:
            return tuple(filter(None, self._answers.values()))

    def forget(self, servers: Collection[str]) -> None:
        """Ask anew for ``servers`` from now on: what was said of them has expired."""
        with self._lock:
            for known in [*self._answers, *self._failures]:
                if known[1] in servers:
                    self._answers.pop(known, None)
                    self._failures.pop(known, None)

    def _run(
        self, program: str, server: str, registry: str, abandoned: Callable[[], bool]
    ) -> Credential | None:
        import subprocess

        try:
            process = subprocess.Popen(
                [program, "get"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=self._environment,
            )
        except OSError as error:
            reason = f"{program} cannot be run: {error.strerror}"
            raise UnauthorizedError(registry, "", reason) from error
        try:
            output, errors = self._communicate(process, server, abandoned)
        except TimeoutError as error:
            reason = f"{program} gave no answer in {self._seconds:g} s"
            raise UnauthorizedError(registry, "", reason) from error
        except OverflowError as error:
            raise UnauthorizedError(registry, "", f"{program} says too much") from error
        finally:
            _end(process)
        if process.returncode != 0:
            said = output[:OUTPUT_LIMIT] + b" " + errors[:OUTPUT_LIMIT]
            text = said.decode("utf-8", "replace")
            if NOT_FOUND in text:
                return None
            if _MENTIONS_SECRET.search(text):
                # It failed in the middle of its answer: what of it is secret cannot be told.
                raise UnauthorizedError(registry, "", f"{program} failed")
            raise UnauthorizedError(registry, "", f"{program} failed: {redact_text(text)}")
        return parse_answer(program, output, registry)

    def _communicate(
        self, process: subprocess.Popen[bytes], server: str, abandoned: Callable[[], bool]
    ) -> tuple[bytes, bytes]:
        import selectors

        end = time.monotonic() + self._seconds
        _tell(process, server)
        output, errors = bytearray(), bytearray()
        with selectors.DefaultSelector() as open_pipes:
            for pipe, said in ((process.stdout, output), (process.stderr, errors)):
                if pipe is not None:
                    open_pipes.register(pipe, selectors.EVENT_READ, said)
            while open_pipes.get_map():
                if abandoned():
                    raise CancelledError("credential helper")
                if time.monotonic() >= end:
                    raise TimeoutError
                # Before the look for what it said: a child of its own may keep the pipes open.
                has_ended = process.poll() is not None
                ready = open_pipes.select(POLL_SECONDS)
                if has_ended and not ready:
                    break
                for key, _ in ready:
                    piece = os.read(key.fd, PIECE_SIZE)
                    if not piece:
                        open_pipes.unregister(key.fileobj)
                    key.data.extend(piece)
                    if len(key.data) > ANSWER_LIMIT:
                        raise OverflowError
        while process.poll() is None:
            # It said all it had to say.
            if abandoned():
                raise CancelledError("credential helper")
            if time.monotonic() >= end:
                raise TimeoutError
            time.sleep(POLL_SECONDS / 10)
        return bytes(output), bytes(errors)


def _tell(process: subprocess.Popen[bytes], server: str) -> None:
    """Say which server is meant, which always fits into a pipe."""
    if process.stdin is not None:
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(server.encode())


def _end(process: subprocess.Popen[bytes]) -> None:
    """Let neither the process nor its pipes stay; a child of its own may keep those open."""
    if process.poll() is None:
        process.kill()
        process.wait()
    for pipe in (process.stdin, process.stdout, process.stderr):
        if pipe is not None and not pipe.closed:
            try:
                pipe.close()
            except BrokenPipeError:
                # It never read what it was told.
                continue


def parse_answer(program: str, output: bytes, registry: str) -> Credential | None:
    """Return the login in a helper's answer; UnauthorizedError when there is none to be read."""
    try:
        answer = json.loads(output)
        username, secret = answer["Username"], answer["Secret"]
    except (ValueError, RecursionError, KeyError, TypeError):
        # Not with its cause: that may quote the secret.
        raise UnauthorizedError(registry, "", f"{program} answered something else") from None
    if not isinstance(username, str) or not isinstance(secret, str):
        raise UnauthorizedError(registry, "", f"{program} answered something else")
    if not secret:
        return None
    if username == TOKEN_USER:
        return Credential(identity_token=secret)
    return Credential(username, secret)
