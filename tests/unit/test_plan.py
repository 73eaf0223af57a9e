from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from stowray.pipeline.descriptor import Descriptor, ImageConfig, Manifest
from stowray.pipeline.digest import Digest
from stowray.pipeline.image import Image, chain_ids
from stowray.pipeline.media_types import OCI_CONFIG, OCI_LAYER_GZIP, OCI_MANIFEST
from stowray.pipeline.plan import make_plan, stage_id
from stowray.pipeline.platform import Platform
from stowray.pipeline.reference import Reference


def make_image(names: list[str]) -> Image:
    """An image with one layer per name; equal names are the same layer."""
    layers = tuple(
        Descriptor(OCI_LAYER_GZIP, Digest.of(b"blob" + name.encode()), 10 + len(name))
        for name in names
    )
    diff_ids = tuple(Digest.of(b"diff" + name.encode()) for name in names)
    config = Descriptor(OCI_CONFIG, Digest.of(b"config"), 2)
    manifest = Descriptor(OCI_MANIFEST, Digest.of(b"manifest"), 3)
    return Image(
        reference=Reference.parse("a/b"),
        resolved=manifest,
        manifest_descriptor=manifest,
        manifest=Manifest(config=config, layers=layers, media_type=OCI_MANIFEST),
        config=ImageConfig("linux", "amd64", "", "", (), diff_ids, b"{}"),
        platform=Platform("linux", "amd64"),
    )


def plan_for(image: Image, blobs=frozenset(), chains=frozenset(), unpack=True):
    return make_plan(
        image,
        has_blob=lambda digest, _size: digest in blobs,
        has_chain=lambda chain_id: chain_id in chains,
        unpack=unpack,
    )


def kinds(plan, kind):
    return [step for step in plan.steps if step.kind == kind]


def test_a_cold_store_fetches_stages_and_commits_everything() -> None:
    image = make_image(["a", "bb", "c"])
    plan = plan_for(image)
    assert [step.descriptor.size for step in kinds(plan, "fetch")] == [12, 11, 11, 2]
    commits = kinds(plan, "commit")
    assert [step.chain_id for step in commits] == list(image.chain_ids)
    assert [step.parent for step in commits] == [None, *image.chain_ids[:-1]]
    assert commits[1].id in commits[2].needs
    for stage in kinds(plan, "stage"):
        assert stage.follows == f"fetch:{stage.descriptor.digest}"
        assert stage.needs == ()


def test_a_warm_store_has_nothing_to_do() -> None:
    image = make_image(["a", "b"])
    blobs = {layer.digest for layer in image.layers} | {image.manifest.config.digest}
    assert plan_for(image, blobs, {image.chain_ids[-1]}).is_complete


def test_blobs_here_but_nothing_unpacked_stages_without_waiting_for_a_fetch() -> None:
    image = make_image(["a", "b"])
    blobs = {layer.digest for layer in image.layers} | {image.manifest.config.digest}
    plan = plan_for(image, blobs)
    assert kinds(plan, "fetch") == []
    assert [stage.follows for stage in kinds(plan, "stage")] == [None, None]


def test_a_committed_base_is_not_staged_again() -> None:
    image = make_image(["a", "b", "c"])
    plan = plan_for(image, chains={image.chain_ids[1]})
    assert [step.chain_id for step in kinds(plan, "commit")] == [image.chain_ids[2]]
    assert kinds(plan, "commit")[0].parent == image.chain_ids[1]
    # Blobs are content of the store in their own right; one that comes now has to prove its diff
    # ID, whatever is committed.
    assert len(kinds(plan, "fetch")) == 4
    assert {step.diff_id for step in kinds(plan, "stage")} == set(image.diff_ids)
    here = {layer.digest for layer in image.layers[:2]}
    plan = plan_for(image, here, {image.chain_ids[1]})
    assert [step.diff_id for step in kinds(plan, "stage")] == [image.diff_ids[2]]


def test_the_same_layer_twice_is_fetched_and_staged_once_and_committed_twice() -> None:
    plan = plan_for(make_image(["a", "b", "a"]))
    assert [len(kinds(plan, kind)) for kind in ("fetch", "stage", "commit")] == [3, 2, 3]


def test_without_unpacking_only_blobs_are_planned() -> None:
    plan = plan_for(make_image(["a", "b"]), unpack=False)
    assert {step.kind for step in plan.steps} == {"fetch"}


def test_an_image_without_layers_fetches_its_config_alone() -> None:
    plan = plan_for(make_image([]))
    assert [step.kind for step in plan.steps] == ["fetch"]


@given(
    names=st.lists(st.sampled_from("abcdef"), max_size=6),
    present=st.sets(st.sampled_from("abcdef")),
    depth=st.integers(0, 6),
    unpack=st.booleans(),
)
def test_nothing_present_is_planned_and_commits_follow_the_chain(
    names, present, depth, unpack
) -> None:
    image = make_image(names)
    blobs = {Digest.of(b"blob" + name.encode()) for name in present}
    committed = set(image.chain_ids[:depth])
    plan = plan_for(image, blobs, committed, unpack)
    assert len({step.id for step in plan.steps}) == len(plan.steps)
    done: set[str] = set()
    for step in plan.steps:
        if step.kind == "fetch":
            assert step.descriptor.digest not in blobs
        if step.kind == "commit":
            assert step.chain_id not in committed
            assert stage_id(step.diff_id, step.descriptor.digest) in step.needs
            if step.descriptor.digest not in blobs:
                assert f"fetch:{step.descriptor.digest}" in step.needs
            if step.parent is not None and step.parent not in committed:
                assert f"commit:{step.parent}" in step.needs
        # The order of the tuple is one in which the steps can be carried out.
        assert set(step.needs) <= done
        done.add(step.id)
    if unpack:
        planned = {step.chain_id for step in plan.steps if step.kind == "commit"}
        assert planned | committed == set(chain_ids(image.diff_ids))
