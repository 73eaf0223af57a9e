"""A sample of the sweep of `bench.faults flip`: damage in a file of each kind, named and mended."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.support.flips import HOWS, Flips

if TYPE_CHECKING:
    from collections.abc import Iterator

KINDS = [
    "blobs/",
    "refs/",
    "sources/",
    "snapshots/",
    "durable/",
    "leases/",
    "index.json",
    "oci-layout",
    "nonce",
    "version",
    "capabilities.json",
    "hosts.json",
    "ingest/",
    "layer.json",
    "/tree/",
]


@pytest.fixture(scope="module")
def made(fast_tmp: Path) -> Iterator[Flips]:
    with (
        tempfile.TemporaryDirectory(prefix="flips-", dir=fast_tmp) as folder,
        Flips(Path(folder)) as made,
    ):
        yield made


@pytest.mark.parametrize("kind", KINDS)
def test_damage_anywhere_is_named_and_mended(made: Flips, kind: str) -> None:
    names = [name for name in made.files() if kind in name]
    assert names, f"the template has no {kind}"
    # Some files of the kind, each damaged in another way.
    for number, name in enumerate(names[:4]):
        made.round(name, HOWS[(KINDS.index(kind) + number) % len(HOWS)], seed=number)


def test_what_a_plain_user_cannot_set_is_compared_and_mended(fast_tmp: Path) -> None:
    with (
        tempfile.TemporaryDirectory(prefix="flips-", dir=fast_tmp) as folder,
        Flips(Path(folder), plain=True) as made,
    ):
        names = [name for name in made.files() if name.endswith("tree.entries")]
        assert names
        # Of a layer on top and of the one below it, which the upper one was settled onto.
        assert len(names) > 1
        assert {made.round(name, how) for name in names for how in HOWS[1:4:2]} == {"named"}
