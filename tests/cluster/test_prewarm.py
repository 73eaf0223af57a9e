"""Pre-warming four Ray nodes with a store each, by a driver that is a program of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.digest import Digest
from stowray.pipeline.snapshot import Snapshots
from stowray.pipeline.store import Store
from tests.cluster.prewarm import Driver, add_image, states, statuses

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from tests.support.registry import FakeRegistry

NODES = {"n0", "n1", "n2", "n3"}


def test_every_image_comes_to_every_node_and_each_byte_once_from_the_origin(
    drive: Callable[..., Driver], registry: FakeRegistry, workspace: Path
) -> None:
    references = [add_image(registry, "one", 200_000, 1 << 20), add_image(registry, "two", 5000)]
    code, report = drive(*references).finish()
    assert code == 0
    assert states(report) == dict.fromkeys(NODES, "ready")
    assert statuses(report) == {node: {"done"} for node in NODES}
    image_size = sum(
        layer["size"]
        for reference in references
        for cell in report["cells"]
        if cell["node"] == "n0" and cell["reference"] == reference
        for layer in cell["result"]["layers"]
    )
    assert report["origin_bytes"] == image_size
    assert report["peer_bytes"] == 3 * image_size
    blobs = [request.path for request in registry.seen("/blobs/")]
    assert len(blobs) == len(set(blobs)), "a blob was asked for twice"
    assert {node["store"] for node in report["nodes"]} == {str(workspace / n) for n in NODES}
    for cell in report["cells"]:
        store = Store.open(workspace / cell["node"], create=False)
        assert store.has(Digest(cell["digest"]))
        assert Snapshots(store).has(Digest(cell["result"]["chain_id"]))
    assert all(event["completed"] for event in report["events"] if event["kind"] != "job")
    assert {event["node"] for event in report["events"] if event["kind"] == "layer"} == NODES

    # Again: nothing is downloaded, nothing unpacked, and the registry is hardly asked.
    asked, fetched = registry.count("/manifests/"), registry.count("/blobs/")
    code, again = drive(*references).finish()
    assert code == 0
    assert statuses(again) == {node: {"exists"} for node in NODES}
    assert (again["origin_bytes"], again["peer_bytes"], again["spans"]) == (0, 0, [])
    assert registry.count("/blobs/") == fetched
    assert registry.count("/manifests/") - asked <= 2 * len(references)
    assert not any(
        layer["apply_seconds"] for cell in again["cells"] for layer in cell["result"]["layers"]
    )
