"""A collection between the moment a pull finds its documents and the moment it holds them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stowray.pipeline.collect import collect, remove
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.reference import Reference
from tests.support.invariants import check_store
from tests.support.registry import FakeRegistry
from tests.support.small import local_engine, small_tar

if TYPE_CHECKING:
    from pathlib import Path


def test_a_document_collected_before_it_was_held_is_fetched_again(workspace: Path) -> None:
    path = workspace / "store"
    with FakeRegistry() as registry, local_engine(path) as engine:
        registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        source = Reference.parse(f"{registry.host}/a/b:1")
        engine.pull(source, PullOptions())
        remove(engine.store, source.canonical)
        # Resolved from what is here already, which nothing holds; then comes the collector.
        image = engine.image(source, PullOptions())
        collect(engine.store)
        with engine.store.lease("pull", [image.manifest_descriptor.digest], image.chain_ids):
            engine.pull_image(source, image, PullOptions())
        assert engine.store.has(image.manifest_descriptor.digest)
        check_store(path)
