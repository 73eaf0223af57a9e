from __future__ import annotations

import base64
import json
import os
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest

from stowray.pipeline.credential import Credential
from stowray.pipeline.credentials import HUB_KEY, Credentials
from stowray.pipeline.errors import CancelledError, UnauthorizedError, UsageError

SECRET = "hunter2hunter2"


def auth(user: str, password: str) -> dict[str, str]:
    return {"auth": base64.b64encode(f"{user}:{password}".encode()).decode()}


def write(path: Path, document: Any) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return str(path)


def helper(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    path = folder / f"docker-credential-{name}"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def with_helpers(folder: Path, document: Any) -> Credentials:
    file = write(folder / "auth.json", document)
    return Credentials({"PATH": f"{folder / 'bin'}:/usr/bin:/bin"}, file, helper_seconds=5)


# Where files lie


def test_places_in_order(tmp_path: Path) -> None:
    environment = {
        "REGISTRY_AUTH_FILE": str(tmp_path / "named.json"),
        "DOCKER_CONFIG": str(tmp_path / "docker"),
        "XDG_RUNTIME_DIR": str(tmp_path / "run"),
        "HOME": str(tmp_path / "home"),
    }
    places = [
        (None, tmp_path / "given.json"),
        ("REGISTRY_AUTH_FILE", tmp_path / "named.json"),
        ("DOCKER_CONFIG", tmp_path / "docker/config.json"),
        ("XDG_RUNTIME_DIR", tmp_path / "run/containers/auth.json"),
        (None, tmp_path / "home/.config/containers/auth.json"),
        (None, tmp_path / "home/.docker/config.json"),
    ]
    for index, (_, place) in enumerate(places):
        write(place, {"auths": {"r.example": auth(f"user{index}", "p")}})
    found = []
    authfile = str(places[0][1])
    for variable, place in places:
        credential = Credentials(environment, authfile).find("r.example")
        assert credential is not None
        found.append(credential.username)
        authfile = ""
        if variable:
            del environment[variable]
        place.unlink()
    assert found == [f"user{index}" for index in range(6)]
    assert Credentials(environment).find("r.example") is None


def test_a_usual_place_without_the_login_leads_to_the_next(tmp_path: Path) -> None:
    write(tmp_path / "run/containers/auth.json", {"auths": {"other.example": auth("o", "p")}})
    write(tmp_path / "home/.docker/config.json", {"auths": {"r.example": auth("u", "p")}})
    environment = {"XDG_RUNTIME_DIR": str(tmp_path / "run"), "HOME": str(tmp_path / "home")}
    assert Credentials(environment).find("r.example") == Credential("u", "p")


def test_without_a_runtime_directory_podman_writes_below_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("stowray.pipeline.credentials.RUN", tmp_path / "run")
    place = tmp_path / "run" / "containers" / str(os.getuid()) / "auth.json"
    write(place, {"auths": {"r.example": auth("root", "p")}})
    write(tmp_path / "home/.docker/config.json", {"auths": {"r.example": auth("docker", "p")}})
    environment = {"HOME": str(tmp_path / "home")}
    assert Credentials(environment).find("r.example") == Credential("root", "p")
    environment["XDG_RUNTIME_DIR"] = str(tmp_path / "elsewhere")
    assert Credentials(environment).find("r.example") == Credential("docker", "p")


def test_a_named_file_shuts_out_the_usual_places(tmp_path: Path) -> None:
    write(tmp_path / "home/.docker/config.json", {"auths": {"r.example": auth("u", "p")}})
    named = write(tmp_path / "named.json", {})
    assert Credentials({"HOME": str(tmp_path / "home")}, named).find("r.example") is None


def test_a_named_file_must_exist(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"missing\.json"):
        Credentials({}, str(tmp_path / "missing.json")).find("r.example")


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("{", id="broken"),
        pytest.param("[]", id="a list"),
        pytest.param('{"auths": []}', id="auths is a list"),
        pytest.param('{"auths": {"r.example": 1}}', id="an entry is a number"),
        pytest.param('{"auths": {"r.example": {"auth": "$$$"}}}', id="not base64"),
        pytest.param('{"auths": {"r.example": {"auth": "aHVudGVyMg=="}}}', id="no colon"),
        pytest.param("[" * 100_000, id="deep"),
    ],
)
def test_a_broken_file_is_a_usage_error_that_names_it(tmp_path: Path, text: str) -> None:
    file = write(tmp_path / "auth.json", text)
    with pytest.raises(UsageError) as caught:
        Credentials({}, file).find("r.example")
    assert "auth.json" in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_an_empty_file_has_no_logins(tmp_path: Path) -> None:
    assert Credentials({}, write(tmp_path / "auth.json", "\n")).find("r.example") is None


# What they say


@pytest.mark.parametrize(
    ("entry", "wanted"),
    [
        (auth("u", "p:q"), Credential("u", "p:q")),
        (auth("u", "p\0\0"), Credential("u", "p")),
        (auth("u", "pässword"), Credential("u", "pässword")),
        ({"username": "u", "password": "p"}, Credential("u", "p")),
        ({"identitytoken": "t"}, Credential(identity_token="t")),
        ({**auth("u", "p"), "identitytoken": "t"}, Credential("u", "p", "t")),
        ({"registrytoken": "t"}, Credential(registry_token="t")),
        (auth("<token>", "t"), Credential(identity_token="t")),
        ({}, None),
        ({"auth": ""}, None),
    ],
)
def test_entry(tmp_path: Path, entry: dict[str, str], wanted: Credential | None) -> None:
    file = write(tmp_path / "auth.json", {"auths": {"r.example": entry}})
    assert Credentials({}, file).find("r.example") == wanted


@pytest.mark.parametrize(
    ("repository", "user"),
    [
        ("a/b/c", "abc"),
        ("a/b/c/d", "abc"),
        ("a/b", "ab"),
        ("a/bc", "host"),
        ("", "host"),
        ("x", "host"),
    ],
)
def test_the_longest_namespace_wins(tmp_path: Path, repository: str, user: str) -> None:
    auths = {
        "r.example:5000": auth("host", "p"),
        "r.example:5000/a/b": auth("ab", "p"),
        "r.example:5000/a/b/c": auth("abc", "p"),
        "r.example": auth("no", "p"),
    }
    file = write(tmp_path / "auth.json", {"auths": auths})
    found = Credentials({}, file).find("r.example:5000", repository)
    assert found is not None
    assert found.username == user


@pytest.mark.parametrize(
    ("key", "registry"),
    [
        (HUB_KEY, "docker.io"),
        ("docker.io", "docker.io"),
        ("index.docker.io", "docker.io"),
        ("https://registry-1.docker.io/v2/", "docker.io"),
        ("https://r.example/v1/", "r.example"),
        ("https://r.example", "r.example"),
        ("http://r.example:5000/", "r.example:5000"),
        ("R.Example", "r.example"),
    ],
)
def test_keys_may_be_urls(tmp_path: Path, key: str, registry: str) -> None:
    file = write(tmp_path / "auth.json", {"auths": {key: auth("u", "p")}})
    assert Credentials({}, file).find(registry, "library/x") == Credential("u", "p")


def test_another_port_is_another_registry(tmp_path: Path) -> None:
    file = write(tmp_path / "auth.json", {"auths": {"r.example:5000": auth("u", "p")}})
    for registry in ("r.example", "r.example:5001", "a.r.example:5000"):
        assert Credentials({}, file).find(registry) is None


# Helpers


def test_helpers_of_the_host_before_the_store_before_entries(tmp_path: Path) -> None:
    helper(tmp_path / "bin", "one", """echo '{"Username":"one","Secret":"s"}'""")
    helper(tmp_path / "bin", "all", """echo '{"Username":"all","Secret":"s"}'""")
    credentials = with_helpers(
        tmp_path,
        {
            "credHelpers": {"r.example": "one"},
            "credsStore": "all",
            "auths": {"r.example": auth("plain", "p"), "s.example": auth("plain", "p")},
        },
    )
    assert credentials.find("r.example") == Credential("one", "s")
    assert credentials.find("s.example") == Credential("all", "s")


def test_an_empty_helper_exempts_a_host_from_the_store(tmp_path: Path) -> None:
    helper(tmp_path / "bin", "all", "exit 1")
    document = {
        "credsStore": "all",
        "credHelpers": {"r.example": ""},
        "auths": {"r.example": auth("plain", "p")},
    }
    assert with_helpers(tmp_path, document).find("r.example") == Credential("plain", "p")


def test_a_helper_that_never_stops_talking_is_given_up(tmp_path: Path) -> None:
    helper(tmp_path / "bin", "talks", "exec yes")
    credentials = with_helpers(tmp_path, {"credHelpers": {"r.example": "talks"}})
    with pytest.raises(UnauthorizedError, match="too much"):
        credentials.find("r.example")


def test_a_helper_that_left_a_child_behind_has_answered(tmp_path: Path) -> None:
    answer = json.dumps({"Username": "u", "Secret": "p"})
    helper(tmp_path / "bin", "forks", f"cat >/dev/null; sleep 30 & echo '{answer}'")
    credentials = with_helpers(tmp_path, {"credHelpers": {"r.example": "forks"}})
    assert credentials.find("r.example") == Credential("u", "p")


def test_a_helper_is_told_the_server_on_stdin_and_runs_once(tmp_path: Path) -> None:
    log = tmp_path / "log"
    helper(
        tmp_path / "bin",
        "log",
        f"""printf '%s %s\\n' "$1" "$(cat)" >> {log}; echo '{{"Username":"u","Secret":"s"}}'""",
    )
    credentials = with_helpers(tmp_path, {"credsStore": "log"})
    for _ in range(3):
        assert credentials.find("docker.io", "library/x") == Credential("u", "s")
        assert credentials.find("r.example:5000", "y") == Credential("u", "s")
    assert log.read_text().split("\n") == [f"get {HUB_KEY}", "get r.example:5000", ""]
    credentials.forget("r.example:5000")
    credentials.find("r.example:5000")
    assert log.read_text().count("r.example") == 2


def test_a_helper_may_give_an_identity_token(tmp_path: Path) -> None:
    helper(tmp_path / "bin", "id", """echo '{"Username":"<token>","Secret":"t"}'""")
    found = with_helpers(tmp_path, {"credsStore": "id"}).find("r.example")
    assert found == Credential(identity_token="t")


def test_a_helper_that_knows_nothing_leaves_the_entries(tmp_path: Path) -> None:
    helper(tmp_path / "bin", "no", "echo 'credentials not found in native keychain'; exit 1")
    document = {"credsStore": "no", "auths": {"r.example": auth("u", "p")}}
    credentials = with_helpers(tmp_path, document)
    assert credentials.find("r.example") == Credential("u", "p")
    assert credentials.find("s.example") is None


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(f"echo 'password={SECRET}' >&2; exit 1", id="fails"),
        pytest.param(f"echo '{SECRET}'", id="not JSON"),
        pytest.param(f"""echo '{{"Secret":"{SECRET}"}}'""", id="no name"),
        pytest.param(f"""echo '{{"Username":1,"Secret":"{SECRET}"}}'""", id="name is a number"),
        pytest.param("exec sleep 60", id="hangs"),
    ],
)
def test_a_helper_that_fails_is_an_error_without_its_secrets(tmp_path: Path, script: str) -> None:
    helper(tmp_path / "bin", "bad", script)
    file = write(tmp_path / "auth.json", {"credsStore": "bad"})
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    credentials = Credentials(environment, file, helper_seconds=0.5)
    with pytest.raises(UnauthorizedError) as caught:
        credentials.find("r.example")
    assert "docker-credential-bad" in str(caught.value)
    assert SECRET.encode() not in pickle.dumps(caught.value)


def test_a_missing_helper_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnauthorizedError, match="docker-credential-gone"):
        with_helpers(tmp_path, {"credsStore": "gone"}).find("r.example")


@pytest.mark.parametrize("suffix", ["../../bin/x", "a/b", "-x", ".", "x y", "x" * 65])
def test_a_helper_name_cannot_be_a_path(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(UsageError):
        with_helpers(tmp_path, {"credsStore": suffix}).find("r.example")


def test_a_login_does_not_show_itself() -> None:
    credential = Credential("user", SECRET, SECRET, SECRET)
    assert SECRET not in repr(credential)
    assert SECRET not in str([credential])
    assert credential.identity != Credential("user", "other").identity
    assert SECRET not in credential.identity


def test_a_helper_that_fails_is_not_asked_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    helper(tmp_path / "bin", "bad", f"echo run >> {log}; exit 1")
    credentials = with_helpers(tmp_path, {"credsStore": "bad"})
    for _ in range(3):
        with pytest.raises(UnauthorizedError):
            credentials.find("r.example")
    assert log.read_text().count("run") == 1
    credentials.forget("r.example")
    with pytest.raises(UnauthorizedError):
        credentials.find("r.example")
    assert log.read_text().count("run") == 2


def test_a_helper_that_hangs_holds_up_nobody_else_and_can_be_cancelled(tmp_path: Path) -> None:
    started = tmp_path / "started"
    # exec: what is killed is what hangs.
    helper(tmp_path / "bin", "slow", f"echo $$ > {started}; exec sleep 600")
    helper(tmp_path / "bin", "fast", """echo '{"Username":"u","Secret":"s"}'""")
    document = {
        "credHelpers": {"slow.example": "slow", "fast.example": "fast"},
        "auths": {"plain.example": auth("u", "p")},
    }
    file = write(tmp_path / "config.json", document)
    environment = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin"}
    credentials = Credentials(environment, file, helper_seconds=300)
    enough = threading.Event()
    ended: list[type[BaseException]] = []

    def wait() -> None:
        try:
            credentials.find("slow.example", cancelled=enough.is_set)
        except CancelledError as error:
            ended.append(type(error))

    threads = [threading.Thread(target=wait) for _ in range(3)]
    for thread in threads:
        thread.start()
    while not (started.exists() and started.read_text().endswith("\n")):
        enough.wait(0.01)
    assert credentials.find("fast.example") == Credential("u", "s")
    assert credentials.find("plain.example") == Credential("u", "p")
    enough.set()
    for thread in threads:
        thread.join(60)
    assert ended == [CancelledError] * 3
    # It is gone, and was one for all three.
    process = Path(f"/proc/{started.read_text().strip()}")
    while process.exists():
        enough.clear()
        enough.wait(0.01)


def test_a_login_that_was_changed_meanwhile_counts(tmp_path: Path) -> None:
    place = tmp_path / "auth.json"
    credentials = Credentials({}, write(place, {"auths": {"r.example": auth("u", "old")}}))
    assert credentials.find("r.example") == Credential("u", "old")
    write(place, {"auths": {"r.example": auth("u", "newer")}})
    assert credentials.find("r.example") == Credential("u", "newer")
    place.unlink()
    with pytest.raises(UsageError):
        credentials.find("r.example")
