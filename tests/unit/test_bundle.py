from __future__ import annotations

import io
import json
import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from stowray.pipeline.bundle import write_bundle
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import ManifestError, NotFoundError, StorageError
from stowray.pipeline.runtime_spec import Host, RunConfig, User, resolve_user, runtime_config
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.support import entries, peers
from tests.support.chains import commit_chain
from tests.support.plain_user import plain_directory, run_plain

if TYPE_CHECKING:
    from collections.abc import Iterator

PASSWD = b"""root:x:0:0:root:/root:/bin/sh
app:x:1000:1001:App:/home/app:/bin/sh
7:x:70:71:a name of digits:/:/bin/sh
broken
odd:x:x:x
"""
GROUP = b"""root:x:0:
wheel:x:10:root,app
users:x:100:app
other:x:200:someone
bad:x:nan:app
"""


def tar(*parts: entries.Entry) -> bytes:
    out = io.BytesIO()
    entries.write_tar(parts, out)
    return out.getvalue()


def programs(*names: str) -> list[entries.Entry]:
    """Return programs of this machine with all libraries that they need."""
    wanted: dict[str, Path] = {}
    for name in names:
        found = shutil.which(name)
        assert found is not None
        path = Path(found).resolve()
        wanted[f"bin/{name}"] = path
        listed = subprocess.run(["ldd", path], capture_output=True, text=True, check=True)
        for library in re.findall(r"(/\S+) \(0x", listed.stdout):
            wanted[library[1:]] = Path(library).resolve()
    return [
        entries.file(name, path.read_bytes(), mode=0o755) for name, path in sorted(wanted.items())
    ]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store.open(tmp_path / "store") as store:
        yield store


def put_image(store: Store, run: dict[str, Any], *layers: bytes) -> tuple[Digest, Digest]:
    """Put an image's config and chain into the store; return config digest and chain ID."""
    diff_ids = [str(Digest.of(layer)) for layer in layers]
    document = {
        "architecture": "amd64",
        "os": "linux",
        "config": run,
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
    }
    body = json.dumps(document).encode()
    config = Digest.of(body)
    store.put_blob(config, body)
    return config, commit_chain(Snapshots(store), layers)[-1].chain_id


SHELL = programs("sh", "cat", "id", "env")
ACCOUNTS = [
    entries.directory("etc"),
    entries.directory("share"),
    entries.file("share/passwd", PASSWD),
    # Both ways to a file that must be found inside the image and nowhere else.
    entries.symlink("etc/passwd", "/../share/passwd"),
    entries.symlink("etc/group", "../../../share/group"),
    entries.file("share/group", GROUP),
]


@pytest.mark.peers
@pytest.mark.root
@pytest.mark.skipif(os.getuid() != 0, reason="runc makes its namespaces as root")
def test_runc_starts_it(store: Store, tmp_path: Path) -> None:
    peers.require("runc")
    run = {
        "User": "app",
        "Env": ["GREETING=hello world"],
        "Entrypoint": ["/bin/sh", "-c"],
        "Cmd": ["id -u; id -g; id -G; echo $GREETING; pwd; cat /proc/1/comm; exit 5"],
        "WorkingDir": "/made/for/me",
    }
    config, chain_id = put_image(store, run, tar(*ACCOUNTS), tar(*SHELL))
    write_bundle(store, config, chain_id, tmp_path / "bundle")
    ran = peers.attempt(
        [
            "runc",
            "--root",
            str(tmp_path / "state"),
            "run",
            "--bundle",
            str(tmp_path / "bundle"),
            f"stowray-{os.getpid()}",
        ]
    )
    assert (ran.status, ran.stderr) == (5, "")
    assert ran.stdout.splitlines() == [
        "1000",
        "1001",
        "1001 10 100",
        "hello world",
        "/made/for/me",
        "sh",
    ]


PLAIN = """
import sys
from pathlib import Path
from stowray.pipeline.bundle import write_bundle
from stowray.pipeline.store import Store
from tests.unit.test_bundle import ACCOUNTS, SHELL, put_image, tar
become_plain()
work = Path(sys.argv[1])
store = Store.open(work / "store")
for user in ("", "root", "app", "1000:100"):
    run = {"User": user, "Cmd": ["/bin/sh", "-c", "id -u; id -g; exit 6"]}
    config, chain_id = put_image(store, run, tar(*ACCOUNTS, *SHELL))
    said = []
    bundle = work / ("bundle-" + user.replace(":", "-"))
    write_bundle(store, config, chain_id, bundle, warn=said.append)
    command = ["runc", "--root", work / "state", "run", "--bundle", bundle, "stowray-plain"]
    ran = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    print(ran.returncode, ran.stdout.split(), len(said), ran.stderr)
"""


@pytest.mark.peers
def test_runc_starts_a_plain_users(tmp_path: Path) -> None:
    peers.require("runc", "unshare")
    if peers.attempt(["unshare", "--user", "true"]).status:
        pytest.skip("this kernel gives no user namespaces to plain users")
    with plain_directory() as work:
        found = [line.strip() for line in run_plain(PLAIN, work).splitlines() if line]
    # Only the one ID that is mapped is there, whomever the image names.
    assert found == [f"6 ['0', '0'] {said}" for said in (0, 0, 1, 1)]


PLAIN_USERS = """
import json, sys
from pathlib import Path
from stowray.pipeline.bundle import write_bundle
from stowray.pipeline.store import Store
from tests.unit.test_bundle import ACCOUNTS, put_image, tar
become_plain()
work = Path(sys.argv[1])
with Store.open(work / "store") as store:
    for user in ("root", "root:users", "app"):
        config, chain_id = put_image(store, {"User": user}, tar(*ACCOUNTS))
        said = []
        write_bundle(store, config, chain_id, work / user, warn=said.append)
        print(json.loads((work / user / "config.json").read_bytes())["process"]["user"], *said)
"""


def test_a_plain_users_process_has_the_one_id_that_is_mapped() -> None:
    root = "{'uid': 0, 'gid': 0}"
    why = "a plain user's bundle knows root only, which is you outside: it runs as root"
    with plain_directory() as work:
        assert run_plain(PLAIN_USERS, work).splitlines() == [
            root,
            f"{root} the image's user 0:100 is not mapped, {why}",
            f"{root} the image's user 1000:1001 is not mapped, {why}",
        ]


def test_a_bundle_of_root_keeps_the_images_user(store: Store, tmp_path: Path) -> None:
    if not Snapshots(store).privileged:
        pytest.skip("only root makes such bundles")
    config, chain_id = put_image(store, {"User": "app"}, tar(*ACCOUNTS))
    said: list[str] = []
    write_bundle(store, config, chain_id, tmp_path / "bundle", warn=said.append)
    content = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    assert content["process"]["user"] == {"uid": 1000, "gid": 1001, "additionalGids": [10, 100]}
    assert said == []


def test_other_users_do_not_reach_set_user_id_files(store: Store, tmp_path: Path) -> None:
    config, chain_id = put_image(store, {}, tar(entries.file("f", b"1", mode=0o4755)))
    write_bundle(store, config, chain_id, tmp_path / "bundle")
    assert stat.S_IMODE((tmp_path / "bundle").stat().st_mode) == 0o700
    assert stat.S_IMODE((tmp_path / "bundle" / "rootfs" / "f").stat().st_mode) == 0o4755
    content = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    assert content["process"]["args"] == ["sh"]
    assert content["root"] == {"path": "rootfs", "readonly": False}


def test_a_failure_leaves_nothing(store: Store, tmp_path: Path) -> None:
    config, chain_id = put_image(store, {"User": "nobody-knows"}, tar(*ACCOUNTS))
    with pytest.raises(ManifestError, match="nobody-knows"):
        write_bundle(store, config, chain_id, tmp_path / "bundle")
    with pytest.raises(NotFoundError):
        write_bundle(store, Digest.of(b"other"), chain_id, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()
    config, chain_id = put_image(store, {}, tar(*ACCOUNTS))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(StorageError, match="not empty"):
        write_bundle(store, config, chain_id, tmp_path / "full")
    assert os.listdir(tmp_path / "full") == ["mine"]


def test_account_files_that_are_no_files_are_no_accounts(store: Store, tmp_path: Path) -> None:
    odd = tar(entries.directory("etc"), entries.symlink("etc/passwd", "passwd"))
    config, chain_id = put_image(store, {"User": "1234"}, odd)
    write_bundle(store, config, chain_id, tmp_path / "bundle")
    content = json.loads((tmp_path / "bundle" / "config.json").read_bytes())
    assert content["process"]["user"] == {"uid": 1234, "gid": 0}


def test_accounts_are_those_of_the_image_and_no_monster_is_read(
    store: Store, tmp_path: Path
) -> None:
    spy = b"spy:x:55:55::/:/bin/sh\n"
    (tmp_path / "passwd").write_bytes(spy)
    outside = entries.symlink("etc/passwd", f"{tmp_path}/passwd")
    monster = entries.file("etc/passwd", spy + b"#" * (4 << 20))
    for number, passwd in enumerate((outside, monster)):
        layer = tar(entries.directory("etc"), passwd, entries.file("etc/group", b"#" * (5 << 20)))
        config, chain_id = put_image(store, {"User": "spy"}, layer)
        with pytest.raises(ManifestError, match="spy"):
            write_bundle(store, config, chain_id, tmp_path / f"bundle{number}")


@pytest.mark.parametrize(
    ("text", "user"),
    [
        pytest.param("", User(0, 0, (10,)), id="none is root"),
        pytest.param("root", User(0, 0, (10,)), id="root by name"),
        pytest.param("app", User(1000, 1001, (10, 100)), id="name"),
        pytest.param("1000", User(1000, 1001, (10, 100)), id="known number"),
        pytest.param("4242", User(4242, 0), id="unknown number"),
        pytest.param("7", User(70, 71), id="a name of digits before a number"),
        pytest.param("app:other", User(1000, 200), id="a group ends the others"),
        pytest.param("app:4242", User(1000, 4242), id="unknown group number"),
        pytest.param("4242:users", User(4242, 100), id="number and group name"),
        pytest.param("app:", User(1000, 1001, (10, 100)), id="an empty group"),
        pytest.param(":users", User(0, 100), id="an empty user"),
    ],
)
def test_users(text: str, user: User) -> None:
    assert resolve_user(text, PASSWD, GROUP, "sha256:c") == user


@pytest.mark.parametrize(
    "text", ["ghost", "odd", "app:ghosts", "-1", "4294967295", "99999999999", "²", "app:bad"]
)
def test_users_that_are_nobody(text: str) -> None:
    with pytest.raises(ManifestError, match="not in the image"):
        resolve_user(text, PASSWD, GROUP, "sha256:c")


def config_of(run: object, **document: object) -> RunConfig:
    return RunConfig.parse({"config": run, **document}, "sha256:c")


@pytest.mark.parametrize(
    ("run", "arguments", "expected"),
    [
        pytest.param({"Cmd": ["a", "b"]}, (), ["a", "b"], id="command"),
        pytest.param({"Entrypoint": ["e"], "Cmd": ["a"]}, (), ["e", "a"], id="both"),
        pytest.param({"Entrypoint": ["e"], "Cmd": ["a"]}, ("x",), ["e", "x"], id="replaced"),
        pytest.param({"Entrypoint": None, "Cmd": None}, (), ["sh"], id="neither"),
        pytest.param(None, (), ["sh"], id="no config at all"),
    ],
)
def test_arguments(run: object, arguments: tuple[str, ...], expected: list[str]) -> None:
    content = runtime_config(config_of(run), User(), Host(), arguments=arguments)
    assert content["process"]["args"] == expected


def test_environment_and_directory() -> None:
    bare = runtime_config(config_of({}), User(), Host())["process"]
    assert bare["env"] == ["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"]
    assert bare["cwd"] == "/"
    run = {"Env": ["A=1", "PATH=/own"], "WorkingDir": "srv"}
    content = runtime_config(config_of(run), User(), Host(), terminal=True)["process"]
    assert content["env"] == ["A=1", "PATH=/own", "TERM=xterm"]
    assert content["cwd"] == "/srv"
    assert content["terminal"]


def test_only_variables_with_a_name_and_a_value_are_set() -> None:
    run = {"Env": ["A=1", "PATH", "", "=x", "B=", "C=2=3"]}
    content = runtime_config(config_of(run), User(), Host())["process"]
    path = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
    assert content["env"] == [path, "A=1", "B=", "C=2=3"]


def test_annotations_follow_the_conversion_rules() -> None:
    run = {
        "Labels": {"org.opencontainers.image.os": "mine", "a": "1", "n": 1, "e": None},
        "StopSignal": "SIGUSR1",
        "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
    }
    parsed = config_of(run, os="linux", architecture="arm64", author="me", created=5)
    assert parsed.annotations == {
        "org.opencontainers.image.os": "mine",
        "org.opencontainers.image.architecture": "arm64",
        "org.opencontainers.image.author": "me",
        "org.opencontainers.image.stopSignal": "SIGUSR1",
        "org.opencontainers.image.exposedPorts": "53/udp,80/tcp",
        "a": "1",
        "e": "",
    }


def test_capabilities_are_neither_inheritable_nor_ambient() -> None:
    capabilities = runtime_config(config_of({}), User(), Host())["process"]["capabilities"]
    assert set(capabilities) == {"bounding", "effective", "permitted"}
    assert "CAP_SYS_ADMIN" not in capabilities["bounding"]


@pytest.mark.parametrize(
    "run",
    [
        pytest.param([], id="no object"),
        pytest.param({"Cmd": "sh"}, id="a text for a list"),
        pytest.param({"Env": [1]}, id="a number in a list"),
        pytest.param({"User": 0}, id="a number for a text"),
        pytest.param({"Cmd": ["a\0b"]}, id="a NUL"),
    ],
)
def test_fields_of_another_type(run: object) -> None:
    with pytest.raises(ManifestError):
        config_of(run or [1])
