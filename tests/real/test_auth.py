"""Logins at the real registry: htpasswd and tokens, and that nothing of them is ever seen."""

from __future__ import annotations

import base64
import contextlib
import json
import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.real.conftest import publish_to
from tests.support.docker_registry import running
from tests.support.proxy import counting_proxy
from tests.support.token_server import TokenServer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.real.conftest import Published
    from tests.support.catalogue import Catalogue
    from tests.support.command import Stowray
    from tests.support.docker_registry import DockerRegistry

pytestmark = pytest.mark.peers("docker-registry")

USER, PASSWORD = "carrier", "correct-horse-4711"
BASIC = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
# The password in bcrypt of the lowest cost.
HTPASSWD = f"{USER}:$2b$04$abcdefghijklmnopqrstuu38UoKFG8flGHVooAsowCXnaH5vuUsWO"
RAY_PLACES = {Path(tempfile.gettempdir()), Path("/tmp"), Path("/dev/shm")}
SCOPE = "repository:real/{name}:pull,push"


class Guarded:
    """A registry that asks for tokens, and an image in it."""

    def __init__(self, tokens: TokenServer, registry: DockerRegistry, folder: Path) -> None:
        self.tokens = tokens
        self.registry = registry
        self.folder = folder

    def publish(self, catalogue: Catalogue, name: str) -> Published:
        token = self.tokens.issue(USER, (SCOPE.format(name=name),), 600)
        return publish_to(self.registry.host, catalogue, name, authorization=f"Bearer {token}")

    def authfile(self, host: str, password: str = PASSWORD) -> str:
        auth = base64.b64encode(f"{USER}:{password}".encode()).decode()
        path = self.folder / "auth.json"
        path.write_text(json.dumps({"auths": {host: {"auth": auth}}}))
        return str(path)

    def settings(self, text: str = "") -> str:
        """A settings file: the realm is another port, which nobody but the user can vouch for."""
        path = self.folder / "settings.toml"
        path.write_text(f'[registry]\nplain_http = ["{self.tokens.host}"]\n{text}')
        return str(path)


@pytest.fixture
def guarded(workspace: Path) -> Iterator[Guarded]:
    with (
        TokenServer(workspace, users={USER: PASSWORD}) as tokens,
        running(workspace / "registry", token=tokens) as registry,
    ):
        yield Guarded(tokens, registry, workspace)


def secrets_of(guarded: Guarded) -> list[str]:
    return [PASSWORD, BASIC, *guarded.tokens.issued]


def shows(texts: list[str], secrets: list[str]) -> list[str]:
    """Return which secrets are in the texts, or the telling part of a token: its signature."""
    parts = [secret.rpartition(".")[2] for secret in secrets]
    return [part for part in parts if any(part in text for text in texts)]


def test_htpasswd(local: Stowray, catalogue: Catalogue, workspace: Path) -> None:
    with running(workspace / "registry", htpasswd=HTPASSWD) as registry:
        image = publish_to(registry.host, catalogue, "small", authorization=f"Basic {BASIC}")
        refused = local.attempt("pull", image.reference)
        assert refused.status == 4
        assert registry.host in refused.stderr
        authfile = workspace / "auth.json"
        for auth, status in ((BASIC[:-4] + "AAAA", 4), (BASIC, 0)):
            authfile.write_text(json.dumps({"auths": {registry.host: {"auth": auth}}}))
            answer = local.attempt("pull", "--authfile", authfile, image.reference)
            assert answer.status == status, answer.stderr
            assert shows([answer.stderr, answer.text], [PASSWORD, auth]) == []


def test_tokens(stowray: Stowray, guarded: Guarded, catalogue: Catalogue) -> None:
    image = guarded.publish(catalogue, "many")
    anonymous = stowray.attempt("pull", "--config", guarded.settings(), image.reference)
    assert anonymous.status == 4
    wrong = guarded.authfile(guarded.registry.host, "wrong-one-0815")
    refused = stowray.attempt(
        "pull", "--config", guarded.settings(), "--authfile", wrong, image.reference
    )
    assert refused.status == 4
    assert "wrong-one-0815" not in refused.stderr
    guarded.tokens.asked.clear()
    answer = stowray.run(
        "pull",
        "--json",
        "--config",
        guarded.settings(),
        "--authfile",
        guarded.authfile(guarded.registry.host),
        image.reference,
    )
    assert answer.json["digest"] == image.manifest["digest"]
    # However many layers: one question per process that asks (the ray engine has several).
    asked = guarded.tokens.asked
    assert 1 <= len(asked) <= (1 if stowray.engine == "local" else 4)
    assert {(one.user, one.scopes) for one in asked} == {
        (USER, (f"repository:{image.repository}:pull",))
    }
    assert shows([answer.stderr, answer.text], secrets_of(guarded)) == []


def test_a_realm_that_nobody_vouches_for_gets_no_login(
    local: Stowray, guarded: Guarded, catalogue: Catalogue
) -> None:
    image = guarded.publish(catalogue, "small")
    authfile = guarded.authfile(guarded.registry.host)
    answer = local.attempt("pull", "--authfile", authfile, image.reference)
    assert answer.status != 0
    assert "not asked for a token" in answer.stderr
    assert guarded.tokens.asked == []


def test_public_images_need_no_login(
    local: Stowray, guarded: Guarded, catalogue: Catalogue
) -> None:
    image = guarded.publish(catalogue, "small")
    guarded.tokens.anonymous = True
    local.run("pull", "--config", guarded.settings(), image.reference)
    assert {one.user for one in guarded.tokens.asked} == {None}


def test_a_token_that_expires_in_mid_pull(
    stowray: Stowray, guarded: Guarded, catalogue: Catalogue
) -> None:
    """The registry takes a token for two seconds, the pull takes longer and is cut in between."""
    image = guarded.publish(catalogue, "debian")
    guarded.tokens.life_seconds = 2.0
    size = image.layers_size
    with counting_proxy(guarded.registry.host, bytes_per_second=size / 6) as proxy:
        authfile = guarded.authfile(proxy.host)
        arguments = ("--json", "--config", guarded.settings(), "--authfile", authfile)
        with stowray.running("pull", *arguments, image.at(proxy.host)) as process:
            for part in (0.4, 0.8):
                assert proxy.wait_served(int(size * part))
                proxy.cut()
            output, _ = process.communicate(timeout=120)
        assert process.returncode == 0
        answer = json.loads(output)
        assert answer["digest"] == image.manifest["digest"]
        # No blob began anew for the sake of a login.
        assert answer["fetched_bytes"] <= size + (1 << 20)
    assert len(guarded.tokens.asked) >= 3


def test_no_secret_is_seen_anywhere(
    stowray: Stowray, guarded: Guarded, catalogue: Catalogue, workspace: Path
) -> None:
    """Streams at their most talkative, events, errors, the store, what Ray writes of its actors."""
    image = guarded.publish(catalogue, "small")
    authfile = guarded.authfile(guarded.registry.host)
    common = ("--config", guarded.settings(), "--authfile", authfile, "-vv", "--progress", "json")
    texts = []
    for name, *arguments in (
        ("pull", "--json", image.reference),
        ("pull", "--json", image.reference + "-missing"),
        ("plan", image.reference),
        ("resolve", image.reference),
    ):
        answer = stowray.attempt(name, *common, *arguments)
        texts += [answer.text, answer.stderr]
    assert guarded.tokens.asked
    assert any(image.manifest["digest"] in text for text in texts)
    texts += contents(workspace, {guarded.folder / "auth.json", guarded.folder / "registry"})
    if stowray.engine == "ray":
        written = [text for folder in ray_folders() for text in contents(folder, set())]
        assert written
        texts += written
    assert shows(texts, secrets_of(guarded)) == []


def ray_folders() -> list[Path]:
    return [path for place in RAY_PLACES for path in place.glob("stowray-ray-*")]


def contents(folder: Path, without: set[Path]) -> list[str]:
    """Return what all files below a folder hold."""
    found = []
    for root, folders, files in os.walk(folder):
        here = Path(root)
        folders[:] = [name for name in folders if here / name not in without]
        for path in (here / name for name in files):
            if path in without or path.is_symlink():
                continue
            # A session of somebody else may end just now.
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found.append(path.read_bytes().decode("latin-1"))
    return found
