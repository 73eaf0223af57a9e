"""What the documentation tells people to type, typed; a throwaway registry stands for Docker Hub.

Blocks of one page run in order, in one shell and one empty directory. A block that cannot run here
says so in its first line, and is a test of its own that is skipped with that reason.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import jsonschema
import pytest
import yaml

from tests.real.conftest import IMAGES
from tests.support.command import PROGRAM, Stowray
from tests.support.push import Pusher

if TYPE_CHECKING:
    from collections.abc import Iterator

    from tests.support.catalogue import Catalogue
    from tests.support.docker_registry import DockerRegistry

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```(\w+)([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A page's shell blocks need these besides stowray.
PROGRAMS = ("jq", "skopeo", "runc", "crun", "bwrap", "mksquashfs", "chroot")
SECONDS = 280


@dataclass(frozen=True)
class Block:
    """One fenced block; ``before`` is the line of text above it."""

    page: Path
    number: int
    language: str
    mark: str
    code: str
    before: str

    @property
    def name(self) -> str:
        return f"{self.page.relative_to(ROOT)}-{self.number}"

    @property
    def reason(self) -> str:
        """Why it cannot run here; empty when it can."""
        return self.mark.partition("not-run: ")[2]


def blocks(page: Path) -> list[Block]:
    source = page.read_text(encoding="utf-8")
    return [
        Block(page, number, *found.groups(), source[: found.start()].rstrip().rpartition("\n")[2])
        for number, found in enumerate(FENCE.finditer(source), 1)
    ]


ALL = [block for page in PAGES for block in blocks(page)]
SHELL = [block for block in ALL if block.language == "sh"]


def named(page: str, language: str) -> list[Block]:
    found = [b for b in ALL if b.page == ROOT / page and b.language == language]
    assert found
    return found


@pytest.fixture(scope="module")
def hub(real_registry: DockerRegistry, catalogue: Catalogue, fast_tmp: Path) -> Path:
    """Settings by which docker.io is the throwaway registry, with ``debian:12`` in it."""
    layout = catalogue.layout(IMAGES["debian"][0])
    with Pusher(real_registry.host) as pusher:
        pusher.push(layout, layout.tagged("debian"), "library/debian", "12")
    hosts = fast_tmp / "hub-hosts"
    (hosts / "docker.io").mkdir(parents=True)
    (hosts / "docker.io" / "hosts.toml").write_text(f'server = "http://{real_registry.host}"\n')
    settings = fast_tmp / "hub.toml"
    settings.write_text(f'[registry]\nhosts_dir = "{hosts}"\n')
    return settings


@pytest.fixture
def place(workspace: Path) -> Iterator[Path]:
    """An empty directory to work in; what stays mounted below it is unmounted."""
    folder = workspace / "work"
    folder.mkdir()
    yield folder
    mounts = Path("/proc/self/mountinfo").read_text().splitlines()
    for point in [line.split()[4] for line in mounts if str(folder) in line.split()[4]]:
        subprocess.run(["umount", "--lazy", point], check=False, timeout=60)


def environment(place: Path, hub: Path) -> dict[str, str]:
    made = Stowray(place / "store", place.parent).environment()
    return {
        **made,
        "PATH": f"{PROGRAM.parent}:{made['PATH']}",
        "STOWRAY_CONFIG": str(hub),
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        # A Ray of this program's own, not the newest one on the machine.
        "RAY_ADDRESS": "local",
        "TERM": "dumb",
    }


def run(words: list[str], place: Path, hub: Path) -> str:
    done = subprocess.run(
        words,
        cwd=place,
        env=environment(place, hub),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
        timeout=SECONDS,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    return done.stdout


@pytest.mark.peers("docker-registry", *PROGRAMS)
@pytest.mark.parametrize(
    "page",
    [page for page in PAGES if any(b.page == page and not b.reason for b in SHELL)],
    ids=lambda page: str(page.relative_to(ROOT)),
)
def test_the_shell_blocks_of_a_page_run_in_order(page: Path, place: Path, hub: Path) -> None:
    script = ["set -euo pipefail"]
    for block in SHELL:
        if block.page == page and not block.reason:
            if block.mark.strip() == "root" and os.geteuid() != 0:
                continue
            script += [f"echo '#### {block.name}'", "set -x", block.code, "{ set +x; } 2>/dev/null"]
    out = run(["bash", "-c", "\n".join(script)], place, hub)
    assert "Traceback" not in out


@pytest.mark.parametrize("block", [b for b in SHELL if b.reason], ids=lambda block: block.name)
def test_blocks_that_cannot_run_here(block: Block) -> None:
    pytest.skip(f"{block.name}: {block.reason}")


@pytest.mark.root
@pytest.mark.peers("docker-registry", "crun", "jq")
def test_crun_runs_the_bundle_too(place: Path, hub: Path) -> None:
    """crun refuses a machine that mounts both kinds of cgroups: it is shown only the first."""
    prepare = named("docs/howto/runtimes.md", "sh")[0].code.replace("runc run", "true")
    run(["bash", "-euc", prepare], place, hub)
    start = next(b.code for b in named("docs/howto/runtimes.md", "sh") if "crun run" in b.code)
    hide = "umount /sys/fs/cgroup/unified 2>/dev/null || true\n"
    start = start.replace("crun", "crun --cgroup-manager=disabled")
    out = run(["unshare", "--mount", "bash", "-euc", hide + start], place, hub)
    assert out.strip().startswith("12.")


@pytest.mark.cluster
@pytest.mark.peers("docker-registry")
def test_the_python_recipes_run_in_order(place: Path, hub: Path) -> None:
    """In one program, on a Ray that the recipes start themselves."""
    parts = [block.code for block in named("docs/howto/python.md", "python")]
    (place / "recipes.py").write_text("\n".join(parts))
    run([sys.executable, "recipes.py"], place, hub)


@pytest.mark.peers("docker-registry")
def test_the_python_of_the_readme_runs(place: Path, hub: Path) -> None:
    (block,) = named("README.md", "python")
    (place / "readme.py").write_text(block.code.replace("/var/lib/stow", str(place / "stow")))
    assert "pulled from docker.io/library/debian:12" in run(
        [sys.executable, "readme.py"], place, hub
    )


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="no systemd-analyze here")
def test_the_units_are_units(place: Path, hub: Path) -> None:
    files = []
    for block in named("docs/howto/schedulers.md", "ini"):
        name = Path(block.before.strip("`:")).name
        # The program has to be there for systemd to be content.
        (place / name).write_text(block.code.replace("/opt/stowray/bin/stowray", str(PROGRAM)))
        files.append(str(place / name))
    assert len(files) == 2
    assert "rror" not in run(["systemd-analyze", "verify", "--man=no", *files], place, hub)


@pytest.mark.peers("docker-registry")
def test_the_commands_of_the_unit_run(place: Path, hub: Path) -> None:
    service = named("docs/howto/schedulers.md", "ini")[0].code
    commands = re.findall(r"^ExecStart=\S+stowray (.*)$", service, re.MULTILINE)
    assert len(commands) == 2
    for words in commands:
        run([str(PROGRAM), *shlex.split(words)], place, hub)


@pytest.mark.peers("docker-registry")
def test_the_steps_of_the_workflow_run(place: Path, hub: Path) -> None:
    (workflow,) = named("docs/howto/schedulers.md", "yaml")
    steps = yaml.safe_load(workflow.code)
    (place / "images.txt").write_text("debian:12\n")
    for step in steps:
        if "run" in step:
            run(["bash", "-euc", step["run"]], place, hub)
    assert (place / steps[0]["with"]["path"] / "index.json").exists()


def test_settings_of_other_programs_are_of_their_form() -> None:
    for block in named("docs/howto/runtimes.md", "toml"):
        assert tomllib.loads(block.code)
    for block in named("docs/howto/ray.md", "yaml"):
        assert yaml.safe_load(block.code)


def test_the_pod_of_kuberay_fits_together() -> None:
    """What the variables name is on a volume of the pod, and every mount has its volume."""
    (block,) = [b for b in named("docs/howto/ray.md", "yaml") if "hostPath" in b.code]
    pod = yaml.safe_load(block.code)
    volumes = {volume["name"]: volume["hostPath"] for volume in pod["volumes"]}
    assert volumes["stow"]["type"] == "DirectoryOrCreate"
    for container in pod["containers"]:
        mounts = {mount["name"]: Path(mount["mountPath"]) for mount in container["volumeMounts"]}
        assert set(mounts) == set(volumes)
        variables = {entry["name"]: entry["value"] for entry in container["env"]}
        assert Path(variables["STOWRAY_STORE"]) == mounts["stow"]
        assert Path(variables["CONTAINERD_ADDRESS"]).parent == mounts["containerd"]
        assert variables["CONTAINERD_NAMESPACE"] == "k8s.io"


def test_the_cluster_s_yaml_is_what_ray_s_launcher_takes() -> None:
    """Held against the schema that ships with Ray: it allows no key that it does not know."""
    spec = importlib.util.find_spec("ray")
    assert spec is not None and spec.origin is not None
    path = Path(spec.origin).parent / "autoscaler" / "ray-schema.json"
    schema = json.loads(path.read_text(encoding="utf-8"))
    (block,) = [b for b in named("docs/howto/ray.md", "yaml") if "start_ray" in b.code]
    settings = {"cluster_name": "c", "provider": {"type": "local"}, **yaml.safe_load(block.code)}
    jsonschema.validate(settings, schema)
    with pytest.raises(jsonschema.ValidationError, match="worker_start_rey_commands"):
        jsonschema.validate({**settings, "worker_start_rey_commands": []}, schema)
    for command in settings["worker_start_ray_commands"]:
        subprocess.run(["bash", "-n", "-c", command], check=True, timeout=60)
