from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import StorageError, UsageError
from stowray.pipeline.lock_file import (
    Drift,
    LockedImage,
    LockFile,
    decode_lock,
    drift,
    encode_lock,
    lock,
    read_lock,
    write_lock,
)
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_plan import (
    FailurePolicy,
    Limits,
    NodeFacts,
    NodeSelection,
    PrewarmPlan,
    Wave,
    expand_waves,
)
from stowray.pipeline.prewarm_plan_file import PLAN_LIMIT, load_plan, parse_plan
from stowray.pipeline.reference import Reference

FULL = """
images = [
    "debian:12",
    {reference = "localhost:5000/app", platforms = ["linux/amd64", "linux/arm64"]},
]
waves = [1, "10%", "100%"]
deliver = ["containerd", "podman", "containerd"]
lock = "images.lock"

[nodes]
labels = {pool = "gpu", zone = ["a", "b"]}
resources = {GPU = 1}
names = ["node-*"]
exclude_head = true

[limits]
nodes_at_once = 100
origin_connections = 8
fan_out = 3
bandwidth = "200MB/s"

[failure]
tries = 2
node_timeout_seconds = 60
deadline_seconds = 600
minimum_ready = "95%"
"""


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    return path


def test_every_key_is_read(tmp_path: Path) -> None:
    plan = load_plan(write(tmp_path, FULL))
    assert [wish.reference.familiar for wish in plan.images] == [
        "debian:12",
        "localhost:5000/app:latest",
    ]
    assert plan.images[0].platforms == ()
    assert [str(platform) for platform in plan.images[1].platforms] == [
        "linux/amd64",
        "linux/arm64",
    ]
    assert plan.nodes == NodeSelection(
        {"pool": ("gpu",), "zone": ("a", "b")}, {"GPU": 1.0}, ("node-*",), True
    )
    assert plan.limits == Limits(100, 8, 3, 200_000_000)
    assert plan.failure == FailurePolicy(2, 60.0, 600.0, 0.95)
    assert plan.waves == (Wave(count=1), Wave(fraction=0.1), Wave(fraction=1.0))
    assert plan.deliver == ("containerd", "podman")
    assert plan.lock == "images.lock"


def test_arguments_alone_make_a_plan_and_win_over_the_file(tmp_path: Path) -> None:
    plan = load_plan(None, references=["debian", "docker.io/library/debian:latest"])
    assert plan == PrewarmPlan(images=plan.images)
    assert len(plan.images) == 1
    overrides = {"limits.fan_out": 2, "lock": "other", "waves": None, "failure.tries": 9}
    merged = load_plan(write(tmp_path, FULL), references=["nginx"], overrides=overrides)
    assert len(merged.images) == 3
    assert (merged.limits.fan_out, merged.limits.origin_connections) == (2, 8)
    assert (merged.lock, merged.failure.tries, len(merged.waves)) == ("other", 9, 3)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("", "images", id="no image"),
        pytest.param("images = 'a'", "images", id="images is no list"),
        pytest.param("images = [1]", "images[0]", id="an image that is no text"),
        pytest.param("images = ['a', 'UPPER']", "images[1]", id="no reference"),
        pytest.param("images = ['oci:/srv/x']", "images[0]", id="an image on disk"),
        pytest.param("images = [{}]", "images[0]", id="a table without reference"),
        pytest.param(
            "images = [{reference='a', platform='b'}]", "images[0].platform", id="unknown in image"
        ),
        pytest.param(
            "images = [{reference='a', platforms=['a/b/c/d']}]",
            "images[0].platforms",
            id="no platform",
        ),
        pytest.param(
            "images = ['a', {reference='a', platforms=['linux/arm64']}]",
            "images[1]",
            id="twice with other platforms",
        ),
        pytest.param("images = ['a']\nwave = [1]", "wave", id="unknown key"),
        pytest.param("images = ['a']\nnodes = 1", "[nodes]", id="a section that is no table"),
        pytest.param("images = ['a']\n[nodes]\nlabel = {}", "nodes.label", id="unknown in nodes"),
        pytest.param(
            "images = ['a']\n[nodes]\nlabels = {a = 1}", "nodes.labels.a", id="label is no text"
        ),
        pytest.param(
            "images = ['a']\n[nodes]\nlabels = {a = []}", "nodes.labels.a", id="label without value"
        ),
        pytest.param(
            "images = ['a']\n[nodes]\nresources = {GPU = 'x'}", "nodes.resources.GPU", id="amount"
        ),
        pytest.param("images = ['a']\n[nodes]\nnames = 'x'", "nodes.names", id="names no list"),
        pytest.param(
            "images = ['a']\n[nodes]\nexclude_head = 1", "nodes.exclude_head", id="no flag"
        ),
        pytest.param(
            "images = ['a']\n[limits]\nfan_out = 0", "limits.fan_out", id="fan-out too small"
        ),
        pytest.param(
            "images = ['a']\n[limits]\nnodes_at_once = true", "limits.nodes_at_once", id="a bool"
        ),
        pytest.param(
            "images = ['a']\n[limits]\nbandwidth = '1Gb/s'", "limits.bandwidth", id="bits or bytes"
        ),
        pytest.param("images = ['a']\n[limits]\nbandwidth = -1", "limits.bandwidth", id="negative"),
        pytest.param(
            "images = ['a']\n[failure]\nminimum_ready = 95", "failure.minimum_ready", id="over 1"
        ),
        pytest.param(
            "images = ['a']\n[failure]\nminimum_ready = '101%'", "failure.minimum_ready", id="101%"
        ),
        pytest.param(
            "images = ['a']\n[failure]\nnode_timeout_seconds = 0",
            "failure.node_timeout_seconds",
            id="no time",
        ),
        pytest.param(
            "images = ['a']\n[failure]\ndeadline_seconds = inf",
            "failure.deadline_seconds",
            id="infinite",
        ),
        pytest.param("images = ['a']\nwaves = 1", "waves", id="waves no list"),
        pytest.param("images = ['a']\nwaves = ['x']", "waves[0]", id="no percentage"),
        pytest.param("images = ['a']\nwaves = ['0%']", "waves[0]", id="zero percent"),
        pytest.param("images = ['a']\nwaves = [0]", "waves[0]", id="zero nodes"),
        pytest.param("images = ['a']\nwaves = [5, 5]", "waves[1]", id="no growth"),
        pytest.param("images = ['a']\nwaves = ['9%', '8%']", "waves[1]", id="shrinking"),
        pytest.param("images = ['a']\ndeliver = ['rkt']", "deliver", id="unknown runtime"),
        pytest.param("images = ['a']\nlock = 1", "lock", id="lock is no text"),
        pytest.param(
            f"images = ['a']\n[limits]\nbandwidth = '{'9' * 400}MB/s'",
            "limits.bandwidth",
            id="a rate larger than a float",
        ),
        pytest.param(
            "images = ['a']\n[failure]\ndeadline_seconds = 1e300",
            "failure.deadline_seconds",
            id="longer than any time",
        ),
        pytest.param(
            f"images = ['a']\n[failure]\nnode_timeout_seconds = 1{'0' * 400}",
            "64 bits",
            id="a number larger than a float",
        ),
        pytest.param(f"images = ['a']\nwaves = [0x{'f' * 5000}]", "64 bits", id="too large"),
        pytest.param(f"tries = 1{'0' * 5000}", "64 bits", id="more digits than Python reads"),
        pytest.param(f"images = {'[' * 5000}", "nested", id="nested too deeply"),
        pytest.param(f"a{'.a' * 5000} = 1", "nested", id="nested too deeply by a name"),
        pytest.param("images = ", "TOML", id="not TOML"),
        pytest.param("images = ['a']\n#\udcff", "TOML", id="not UTF-8"),
    ],
)
def test_a_bad_key_is_named(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UsageError) as caught:
        load_plan(path)
    assert named in caught.value.reason
    assert caught.value.subject == str(path)


def test_a_missing_file_is_a_usage_error(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="cannot read the plan"):
        load_plan(tmp_path / "none.toml")


def test_a_plan_may_be_a_link_or_a_pipe(tmp_path: Path) -> None:
    """As in the volume of a ConfigMap, or from a shell's <(…)."""
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "plan.toml").write_text('images = ["debian:12"]')
    (tmp_path / "plan.toml").symlink_to("data/plan.toml")
    linked = load_plan(tmp_path / "plan.toml")
    reader, writer = os.pipe()
    os.write(writer, b'images = ["debian:12"]')
    os.close(writer)
    with open(reader) as pipe:
        assert load_plan(Path(f"/dev/fd/{pipe.fileno()}")).images == linked.images
    with pytest.raises(UsageError, match="cannot read the plan: Is a directory"):
        load_plan(tmp_path)
    (tmp_path / "large").write_bytes(b"#" * (PLAN_LIMIT + 1))
    with pytest.raises(UsageError, match="larger than"):
        load_plan(tmp_path / "large")


def test_a_lock_file_behind_a_link_stays_there(tmp_path: Path) -> None:
    (tmp_path / "repository").mkdir()
    link = tmp_path / "images.lock"
    link.symlink_to("repository/images.lock")
    write_lock(link, LOCK)
    assert link.is_symlink()
    assert read_lock(link) == read_lock(tmp_path / "repository" / "images.lock") == LOCK


def test_an_override_of_a_broken_section_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="limits"):
        load_plan(write(tmp_path, "images=['a']\nlimits=1"), overrides={"limits.fan_out": 2})


@pytest.mark.parametrize(
    "key",
    ["limits.bandwidth", "limits.fan_out", "failure.node_timeout_seconds", "failure.tries"],
)
def test_a_number_beyond_all_measure_is_named(key: str) -> None:
    """As an option or from Python: a file has none."""
    with pytest.raises(UsageError, match=key):
        load_plan(None, references=["a"], overrides={key: 10**400})


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        pytest.param(1000, 1000, id="number"),
        pytest.param("1000", 1000, id="digits"),
        pytest.param("1.5MB", 1_500_000, id="decimal"),
        pytest.param("100 MiB/s", 100 << 20, id="binary"),
        pytest.param("2g", 2 * 10**9, id="short"),
    ],
)
def test_bandwidth(value: object, expected: int) -> None:
    plan = parse_plan({"images": ["a"], "limits": {"bandwidth": value}}, "test")
    assert plan.limits.bandwidth == expected


GPU = NodeFacts("n1", "id1", "10.0.0.1", {"pool": "gpu", "zone": "a"}, {"GPU": 8.0, "x": 0.5})
HEAD = NodeFacts("head", "id0", "10.0.0.2", {}, {"CPU": 4.0}, is_head=True)


@pytest.mark.parametrize(
    ("table", "names"),
    [
        pytest.param({}, ["n1", "head"], id="all"),
        pytest.param({"exclude_head": True}, ["n1"], id="no head"),
        pytest.param({"labels": {"pool": "gpu"}}, ["n1"], id="label"),
        pytest.param({"labels": {"pool": ["cpu", "gpu"]}}, ["n1"], id="alternatives"),
        pytest.param({"labels": {"pool": "gpu", "zone": "b"}}, [], id="every label"),
        pytest.param({"resources": ["x"]}, ["n1"], id="any amount"),
        pytest.param({"resources": {"GPU": 16}}, [], id="too little"),
        pytest.param({"names": ["id0"]}, ["head"], id="by ID"),
        pytest.param({"names": ["10.0.0.*"]}, ["n1", "head"], id="by address"),
        pytest.param({"names": ["n?", "other"]}, ["n1"], id="pattern"),
    ],
)
def test_nodes_are_selected(table: dict[str, object], names: list[str]) -> None:
    selection = parse_plan({"images": ["a"], "nodes": table}, "test").nodes
    assert [node.name for node in (GPU, HEAD) if selection.takes(node)] == names


def test_brackets_in_a_name_are_a_set_of_characters() -> None:
    node = NodeFacts("gpu[0]", "id", "10.0.0.1")
    assert not NodeSelection(names=("gpu[0]",)).takes(node)
    assert NodeSelection(names=("gpu[[]0]",)).takes(node)
    assert NodeSelection(names=("gpu[01]",)).takes(NodeFacts("gpu1", "id", "10.0.0.1"))


def test_names_that_no_node_has_are_told() -> None:
    assert NodeSelection(names=("n1", "x*")).unmatched([GPU, HEAD]) == ("x*",)


@pytest.mark.parametrize(
    ("wished", "node", "expected"),
    [
        pytest.param([], "linux/arm64", "linux/arm64", id="its own"),
        pytest.param(["linux/amd64", "linux/arm64"], "linux/arm64", "linux/arm64", id="of two"),
        pytest.param(["linux/386", "linux/amd64"], "linux/amd64", "linux/amd64", id="the better"),
        pytest.param(["linux/386"], "linux/amd64", "linux/386", id="a lesser one"),
        pytest.param(["linux/arm64"], "linux/amd64", None, id="none"),
    ],
)
def test_each_node_gets_the_platform_that_suits_it(
    wished: list[str], node: str, expected: str | None
) -> None:
    document = {"images": [{"reference": "a", "platforms": wished}]}
    (wish,) = parse_plan(document, "test").images
    found = wish.for_node(Platform.parse(node))
    assert (found and found.normalized()) == (expected and Platform.parse(expected).normalized())


@pytest.mark.parametrize(
    ("waves", "nodes", "expected"),
    [
        pytest.param([], 7, [7], id="none is one"),
        pytest.param([1, "10%", "100%"], 1000, [1, 99, 900], id="usual"),
        pytest.param([1, "10%", "100%"], 3, [1, 2], id="few nodes: no empty wave"),
        pytest.param([5, "10%"], 20, [5, 15], id="a smaller one adds nothing"),
        pytest.param(["50%"], 3, [2, 1], id="rounded up, and the rest"),
        pytest.param([10], 4, [4], id="more than there are"),
        pytest.param(["14%"], 50, [7, 43], id="no rounding error"),
        pytest.param([1], 0, [], id="no nodes"),
    ],
)
def test_waves(waves: list[object], nodes: int, expected: list[int]) -> None:
    plan = parse_plan({"images": ["a"], "waves": waves}, "test")
    assert [len(wave) for wave in expand_waves(plan.waves, nodes)] == expected


@given(
    waves=st.lists(
        st.one_of(
            st.builds(Wave, count=st.integers(1, 50)),
            st.builds(Wave, fraction=st.floats(0.001, 1)),
        ),
        max_size=5,
    ),
    nodes=st.integers(0, 60),
)
@settings(max_examples=60, deadline=None)
def test_waves_are_a_partition(waves: list[Wave], nodes: int) -> None:
    expanded = expand_waves(waves, nodes)
    assert [number for wave in expanded for number in wave] == list(range(nodes))
    assert all(expanded)


@pytest.mark.parametrize(
    ("fraction", "ready", "nodes", "enough"),
    [
        pytest.param(1.0, 3, 4, False, id="all"),
        pytest.param(0.75, 3, 4, True, id="three quarters"),
        pytest.param(0.95, 94, 100, False, id="one short"),
        pytest.param(0.95, 95, 100, True, id="just enough"),
        pytest.param(0.0, 0, 4, True, id="none needed"),
    ],
)
def test_minimum_ready(fraction: float, ready: int, nodes: int, enough: bool) -> None:
    assert FailurePolicy(minimum_ready=fraction).is_enough(ready, nodes) is enough


def image(name: str, content: str, **manifests: str) -> LockedImage:
    return LockedImage(
        Reference.parse(name),
        Digest.of(content.encode()),
        "application/vnd.oci.image.index.v1+json",
        123,
        {f"linux/{key}": Digest.of(value.encode()) for key, value in manifests.items()},
    )


LOCK = lock(
    [image("nginx", "1", amd64="a", arm64="b"), image("localhost:5000/app:v1", "2")],
    tool="stowray 0.1",
    created="2026-11-24T05:00:00Z",
)


def test_a_lock_file_is_what_was_written(tmp_path: Path) -> None:
    path = tmp_path / "images.lock"
    assert read_lock(path) is None
    write_lock(path, LOCK)
    assert read_lock(path) == LOCK
    assert path.read_text() == encode_lock(LOCK)
    found = LOCK.find(Reference.parse("docker.io/library/nginx:latest"))
    assert found is not None
    assert found.pinned.target == Digest.of(b"1")
    assert LOCK.find(Reference.parse("other")) is None


def test_the_order_of_images_changes_nothing() -> None:
    images = list(LOCK.images.values())
    again = LockFile(
        {image.reference.canonical: image for image in reversed(images)}, LOCK.tool, LOCK.created
    )
    assert encode_lock(again) == encode_lock(LOCK)


def test_drift() -> None:
    now = [image("nginx", "1", amd64="a", arm64="changed", s390x="new")]
    assert drift(LOCK, LOCK.images.values()) == ()
    assert drift(LOCK, now) == (
        Drift(
            "docker.io/library/nginx:latest",
            "linux/arm64",
            Digest.of(b"b"),
            now[0].manifests["linux/arm64"],
        ),
        Drift("localhost:5000/app:v1", "", Digest.of(b"2"), ""),
    )
    (moved,) = drift(LOCK, [image("nginx", "new", amd64="a"), image("localhost:5000/app:v1", "2")])
    assert (moved.locked, moved.now) == (Digest.of(b"1"), Digest.of(b"new"))
    assert str(moved).startswith("docker.io/library/nginx:latest: locked sha256:")


VALID = encode_lock(LOCK)
DIGEST = Digest.of(b"1")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("version = ", "TOML", id="not TOML"),
        pytest.param("", "version", id="no version"),
        pytest.param("version = 2", "version", id="from a newer release"),
        pytest.param("version = 1\nimages = 1", "images", id="images no list"),
        pytest.param("version = 1\nimages = [1]", "images[0]", id="image no table"),
        pytest.param("version = 1\n[[images]]", "images[0].reference", id="no reference"),
        pytest.param("version = 1\n[[images]]\nreference='a'", "images[0].digest", id="no digest"),
        pytest.param(
            "version = 1\n[[images]]\nreference='a'\ndigest='sha256:1'", "images[0]", id="digest"
        ),
        pytest.param(
            f"version = 1\n[[images]]\nreference='a'\ndigest='{DIGEST}'\nmanifests=1",
            "images[0].manifests",
            id="manifests no table",
        ),
        pytest.param(
            f"version = 1\n[[images]]\nreference='a'\ndigest='{DIGEST}'\nsize=-1",
            "images[0].size",
            id="size",
        ),
        pytest.param(
            f"version = 1\n[[images]]\nreference='a'\ndigest='{DIGEST}'\nmedia_type=1",
            "images[0].media_type",
            id="media type",
        ),
        pytest.param(
            f"version = 1\n[[images]]\nreference='a'\ndigest='{DIGEST}'\n"
            f"[[images]]\nreference='a:latest'\ndigest='{DIGEST}'",
            "images[1]",
            id="twice",
        ),
        pytest.param("version = 1\ntool = 1", "tool", id="tool"),
        pytest.param(f"version = 0x{'f' * 5000}", "TOML", id="larger than Python writes"),
        pytest.param(f"version = 1{'0' * 5000}", "TOML", id="more digits than Python reads"),
        pytest.param(f"version = {'[' * 5000}", "TOML", id="nested too deeply"),
    ],
)
def test_a_damaged_lock_file_is_refused(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        decode_lock(text, "images.lock")
    assert caught.value.subject == "images.lock"
    assert named in caught.value.reason


def test_an_unreadable_lock_file_is_a_usage_error(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\xff")
    with pytest.raises(UsageError, match="TOML"):
        read_lock(tmp_path / "binary")
    with pytest.raises(UsageError, match="Is a directory"):
        read_lock(tmp_path)
    with pytest.raises(UsageError, match="cannot read"):
        read_lock(tmp_path / "binary" / "below")


def test_a_lock_file_that_cannot_be_written_is_a_storage_error(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="lock file"):
        write_lock(tmp_path / "none" / "images.lock", LOCK)
