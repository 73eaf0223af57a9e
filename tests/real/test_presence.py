"""What is here needs no network, and what is asked of the network is what the policy says."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest

from tests.real.conftest import publish_to
from tests.support.docker_registry import running
from tests.support.push import Pusher

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.catalogue import Catalogue
    from tests.support.command import Stowray

# user:secret, in bcrypt of the lowest cost
HTPASSWD = "user:$2b$04$abcdefghijklmnopqrstuu2r9OfJnfCsdneAXAGHnS4UpFFP8WIrW"

pytestmark = [pytest.mark.peers, pytest.mark.root]


@pytest.mark.parametrize("name", ["many", "multi"])
def test_digest_that_is_here_needs_no_registry(
    stowray: Stowray, catalogue: Catalogue, workspace: Path, name: str
) -> None:
    with running(workspace / "registry") as registry:
        image = publish_to(registry.host, catalogue, name)
        stowray.pull(image.reference)
    by_digest = f"{image.host}/{image.repository}@{image.resolved['digest']}"
    result = stowray.pull(by_digest)
    assert (result["fetched_bytes"], result["manifest_requests"]) == (0, 0)
    assert result["digest"] == image.manifest["digest"]

    other = f"{image.host}/other/repository@{image.resolved['digest']}"
    answer = stowray.attempt("pull", other)
    assert answer.status == 6, "content of another repository was taken for this one's"

    answer = stowray.attempt("pull", "--config", no_memory(workspace), image.reference)
    assert answer.status == 6, "a tag was taken for the digest that it had"
    for policy in ("missing", "never"):
        assert stowray.pull(image.reference, "--policy", policy)["fetched_bytes"] == 0


def test_policies_with_a_tag_that_moves(
    stowray: Stowray, catalogue: Catalogue, workspace: Path
) -> None:
    settings = no_memory(workspace)
    with running(workspace / "registry") as registry:
        old = publish_to(registry.host, catalogue, "small")
        absent = stowray.attempt("pull", "--policy", "never", old.reference)
        assert absent.status == 3
        stowray.pull(old.reference, "--config", settings)
        move_tag(registry.host, catalogue, old)
        assert (
            stowray.pull(old.reference, "--policy", "missing")["digest"] == old.manifest["digest"]
        )
        newer = stowray.pull(old.reference, "--config", settings)
        assert newer["digest"] != old.manifest["digest"]
        assert stowray.pull(old.reference, "--policy", "never")["digest"] == newer["digest"]


def no_memory(workspace: Path) -> str:
    """A settings file: a session's resolver keeps answers for some seconds, too long for a test."""
    settings = workspace / "settings.toml"
    settings.write_text("[resolve]\nttl_seconds = 0\n")
    return str(settings)


def move_tag(host: str, catalogue: Catalogue, image: Published) -> None:
    """Let the tag of `image` point to another one."""
    layout = catalogue.layout("multi")
    with Pusher(host) as pusher:
        pusher.push(layout, layout.tagged("multi"), image.repository, "1")


def test_credentials_of_the_authfile(
    stowray: Stowray, catalogue: Catalogue, workspace: Path
) -> None:
    with running(workspace / "registry", htpasswd=HTPASSWD) as registry:
        token = base64.b64encode(b"user:secret").decode()
        image = publish_to(registry.host, catalogue, "small", authorization=f"Basic {token}")
        assert stowray.attempt("pull", image.reference).status == 4
        authfile = workspace / "auth.json"
        authfile.write_text(json.dumps({"auths": {registry.host: {"auth": token}}}))
        answer = stowray.run("pull", "--json", "--authfile", authfile, image.reference)
        assert answer.json["digest"] == image.manifest["digest"]
        assert "secret" not in answer.stderr + answer.text
        assert token not in answer.stderr + answer.text


def test_removed_image_is_gone_and_comes_back(
    stowray: Stowray, publish: Callable[[str], Published]
) -> None:
    image = publish("small")
    stowray.pull(image.reference)
    listed = stowray.run("images", "--json").lines
    assert [line["reference"] for line in listed] == [image.reference]
    stowray.run("rm", image.reference)
    assert stowray.run("images", "--json").lines == []
    assert stowray.attempt("inspect", image.reference).status == 3
    assert stowray.pull(image.reference)["digest"] == image.manifest["digest"]
