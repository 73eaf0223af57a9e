"""A store that is removed and made again under a process that goes on, as a session's does."""

# ruff: noqa: TID251 - the ban on the actors is for pipeline/
from __future__ import annotations

import shutil
from typing import TYPE_CHECKING

from stowray.actors.engines import Engines
from stowray.actors.wire import settings_to_dict
from stowray.pipeline.engine import PullOptions
from stowray.pipeline.reference import Reference
from stowray.pipeline.settings import Settings
from stowray.pipeline.store import Store
from tests.support.registry import FakeRegistry
from tests.support.small import small_tar

if TYPE_CHECKING:
    from pathlib import Path


def test_a_store_knows_whether_it_is_still_the_one_at_its_path(tmp_path: Path) -> None:
    path = tmp_path / "store"
    with Store.open(path) as store:
        assert store.is_current
        shutil.rmtree(path)
        assert not store.is_current
        with Store.open(path) as other:
            assert other.is_current
            assert not store.is_current
    link = tmp_path / "link"
    link.symlink_to(path)
    with Store.open(link) as linked:
        assert linked.is_current


def test_the_engines_of_an_actor_serve_the_new_store(tmp_path: Path) -> None:
    path = tmp_path / "store"
    task = {
        "store": str(path),
        "settings": settings_to_dict(Settings(store=str(path))),
        "environment": {},
    }
    engines = Engines()
    with FakeRegistry() as registry:
        registry.add_image("a/b", "1", [small_tar({"a": b"1"})])
        reference = Reference.parse(f"{registry.host}/a/b:1")
        used = []
        for _ in range(2):
            engine = engines.get(task)
            assert engines.get(task) is engine
            used.append(engine)
            engine.pull(reference, PullOptions(unpack=False))
            # What limits connections to a host is shared by all processes through the store.
            assert any((path / "locks" / "hosts").glob("*/blobs.0"))
            shutil.rmtree(path)
            # Whoever asks the actors for a pull has opened it anew before.
            Store.open(path).close()
        for engine in used:
            engine.close()
