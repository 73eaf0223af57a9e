"""Nothing secret is ever seen: not in streams, errors, the store, processes, or what Ray keeps.

The registry of these tests is a parrot: whatever it was ever told, in this run or an earlier one,
it repeats in warnings, errors, challenges and redirects, in every spelling.
"""

from __future__ import annotations

import base64
import json
import logging
import os
import pickle
import socket
import subprocess
import sys
import threading
import traceback
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, quote

import pytest
import trustme

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StowrayError, describe, to_wire
from stowray.pipeline.known_secrets import spellings
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.real.test_auth import contents, ray_folders
from tests.support.registry import FakeRegistry, Fault, Request, compact
from tests.support.small import small_tar
from tests.support.tunnel import Tunnel

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.command import Answer, Stowray

USER = "carrier"
# With characters that URLs, JSON and base64 write in other ways.
PASSWORD = 'open "sesame" & café/4711'
HELPED = "helper says pearl-2209"
IDENTITY = "identity+ruby/8836=="
READY = "registry-token-onyx-5517"
PROXY_PASSWORD = "tunnel-amber-3304"
HEADER = "mirror key opal-7712"
NAME = "team/app"
ALL = (PASSWORD, HELPED, IDENTITY, READY, PROXY_PASSWORD, HEADER)


def seen(texts: list[str], secrets: set[str]) -> dict[str, str]:
    """Return which secrets are in the texts, each with what stands round it."""
    found: dict[str, str] = {}
    for secret in secrets:
        for form in spellings(secret):
            for text in texts:
                at = text.find(form)
                if at >= 0:
                    found[form] = text[max(0, at - 120) : at + len(form) + 80]
    return found


@dataclass
class Parrot(FakeRegistry):
    """Repeats what it was told in this run, and a login that it knows from an earlier one."""

    known: tuple[str, ...] = ()
    heard: list[str] = field(default_factory=list)
    ever: set[str] = field(default_factory=set)

    def _serve(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        self._listen(request)
        status, headers, body = super()._serve(request)
        if request.path == "/token" and status == 200:
            self.heard.append(json.loads(body)["token"])
            self.ever.add(self.heard[-1])
        return self._repeat(status, headers, body)

    def _serve_cdn(self, request: Request) -> tuple[int, list[tuple[str, str]], bytes]:
        self._listen(request)
        return self._repeat(*super()._serve_cdn(request))

    def secrets(self) -> set[str]:
        return {*ALL, *self.ever, *self.tokens, "cdnsecret", *self.signatures}

    def forget(self) -> None:
        """Begin another run: of what ended with the last one nobody can know that it is secret."""
        self.heard.clear()

    def _listen(self, request: Request) -> None:
        scheme, _, value = (request.authorization or "").partition(" ")
        told = [value] if value else []
        if scheme == "Basic":
            told.append(base64.b64decode(value).decode().partition(":")[2])
        told += [header for name, header in request.headers.items() if name == "X-Key"]
        pairs = [*parse_qsl(request.query), *parse_qsl(request.body.decode())]
        told += [
            value
            for name, value in pairs
            if name.startswith("X-Amz-") or name in ("password", "refresh_token")
        ]
        self.heard += [one for one in told if one not in self.heard]
        self.ever |= set(told)

    def _repeat(
        self, status: int, headers: list[tuple[str, str]], body: bytes
    ) -> tuple[int, list[tuple[str, str]], bytes]:
        known = [*self.known, *self.heard]
        for secret in known:
            text = secret.replace("\\", "\\\\").replace('"', '\\"')
            text = text.encode("utf-8").decode("latin-1")
            headers.append(("Warning", f'299 - "you told me {text}"'))
            headers.append(("Warning", f'299 - "or {quote(secret, safe="")}"'))
        if status >= 400:
            # The last of them first: only the beginning of a long text is shown.
            message = " ".join(reversed(known))
            body = compact({"errors": [{"code": "DENIED", "message": message}]})
        return status, headers, body


# -- the command, on both engines ------------------------------------------------------------------


class Setting:
    """A parrot, and the files that a user has of it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parrot: Parrot | None = None
        self.inputs = folder / "inputs"
        self.inputs.mkdir()
        self.environment: dict[str, str] = {}
        self.arguments: list[str] = ["-vv", "--progress", "json"]
        self.texts: list[str] = []

    def login(self, host: str, kind: str) -> None:
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        entry: dict[str, Any] = {"auths": {host: {"auth": pair}}}
        if kind == "identity token":
            entry = {"auths": {host: {"identitytoken": IDENTITY}}}
        elif kind == "registry token":
            entry = {"auths": {host: {"registrytoken": READY}}}
        elif kind == "helper":
            entry = {"credHelpers": {host: "parrot"}}
            helper = self.inputs / "docker-credential-parrot"
            answer = json.dumps({"Username": USER, "Secret": HELPED})
            helper.write_text(f"#!/bin/sh\ncat >/dev/null\necho '{answer}'\n")
            helper.chmod(0o755)
            self.environment["PATH"] = f"{self.inputs}:{os.environ['PATH']}"
        file = self.inputs / "auth.json"
        file.write_text(json.dumps(entry))
        self.arguments += ["--authfile", str(file)]

    def run(self, stowray: Stowray, name: str, *arguments: str) -> Answer:
        if self.parrot is not None:
            self.parrot.forget()
        with arguments_of_processes() as shown:
            answer = stowray.attempt(name, *self.arguments, *arguments, env=self.environment)
        self.texts += [answer.text, answer.stderr, *shown]
        return answer

    def everything(self, engine: str) -> list[str]:
        texts = [*self.texts, *contents(self.folder, {self.inputs})]
        if engine == "ray":
            written = [text for folder in ray_folders() for text in contents(folder, set())]
            assert written
            texts += written
        return texts


@contextmanager
def arguments_of_processes() -> Iterator[set[str]]:
    """Collect, all the while, the argument vectors of all processes."""
    shown: set[str] = set()
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.02):
            for place in Path("/proc").glob("[0-9]*/cmdline"):
                try:
                    shown.add(place.read_bytes().decode("utf-8", "replace"))
                except OSError:
                    continue

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield shown
    finally:
        over.set()
        thread.join()


@pytest.fixture
def setting(workspace: Path) -> Setting:
    return Setting(workspace)


@pytest.mark.parametrize("kind", ["password", "helper", "identity token", "registry token"])
def test_logins_tokens_and_signed_urls(stowray: Stowray, setting: Setting, kind: str) -> None:
    password = HELPED if kind == "helper" else PASSWORD
    known = {"identity token": IDENTITY, "registry token": READY}.get(kind, password)
    with Parrot(
        known=(known,),
        auth="bearer",
        users={USER: password},
        anonymous=False,
        redirect=True,
        identity_tokens={IDENTITY: USER},
    ) as parrot:
        setting.parrot = parrot
        if kind == "registry token":
            # As if it had been given out before.
            parrot.grant(READY, (f"repository:{NAME}:pull",), USER)
        layers = [small_tar({f"file-{number}": b"x" * 3000}) for number in range(3)]
        parrot.add_image(NAME, "1", layers)
        setting.login(parrot.host, kind)
        reference = f"{parrot.host}/{NAME}:1"
        # A blob that is refused at first by both, and an answer that breaks off.
        parrot.fault("/blobs/", Fault(cut="reset", after=0))
        parrot.fault("/cdn/", Fault(cut="fin", after=100), Fault(status=403, body=b"denied"))
        done = setting.run(stowray, "pull", "--json", reference)
        assert done.status == 0, done.stderr
        assert "you told me REDACTED" in done.stderr or stowray.engine == "ray"
        missing = setting.run(stowray, "pull", "--json", f"{parrot.host}/{NAME}:none")
        assert missing.status == 3
        for fault in (Fault(status=status) for status in (403, 500)):
            parrot.fault("/manifests/", fault, repeat=True)
            refused = setting.run(stowray, "resolve", reference)
            assert refused.status in (4, 6)
            parrot.clear_faults()
        parrot.users.clear()
        parrot.identity_tokens.clear()
        parrot.revoke_tokens()
        refused = setting.run(stowray, "plan", f"{parrot.host}/{NAME}:1")
        assert refused.status == 4
        secrets = parrot.secrets()
        assert len(secrets) > len(ALL) + 3, "nothing was told or given out"
        texts = setting.everything(stowray.engine)
        if stowray.engine == "ray":
            texts += ray_state(stowray)
    assert seen(texts, secrets) == {}


def test_proxies_headers_and_client_keys(stowray: Stowray, setting: Setting) -> None:
    authority = trustme.CA()
    client = authority.issue_cert("client.test")
    inputs = setting.inputs
    authority.cert_pem.write_to_path(str(inputs / "ca.pem"))
    client.private_key_and_cert_chain_pem.write_to_path(str(inputs / "client.pem"))
    key = client.private_key_pem.bytes().decode().splitlines()[1]
    with (
        Parrot(
            known=(PROXY_PASSWORD, HEADER),
            authority=authority,
            certificate_names=["registry.example"],
        ) as parrot,
        Tunnel(parrot, password=PROXY_PASSWORD) as tunnel,
    ):
        setting.parrot = parrot
        parrot.add_image(NAME, "1", [small_tar({"a": b"1"})])
        place = inputs / "hosts" / "registry.example"
        place.mkdir(parents=True)
        (place / "hosts.toml").write_text(
            f'server = "https://registry.example"\nca = "{inputs / "ca.pem"}"\n'
            f'client = "{inputs / "client.pem"}"\nproxy = "{tunnel.url}"\n'
            f'[header]\nX-Key = "{HEADER}"\n'
        )
        setting.arguments += ["--hosts-dir", str(inputs / "hosts")]
        setting.environment["HTTPS_PROXY"] = "http://u:unused-jade-6608@127.0.0.1:9"
        done = setting.run(stowray, "pull", "--json", f"registry.example/{NAME}:1")
        assert done.status == 0, done.stderr
        assert HEADER in parrot.heard
        tunnel.answer = f"HTTP/1.1 407 who is {PROXY_PASSWORD}\r\n\r\n".encode()
        refused = setting.run(stowray, "resolve", f"registry.example/{NAME}:1")
        assert refused.status == 6
        assert "407" in refused.stderr
        secrets = {*parrot.secrets(), key, "unused-jade-6608"}
        texts = setting.everything(stowray.engine)
        if stowray.engine == "ray":
            texts += ray_state(stowray)
    assert seen(texts, secrets) == {}


STATE = """
import os, sys
os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "0"
os.environ["RAY_AUTH_MODE"] = "token"
os.environ["RAY_AUTH_TOKEN_PATH"] = sys.argv[2]
import ray
ray.init(address=sys.argv[1], log_to_driver=False, configure_logging=False)
from ray._private.state import state
from ray.experimental.internal_kv import _internal_kv_get, _internal_kv_list
state._connect_and_get_accessor()
accessor = state._global_state_accessor
tables = {
    "actors": accessor.get_actor_table(None, None),
    "jobs": accessor.get_job_table(),
    "nodes": accessor.get_node_table(),
    "workers": accessor.get_worker_table(),
    "tasks": accessor.get_task_events(),
    "groups": accessor.get_placement_group_table(),
}
for name, rows in tables.items():
    print(name, len(rows), file=sys.stderr)
    sys.stdout.buffer.write(repr(rows).encode())
for space in (None, b"fun", b"session", b"cluster", b"dashboard", b"metrics", b"usage_stats"):
    for key in _internal_kv_list(b"", namespace=space):
        value = _internal_kv_get(key, namespace=space) or b""
        sys.stdout.buffer.write(key + b" " + value + b"\\n")
"""


def ray_state(stowray: Stowray) -> list[str]:
    """Return all that the session's GCS keeps: tables of actors, tasks and so on, and its store."""
    (file,) = stowray.home.glob("stowray/session*.json")
    session = json.loads(file.read_text())
    done = subprocess.run(
        [sys.executable, "-c", STATE, session["address"], session["token_path"]],
        capture_output=True,
        env=stowray.environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr.decode()
    counts = dict(
        line.split() for line in done.stderr.decode().splitlines() if line.count(" ") == 1
    )
    assert int(counts["actors"]) >= 3
    assert int(counts["tasks"]) > 0
    return [done.stdout.decode("utf-8", "replace")]


# -- errors, in every form that they take ----------------------------------------------------------

LAYER = b"l" * 5000
BLOB = Descriptor("application/octet-stream", Digest.of(LAYER), len(LAYER))
SPELT = quote(PASSWORD, safe="")
IN_HEADER = PASSWORD.encode("utf-8").decode("latin-1")
MESSAGE = compact({"errors": [{"code": f"X {PASSWORD}", "message": f"not with {PASSWORD}"}]})


def challenge(value: str) -> Fault:
    return Fault(status=401, headers=(("WWW-Authenticate", value),), body=MESSAGE)


def redirect(location: str) -> Fault:
    return Fault(status=302, headers=(("Location", location),))


HOSTILE = {
    **{f"status {code}": Fault(status=code, body=MESSAGE) for code in (400, 403, 429, 500, 501)},
    "plain text": Fault(status=500, body=f"<p>{PASSWORD}</p>".encode()),
    "scheme": challenge(f"Negotiate-{SPELT}"),
    "realm": challenge(f'Bearer realm="https://10.0.0.1/{SPELT}"'),
    "realm that is refused": challenge(f'Bearer realm="ftp://10.0.0.1/{SPELT}"'),
    "realm that is here": challenge(f'Bearer realm="{{url}}/{SPELT}"'),
    "scope": challenge(f'Bearer realm="{{url}}/token",scope="repository:{SPELT}:pull"'),
    "redirect": redirect(f"ftp://elsewhere.example/{SPELT}"),
    "redirect to nothing": redirect(f"{{url}}/{SPELT}?and={SPELT}"),
    "redirect to no port": redirect(f"http://127.0.0.1:1/{SPELT}?and={SPELT}"),
    "redirect to no URL": redirect(f"https://[{SPELT}/"),
    "redirect with a login": redirect(f"http://{USER}:{SPELT}@127.0.0.1:1/"),
    "encoding": Fault(headers=(("Content-Encoding", SPELT),), body=MESSAGE),
    "length": Fault(headers=(("Content-Length", IN_HEADER),)),
    "type": Fault(headers=(("Content-Type", f"application/{SPELT}"),)),
    "digest": Fault(headers=(("Docker-Content-Digest", f"sha256:{SPELT}"),)),
    "no chunks": Fault(
        length="none",
        headers=(("Transfer-Encoding", "chunked"),),
        body=f"{PASSWORD}\r\nand more\r\n".encode(),
    ),
    "page": Fault(headers=(("Content-Type", "text/html"),), body=MESSAGE),
    "other bytes": Fault(body=MESSAGE),
}


def scripted(fault: Fault, url: str) -> Fault:
    headers = tuple((name, value.replace("{url}", url)) for name, value in fault.headers)
    return Fault(**{**vars(fault), "headers": headers})


def all_forms(error: StowrayError) -> list[str]:
    again = pickle.loads(pickle.dumps(error))
    return [
        str(error),
        repr(error),
        str(error.args),
        repr(again),
        pickle.dumps(error).decode("latin-1"),
        json.dumps(to_wire(error)),
        json.dumps(to_wire(error), ensure_ascii=False),
        json.dumps(describe(error)),
        "".join(traceback.format_exception(error)),
    ]


@pytest.mark.parametrize("name", HOSTILE)
@pytest.mark.parametrize("is_told", [True, False], ids=["told", "told in an earlier run"])
def test_errors(name: str, is_told: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    shown: list[str] = []
    with FakeRegistry(auth="bearer" if is_told else None, users={USER: PASSWORD}) as fake:
        fake.add_image(NAME, "1", [])
        fake.add_blob(LAYER)
        file = tmp_path / "auth.json"
        pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        file.write_text(json.dumps({"auths": {fake.host: {"auth": pair}}}))
        settings = RegistrySettings(authfile=str(file), attempts=1)
        registry = Registry(settings, environment={}, warn=shown.append)
        reference = Reference.parse(f"{fake.host}/{NAME}:1")
        if is_told:
            registry.resolve(reference)
            assert any(PASSWORD in forms_of(request) for request in fake.requests)
        digest = Digest(fake.tags[NAME, "1"])
        fake.fault("/manifests/", scripted(HOSTILE[name], fake.url), repeat=True)
        fake.fault("/blobs/", scripted(HOSTILE[name], fake.url), repeat=True)
        caught: list[StowrayError] = []
        for attempt in (
            lambda: registry.resolve(reference),
            lambda: registry.manifest(reference, digest),
            lambda: read(registry, reference),
            lambda: shown.append(repr(registry.resolve(reference))),
        ):
            try:
                attempt()
            except StowrayError as error:
                caught.append(error)
        registry.close()
    assert caught or name in ("digest", "type")
    texts = [form for error in caught for form in all_forms(error)]
    texts += [*shown, caplog.text, *(str(vars(record)) for record in caplog.records)]
    secrets = {PASSWORD, SPELT, base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()}
    assert seen(texts, secrets | set(fake.tokens)) == {}


def read(registry: Registry, reference: Reference) -> None:
    with registry.open_blob(reference, BLOB) as stream:
        while stream.read():
            continue


def forms_of(request: Request) -> str:
    scheme, _, value = (request.authorization or "").partition(" ")
    return base64.b64decode(value).decode() if scheme == "Basic" else value


@pytest.mark.parametrize("said", [HELPED, json.dumps({"Username": USER, "Secret": HELPED})])
def test_a_helper_that_fails_after_it_has_answered(
    said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    helper = tmp_path / "docker-credential-parrot"
    helper.write_text(f"#!/bin/sh\ncat >/dev/null\necho 'password: {said}'; exit 1\n")
    helper.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with FakeRegistry(auth="basic", users={USER: HELPED}) as fake:
        fake.add_image(NAME, "1", [])
        file = tmp_path / "auth.json"
        file.write_text(json.dumps({"credsStore": "parrot"}))
        registry = Registry(RegistrySettings(authfile=str(file)))
        with pytest.raises(StowrayError) as caught:
            registry.resolve(Reference.parse(f"{fake.host}/{NAME}:1"))
        registry.close()
    assert "docker-credential-parrot failed" in str(caught.value)
    assert seen(all_forms(caught.value), {HELPED}) == {}


def test_what_is_kept_shows_nothing_by_itself(tmp_path: Path) -> None:
    """The objects that hold secrets, as a debugger or a log would print them."""
    file = tmp_path / "auth.json"
    pair = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
    with FakeRegistry(auth="bearer", users={USER: PASSWORD}) as fake:
        fake.add_image(NAME, "1", [])
        file.write_text(json.dumps({"auths": {fake.host: {"auth": pair}}}))
        proxy = f"http://u:{PROXY_PASSWORD}@proxy.example:1"
        registry = Registry(
            RegistrySettings(authfile=str(file)), environment={"HTTPS_PROXY": proxy}
        )
        registry.resolve(Reference.parse(f"{fake.host}/{NAME}:1"))
        texts, known, left = [], set(), [registry]
        while left:
            one: Any = left.pop()
            if id(one) in known or isinstance(one, socket.socket | threading.Thread):
                continue
            known.add(id(one))
            if type(one).__module__.startswith("stowray."):
                texts.append(repr(one))
                names = getattr(type(one), "__slots__", None) or vars(one)
                left += [getattr(one, name, None) for name in names]
            elif isinstance(one, dict):
                left += one.values()
            elif isinstance(one, list | tuple | set):
                left += one
        registry.close()
    assert len(texts) > 10
    assert seen(texts, {PASSWORD, pair, PROXY_PASSWORD, *fake.tokens}) == {}


@pytest.mark.parametrize("command", ["pull", "resolve", "plan", "key"])
@pytest.mark.parametrize(
    "form", ["carrier:{}@h.io/a:1", "h.io/a:1?token={}", "https://u:{}@h.io/a"]
)
def test_a_password_that_was_pasted_into_a_reference(
    local: Stowray, command: str, form: str
) -> None:
    text = form.format("pasted-4711")
    answer = local.attempt(command, "--json", "-vv", "--progress", "json", text)
    assert answer.status == 2
    assert "pasted-4711" not in answer.stderr + answer.text
    assert "***" in answer.stderr
