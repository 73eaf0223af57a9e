from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import UsageError
from stowray.pipeline.policy_json import Policy, load, parse_policy, scopes
from stowray.pipeline.reference import Reference
from stowray.pipeline.source import parse_source

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "a" * 64
ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
SIGNED = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/key"}]
SIGSTORE = [{"type": "sigstoreSigned", "keyPath": "/key"}]


def policy(default: object = REJECT, **transports: object) -> Policy:
    named = {name.replace("_", "-"): table for name, table in transports.items()}
    return parse_policy(json.dumps({"default": default, "transports": named}).encode(), "file")


def accepts(given: Policy, text: str) -> bool:
    try:
        given.check(parse_source(text))
    except UsageError:
        return False
    return True


@pytest.mark.parametrize(
    ("scope", "text", "matches"),
    [
        ("docker.io/library/debian:12", "debian:12", True),
        ("docker.io/library/debian:12", "debian:13", False),
        (f"docker.io/library/debian@{DIGEST}", f"debian@{DIGEST}", True),
        (f"docker.io/library/debian@{DIGEST}", f"debian:12@{DIGEST}", True),
        ("docker.io/library/debian", "debian:12", True),
        ("docker.io/library", "debian:12", True),
        ("docker.io", "debian:12", True),
        ("docker.io/debian", "debian:12", False),
        ("debian", "debian:12", False),
        ("r.io/team", "r.io/team/app/web:1", True),
        ("r.io/team", "r.io/teams/app:1", False),
        ("r.io", "r.io:5000/app:1", False),
        ("r.io:5000", "r.io:5000/app:1", True),
        ("*.example.com", "a.example.com/app:1", True),
        ("*.example.com", "a.b.example.com:5000/app:1", True),
        ("*.com", "a.example.com/app:1", True),
        ("*.example.com", "example.com/app:1", False),
        ("", "r.io/app:1", True),
    ],
)
def test_scopes_of_registries(scope: str, text: str, matches: bool) -> None:
    assert accepts(policy(docker={scope: ACCEPT}), text) is matches
    assert accepts(policy(ACCEPT, docker={scope: REJECT}), text) is not matches


@pytest.mark.parametrize(
    ("transport", "scope", "text", "matches"),
    [
        ("oci", "/srv/images/app:1", "oci:/srv/images/app:1", True),
        ("oci", "/srv/images/app", "oci:/srv/images/app:1", True),
        ("oci", "/srv/images/app", "oci:/srv/images/app", True),
        ("oci", "/srv", "oci:/srv/images/app:1", True),
        ("oci", "/srv/im", "oci:/srv/images/app:1", False),
        ("oci", "", "oci:/srv/images/app:1", True),
        ("oci", "/srv", "oci-archive:/srv/a.tar", False),
        ("oci_archive", "/srv/a.tar", "oci-archive:/srv/a.tar:x", True),
        ("oci_archive", "/srv", "oci-archive:/srv/a.tar", True),
        ("docker_archive", "", "docker-archive:/srv/a.tar", True),
        ("docker", "", "oci:/srv/a", False),
    ],
)
def test_scopes_on_disk(transport: str, scope: str, text: str, matches: bool) -> None:
    assert accepts(policy(**{transport: {scope: ACCEPT}}), text) is matches
    assert accepts(policy(ACCEPT, **{transport: {scope: REJECT}}), text) is not matches


def test_a_link_does_not_lead_round_a_scope(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    given = policy(ACCEPT, oci={str(tmp_path.resolve() / "real"): REJECT})
    assert not accepts(given, f"oci:{tmp_path}/link")


def test_the_most_specific_scope_counts_alone() -> None:
    given = policy(
        ACCEPT,
        docker={"": REJECT, "r.io": ACCEPT, "r.io/team": REJECT, "r.io/team/app:1": ACCEPT},
    )
    assert not accepts(given, "q.io/app")
    assert accepts(given, "r.io/app")
    assert not accepts(given, "r.io/team/app:2")
    assert accepts(given, "r.io/team/app:1")
    assert accepts(given, "oci:/srv/a"), "the default of another transport"


def test_order_of_scopes() -> None:
    assert scopes(Reference.parse("a.example.com:5000/x/y:1")) == (
        "a.example.com:5000/x/y:1",
        "a.example.com:5000/x/y",
        "a.example.com:5000/x",
        "a.example.com:5000",
        "*.example.com",
        "*.com",
    )


def test_every_requirement_has_to_be_met() -> None:
    assert not accepts(policy([*ACCEPT, *REJECT]), "r.io/a")
    assert not accepts(policy([*ACCEPT, *SIGNED]), "r.io/a")
    assert accepts(policy([*ACCEPT, *ACCEPT]), "r.io/a")


@pytest.mark.parametrize("requirement", [SIGNED, SIGSTORE])
def test_a_signature_is_never_passed_over(requirement: list[dict[str, str]]) -> None:
    given = policy(ACCEPT, docker={"r.io": requirement})
    assert accepts(given, "q.io/a"), "a requirement that does not concern the image"
    with pytest.raises(UsageError) as caught:
        given.check(Reference.parse("r.io/a:1"))
    for part in ("r.io/a:1", "file", "docker: r.io", requirement[0]["type"], "signature"):
        assert part in str(caught.value)


def test_a_rejection_names_image_file_and_scope() -> None:
    with pytest.raises(UsageError) as caught:
        policy(ACCEPT, docker={"r.io": REJECT}).check(Reference.parse("r.io/a:1"))
    assert str(caught.value) == "r.io/a:1: rejected by file (docker: r.io)"


@pytest.mark.parametrize(
    "document",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"[]", id="no object"),
        pytest.param(b"{}", id="no default"),
        pytest.param(b'{"default": []}', id="no requirement"),
        pytest.param(b'{"default": {}}', id="requirements are no list"),
        pytest.param(b'{"default": [{"type": "trustMe"}]}', id="unknown requirement"),
        pytest.param(b'{"default": [{"type": ["reject"]}]}', id="type is no string"),
        pytest.param(b'{"default": ["reject"]}', id="requirement is no object"),
        pytest.param(b'{"default": [{"type": "reject", "unless": 1}]}', id="unknown field"),
        pytest.param(b'{"default": [{"type": "reject"}], "other": 1}', id="unknown key"),
        pytest.param(
            b'{"default": [{"type": "insecureAcceptAnything"}], "default": [{"type": "reject"}]}',
            id="a key twice",
        ),
        pytest.param(b'{"default": [{"type": "reject"}], "transports": []}', id="transports"),
        pytest.param(
            b'{"default": [{"type": "reject"}], "transports": {"docker": 1}}', id="scopes"
        ),
        pytest.param(
            b'{"default": [{"type": "reject"}], "transports": {"docker": {"r.io": []}}}',
            id="empty scope",
        ),
        pytest.param(
            b'{"default": [{"type": "reject"}], '
            b'"transports": {"oci": {"srv/a": [{"type": "reject"}]}}}',
            id="a path that is not absolute",
        ),
        pytest.param(
            b'{"default": [{"type": "reject"}], '
            b'"transports": {"docker-archive": {"/a": [{"type": "reject"}]}}}',
            id="a scope where there are none",
        ),
    ],
)
def test_a_file_with_a_flaw_is_refused_as_a_whole(document: bytes) -> None:
    with pytest.raises(UsageError) as caught:
        parse_policy(document, "the-file")
    assert "the-file" in str(caught.value)


def test_requirements_of_other_transports_are_read_too() -> None:
    given = policy(ACCEPT, atomic={"r.io": SIGNED}, docker_daemon={"": ACCEPT})
    assert accepts(given, "r.io/a")


def test_which_file(tmp_path: Path) -> None:
    own = tmp_path / ".config" / "containers" / "policy.json"
    own.parent.mkdir(parents=True)
    own.write_text(json.dumps({"default": REJECT}))
    named = tmp_path / "named.json"
    named.write_text(json.dumps({"default": ACCEPT}))
    home = {"HOME": str(tmp_path)}
    assert load("system", home).file == str(own)
    assert load(str(named), home).default == ("insecureAcceptAnything",)
    with pytest.raises(UsageError, match="none"):
        load(str(tmp_path / "none"), home)
