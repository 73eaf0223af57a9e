"""policy.json and registries.conf mean here what they mean to skopeo."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import StowrayError, UsageError
from stowray.pipeline.policy_json import load
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from stowray.pipeline.source import parse_source
from tests.support import peers

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.real.conftest import Published
    from tests.support.command import Stowray

pytestmark = [pytest.mark.peers("docker-registry", "skopeo"), pytest.mark.slow]

ACCEPT = [{"type": "insecureAcceptAnything"}]
REJECT = [{"type": "reject"}]
SIGNED = [{"type": "signedBy", "keyType": "GPGKeys", "keyPath": "/none"}]


class Places:
    """One image as each transport has it."""

    def __init__(self, folder: Path, image: Published) -> None:
        self.folder = folder
        self.image = image
        self.host = image.host
        self.layout = folder / "images" / "layout"
        self.layout.parent.mkdir(parents=True)
        source = f"docker://{image.reference}"
        for target in (
            f"oci:{self.layout}:app",
            f"oci-archive:{self.folder}/images/oci.tar:app",
            f"docker-archive:{self.folder}/images/docker.tar:docker.io/library/app:1",
        ):
            peers.skopeo_copy(source, target)

    def source(self, transport: str) -> tuple[str, str]:
        """What stowray and skopeo are given for a transport."""
        if transport == "docker":
            return self.image.reference, f"docker://{self.image.reference}"
        if transport == "oci":
            return (f"oci:{self.layout}:app",) * 2
        if transport == "oci-archive":
            return (f"oci-archive:{self.folder}/images/oci.tar",) * 2
        return (f"docker-archive:{self.folder}/images/docker.tar",) * 2

    def scope(self, pattern: str) -> str:
        return pattern.format(
            host=self.host,
            port=self.host.rpartition(":")[2],
            name=f"{self.host}/{self.image.repository}",
            folder=self.folder.resolve(),
            layout=self.layout.resolve(),
        )


@pytest.fixture(scope="session")
def places(fast_tmp: Path, publish: Callable[[str], Published]) -> Places:
    return Places(fast_tmp / "policies", publish("small"))


SCOPES = [
    ("docker", ""),
    ("docker", "{host}"),
    ("docker", "127.0.0.1"),
    ("docker", "*.0.0.1"),
    ("docker", "*.0.1"),
    ("docker", "*.1"),
    ("docker", "{host}/real"),
    ("docker", "{host}/rea"),
    ("docker", "{name}"),
    ("docker", "{name}:1"),
    ("docker", "{name}:2"),
    ("oci", ""),
    ("oci", "{layout}"),
    # Not "{layout}:app", which containers-policy.json(5) allows and skopeo does not heed.
    ("oci", "{layout}:other"),
    ("oci", "{folder}/images"),
    ("oci", "{folder}/imag"),
    ("oci", "/"),
    ("oci", "relative"),
    ("oci-archive", ""),
    ("oci-archive", "{folder}/images/oci.tar"),
    ("oci-archive", "{folder}"),
    ("docker-archive", ""),
    ("docker-archive", "{folder}/images/docker.tar"),
    ("docker", None),
    ("oci", None),
]


@pytest.mark.parametrize(("transport", "pattern"), SCOPES)
def test_a_policy_has_the_same_say(
    places: Places, workspace: Path, transport: str, pattern: str | None
) -> None:
    ours, theirs = places.source(transport)
    for default, scoped in ((REJECT, ACCEPT), (ACCEPT, REJECT)):
        policy = workspace / "policy.json"
        transports = {} if pattern is None else {transport: {places.scope(pattern): scoped}}
        policy.write_text(json.dumps({"default": default, "transports": transports}))
        try:
            load(str(policy), {}).check(parse_source(ours))
            accepted = True
        except UsageError:
            accepted = False
        judged = peers.attempt(
            [
                "skopeo",
                "--policy",
                str(policy),
                "copy",
                "--src-tls-verify=false",
                theirs,
                f"dir:{workspace}/copy",
            ]
        )
        assert accepted is (judged.status == 0), (default, judged.stderr)


def test_the_command_refuses_what_the_policy_rejects(
    places: Places, stowray: Stowray, workspace: Path
) -> None:
    policy, settings = workspace / "policy.json", workspace / "settings.toml"
    settings.write_text(f"[registry]\npolicy_file = '{policy}'\n")
    for transport in ("docker", "oci", "oci-archive", "docker-archive"):
        source, _ = places.source(transport)
        policy.write_text(json.dumps({"default": REJECT, "transports": {transport: {"": ACCEPT}}}))
        assert stowray.attempt("pull", "--config", settings, source).status == 0
        for requirement, said in ((REJECT, "rejected"), (SIGNED, "signature")):
            policy.write_text(
                json.dumps({"default": ACCEPT, "transports": {transport: {"": requirement}}})
            )
            answer = stowray.attempt("pull", "--config", settings, "--policy", "missing", source)
            assert answer.status == 2
            assert said in answer.stderr
            assert str(policy) in answer.stderr


CONFIGURATIONS = {
    "as it is": "",
    "blocked": '[[registry]]\nlocation = "{host}"\nblocked = true',
    "blocked elsewhere": '[[registry]]\nlocation = "{host}/rea"\nblocked = true',
    "blocked namespace": '[[registry]]\nlocation = "{host}/real"\nblocked = true',
    # Not a tag that is there: containers-registries.conf(5) allows it, skopeo does not heed it.
    "blocked other tag": '[[registry]]\nlocation = "{host}/real/small:2"\nblocked = true',
    "longest prefix": '[[registry]]\nlocation = "{host}"\nblocked = true\n'
    '[[registry]]\nlocation = "{host}/real"\ninsecure = true',
    "located": '[[registry]]\nprefix = "moved.test"\nlocation = "{host}/real"\ninsecure = true',
    "located at nothing": '[[registry]]\nprefix = "moved.test"\nlocation = "{host}/none"\n'
    "insecure = true",
    "wildcard": '[[registry]]\nprefix = "*.test"\nlocation = "{host}/real"\ninsecure = true',
    "mirrored": '[[registry]]\nlocation = "moved.test"\n'
    '[[registry.mirror]]\nlocation = "{host}/none"\ninsecure = true\n'
    '[[registry.mirror]]\nlocation = "{host}/real"\ninsecure = true',
    "digests only": '[[registry]]\nlocation = "moved.test"\nmirror-by-digest-only = true\n'
    '[[registry.mirror]]\nlocation = "{host}/real"\ninsecure = true',
    "tags only": '[[registry]]\nlocation = "moved.test"\n'
    '[[registry.mirror]]\nlocation = "{host}/real"\ninsecure = true\n'
    'pull-from-mirror = "tag-only"',
    "both": '[[registry]]\nlocation = "moved.test"\nmirror-by-digest-only = true\n'
    '[[registry.mirror]]\nlocation = "{host}/real"\npull-from-mirror = "all"',
    "no location": "[[registry]]\ninsecure = true",
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_registries_conf_leads_to_the_same_place(
    places: Places, workspace: Path, name: str
) -> None:
    file = workspace / "registries.conf"
    file.write_text(CONFIGURATIONS[name].format(host=places.host))
    digest = places.image.resolved["digest"]
    repository = f"{places.host}/{places.image.repository}"
    if ".test" in CONFIGURATIONS[name]:
        repository = "a.moved.test/small" if name == "wildcard" else "moved.test/small"
    for reference in (f"{repository}:1", f"{repository}@{digest}"):
        judged = peers.attempt(
            [
                "skopeo",
                "--registries-conf",
                str(file),
                "inspect",
                "--raw",
                "--tls-verify=false",
                f"docker://{reference}",
            ]
        )
        assert (resolved(reference, file) == digest) is (judged.status == 0), (
            reference,
            judged.stderr,
        )


def resolved(reference: str, file: Path) -> str:
    """What stowray resolves a reference to, or why it does not."""
    settings = RegistrySettings(registries_conf=str(file), attempts=1)
    try:
        registry = Registry(settings, environment={})
        try:
            return str(registry.resolve(Reference.parse(reference)).descriptor.digest)
        finally:
            registry.close()
    except StowrayError as error:
        return str(error)
