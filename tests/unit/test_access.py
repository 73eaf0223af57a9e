"""What is taken along to another machine reaches a registry that this machine has no files for."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING

import pytest
import trustme

from stowray.pipeline.access import PEM, Access, access_to, as_files, without_files
from stowray.pipeline.credentials import Credentials
from stowray.pipeline.endpoints import Endpoints
from stowray.pipeline.errors import StowrayError, UsageError
from stowray.pipeline.reference import Reference
from stowray.pipeline.registry import Registry
from stowray.pipeline.settings import RegistrySettings
from tests.support.registry import FakeRegistry
from tests.support.tars import archive, file

if TYPE_CHECKING:
    from pathlib import Path


def test_login_mirror_and_authority_are_enough_elsewhere(tmp_path: Path) -> None:
    authority = trustme.CA()
    with FakeRegistry(auth="basic", users={"me": "secret"}, authority=authority) as registry:
        registry.add_image("a/b", "1", [archive(file("f", b"1"))])
        (tmp_path / "hosts" / registry.host).mkdir(parents=True)
        (tmp_path / "hosts" / registry.host / "hosts.toml").write_text(
            f'server = "https://{registry.host}"\nca = "ca.pem"\n'
        )
        authority.cert_pem.write_to_path(str(tmp_path / "hosts" / registry.host / "ca.pem"))
        login = base64.b64encode(b"me:secret").decode()
        other = {"auths": {registry.host: {"auth": login}, "other.example": {"auth": login}}}
        (tmp_path / "auth.json").write_text(json.dumps(other))
        settings = RegistrySettings(
            authfile=str(tmp_path / "auth.json"), hosts_dir=str(tmp_path / "hosts")
        )
        reference = Reference.parse(f"{registry.host}/a/b:1")
        found = access_to(
            reference, Endpoints(settings, {}), Credentials({}, settings.authfile)
        ).to_dict()
        assert "other.example" not in json.dumps(found), "only what this reference needs"
        elsewhere = without_files(settings)
        assert not any((elsewhere.authfile, elsewhere.hosts_dir, elsewhere.registries_conf))
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.unlink() if path.is_file() else path.rmdir()
        travelled = Access.from_dict(json.loads(json.dumps(found)))
        there = Registry(elsewhere, environment={}, access=travelled)
        try:
            assert there.resolve(reference).descriptor.size > 0
        finally:
            there.close()
        without = Registry(elsewhere, environment={})
        try:
            with pytest.raises(StowrayError):
                without.resolve(reference)
        finally:
            without.close()
    assert "secret" not in repr(travelled)


def test_a_file_without_certificates_is_named(tmp_path: Path) -> None:
    (tmp_path / "ca.pem").write_text("nothing")
    for name in ("ca.pem", "absent.pem"):
        with pytest.raises(UsageError, match=name):
            without_files(RegistrySettings(ca_file=str(tmp_path / name)))


def test_pem_is_read_like_a_file_and_leaves_none() -> None:
    with as_files(f"{PEM}X-----", "/some/file", "") as (name, file_name, none):
        with open(name) as stream:
            assert stream.read() == f"{PEM}X-----"
        assert (file_name, none) == ("/some/file", "")
    with pytest.raises(OSError, match=name):
        open(name).close()
