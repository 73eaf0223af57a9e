"""What other tools make of an image: their tree, or that they refuse it.

Invariant: each tool works in a throwaway folder, two levels below the one that the test gives: some
archives make some of them remove the folder above their destination.
"""

from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path
from typing import TYPE_CHECKING

from stowray.pipeline.digest import Digest
from tests.support import judge, peers
from tests.support.plain_user import PLAIN_UID

if TYPE_CHECKING:
    from tests.support.images import Layout
    from tests.support.runtimes import Containerd, Podman

# Its collector would take away what no image holds, such as the view of a snapshot.
NEVER_COLLECT = """[plugins."io.containerd.gc.v1.scheduler"]
schedule_delay = "24h"
startup_delay = "24h"
"""

# None: the tool refuses the image.
Verdict = dict[bytes, judge.Node] | None


def umoci(layout: Layout, tag: str, scratch: Path, *, rootless: bool = False) -> Verdict:
    """Unpack with umoci; ``rootless`` as a plain user, who must be able to reach ``scratch``."""
    bundle = scratch / "throwaway" / "two-levels" / "bundle"
    bundle.parent.mkdir(parents=True)
    command = ["umoci", "unpack", "--image", f"{layout.path}:{tag}", str(bundle)]
    if rootless:
        os.chown(bundle.parent, PLAIN_UID, PLAIN_UID)
        command.insert(2, "--rootless")
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=peers.PEER_SECONDS,
            check=False,
            user=PLAIN_UID,
            group=PLAIN_UID,
            extra_groups=[],
            env={"PATH": os.environ.get("PATH", "/usr/bin"), "HOME": str(bundle.parent)},
        )
        status = done.returncode
    else:
        status = peers.attempt(command).status
    return None if status else judge.read_tree(bundle / "rootfs")


def containerd(
    instance: Containerd, layout: Layout, tag: str, snapshotter: str, scratch: Path
) -> Verdict:
    """Import and mount with a private containerd, which must not collect garbage meanwhile."""
    archive = _archive(layout, scratch)
    here = ("--snapshotter", snapshotter)
    try:
        instance.ctr("images", "import", "--base-name", "example.org/judged", *here, archive)
    except peers.PeerError:
        return None
    finally:
        archive.unlink()
    config = layout.document(layout.document(layout.tagged(tag)["digest"])["config"]["digest"])
    chain_id, *above = config["rootfs"]["diff_ids"]
    for diff_id in above:
        chain_id = Digest.of(f"{chain_id} {diff_id}".encode())
    # `ctr images mount` of 1.6 knows the default snapshotter only.
    place = scratch / f"{tag}-{snapshotter}"
    place.mkdir()
    command = instance.ctr("snapshots", *here, "view", "--target", place, f"view-{tag}", chain_id)
    # mount(2) takes 4096 bytes of options: the paths become relative to where the snapshots lie.
    snapshots = f"{instance.root}/root/io.containerd.snapshotter.v1.overlayfs/snapshots/"
    relative = command.replace(f"={snapshots}", "=").replace(f":{snapshots}", ":").split()
    peers.run(["sh", "-c", 'cd "$0" && exec "$@"', snapshots, *relative])
    try:
        return judge.read_tree(place, ghosts=True)
    finally:
        peers.run(["umount", str(place)])


def podman(instance: Podman, layout: Layout, scratch: Path) -> Verdict:
    """Load and mount with a podman that has storage of its own; the layout has one image."""
    archive = _archive(layout, scratch)
    try:
        identity = instance.run("load", "--quiet", "--input", archive).split()[-1]
    except peers.PeerError:
        return None
    finally:
        archive.unlink()
    with instance.mounted(identity) as place:
        return judge.read_tree(Path(place), ghosts=True)


def _archive(layout: Layout, scratch: Path) -> Path:
    archive = scratch / "image.tar"
    with tarfile.open(archive, "w") as out:
        out.add(layout.path, ".")
    return archive
