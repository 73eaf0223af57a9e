from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from stowray.pipeline.errors import UsageError
from stowray.pipeline.reference import Reference
from stowray.pipeline.registries_conf import Entry, RegistriesConf, load, parse_conf

if TYPE_CHECKING:
    from pathlib import Path

DIGEST = "sha256:" + "a" * 64


@pytest.mark.parametrize(
    ("prefix", "name", "matches"),
    [
        ("r.io", "r.io/a:1", True),
        ("r.io", "r.io:5000/a:1", False),
        ("r.io", "r.io.example/a", False),
        ("r.io:5000", "r.io:5000/a", True),
        ("r.io/a", "r.io/a:1", True),
        ("r.io/a", "r.io/a/b", True),
        ("r.io/a", "r.io/ab", False),
        ("r.io/a:1", "r.io/a:1", True),
        ("r.io/a:1", "r.io/a:12", False),
        ("r.io/a:1", f"r.io/a:1@{DIGEST}", True),
        (f"r.io/a@{DIGEST}", f"r.io/a@{DIGEST}", True),
        ("docker.io/library", "debian", True),
        ("docker.io/debian", "debian", False),
        ("*.example.com", "a.example.com/x", True),
        ("*.example.com", "a.b.example.com/x", True),
        ("*.example.com", "a.example.com:5000/x", True),
        ("*.example.com", "example.com/x", False),
        ("*.example.com", "badexample.com/x", False),
        ("*.example.com", "r.io/a.example.com/x", False),
    ],
)
def test_prefixes(prefix: str, name: str, matches: bool) -> None:
    assert bool(Entry(prefix).matched(Reference.parse(name))) is matches


def test_the_longest_prefix_wins_and_it_alone() -> None:
    conf = RegistriesConf(
        parse_conf(
            """
            [[registry]]
            prefix = "*.example.com"
            blocked = true
            [[registry]]
            location = "a.example.com"
            insecure = true
            [[registry]]
            location = "a.example.com/team/app"
            [[registry]]
            location = "a.example.com/team"
            blocked = true
            """,
            "file",
        )
    )

    def prefix(name: str) -> str | None:
        entry = conf.find(Reference.parse(name))
        return entry and entry.prefix

    assert prefix("a.example.com/x") == "a.example.com"
    assert prefix("a.example.com/team/app:1") == "a.example.com/team/app"
    assert prefix("a.example.com/team/apple") == "a.example.com/team"
    assert prefix("b.example.com/x") == "*.example.com"
    assert prefix("r.io/x") is None


@pytest.mark.parametrize(
    ("prefix", "location", "name", "moved"),
    [
        ("r.io", "m.io:5000", "r.io/a/b:1", "m.io:5000/a/b:1"),
        ("r.io/a", "m.io/copy/of", "r.io/a/b:1", "m.io/copy/of/b:1"),
        ("r.io/a/b", "m.io/x", f"r.io/a/b@{DIGEST}", f"m.io/x@{DIGEST}"),
        ("r.io/a:1", "m.io/a:old", "r.io/a:1", "m.io/a:old"),
        ("*.example.com", "m.io/copy", "a.example.com/x:1", "m.io/copy/x:1"),
        ("*.example.com", "m.io/copy", "a.example.com:5000/x:1", "m.io/copy/x:1"),
        ("docker.io", "index.docker.io/mine", "debian:12", "docker.io/mine/library/debian:12"),
        ("r.io", "", "r.io/a:1", "r.io/a:1"),
        ("r.io", "mirror/r.io", "r.io/a:1", "mirror/r.io/a:1"),
    ],
)
def test_locations(prefix: str, location: str, name: str, moved: str) -> None:
    found = Entry(prefix, location).relocated(Reference.parse(name), location)
    tag = f":{found.tag}" if found.digest is None else f"@{found.digest}"
    assert f"{found.registry}/{found.repository}{tag}" == moved


@pytest.mark.parametrize("location", ["M.IO/UPPER", "m.io/a b", "m.io", "m.io/a@sha256:00"])
def test_a_location_that_makes_no_name_is_named(location: str) -> None:
    with pytest.raises(UsageError) as caught:
        Entry("r.io/a", location, file="conf").relocated(Reference.parse("r.io/a:1"), location)
    assert location in str(caught.value)


@pytest.mark.parametrize(
    ("use", "by_tag", "by_digest"),
    [
        ("", True, True),
        ("all", True, True),
        ("digest-only", False, True),
        ("tag-only", True, False),
    ],
)
def test_which_references_a_mirror_serves(use: str, by_tag: bool, by_digest: bool) -> None:
    (entry,) = parse_conf(
        f"""
        [[registry]]
        location = "r.io"
        [[registry.mirror]]
        location = "m.io"
        pull-from-mirror = "{use}"
        """,
        "file",
    )
    (mirror,) = entry.mirrors
    assert mirror.serves(Reference.parse("r.io/a:1")) is by_tag
    assert mirror.serves(Reference.parse(f"r.io/a@{DIGEST}")) is by_digest
    assert mirror.serves(Reference.parse(f"r.io/a:1@{DIGEST}")) is by_digest


def test_mirror_by_digest_only_holds_for_all_mirrors() -> None:
    (entry,) = parse_conf(
        """
        [[registry]]
        location = "r.io"
        mirror-by-digest-only = true
        [[registry.mirror]]
        location = "m.io"
        [[registry.mirror]]
        location = "n.io"
        insecure = true
        """,
        "file",
    )
    assert [(mirror.location, mirror.use, mirror.insecure) for mirror in entry.mirrors] == [
        ("m.io", "digest-only", False),
        ("n.io", "digest-only", True),
    ]


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("[[registry]", "TOML", id="not TOML"),
        pytest.param(f"server = {'[' * 5000}", "TOML", id="nested too deeply"),
        pytest.param("[registries.search]\nregistries = ['r.io']", "version 1", id="version 1"),
        pytest.param("registry = 1", "[[registry]]", id="no tables"),
        pytest.param("[[registry]]\nblocked = true", "neither", id="no prefix"),
        pytest.param("[[registry]]\nprefix = 1", "prefix", id="prefix is no string"),
        pytest.param("[[registry]]\nprefix = 'a.*.io'", "a.*.io", id="star in the middle"),
        pytest.param("[[registry]]\nprefix = '*.a.io/x'", "*.a.io/x", id="star and a path"),
        pytest.param("[[registry]]\nprefix = '*a.io'", "*a.io", id="star without a dot"),
        pytest.param(
            "[[registry]]\nprefix = 'a.io'\nlocation = '*.b.io'", "*.b.io", id="star in a location"
        ),
        pytest.param("[[registry]]\nlocation = 'https://a.io'", "scheme", id="scheme"),
        pytest.param("[[registry]]\nlocation = 'a.io'\nblocked = 1", "blocked", id="flag"),
        pytest.param("[[registry]]\nlocation = 'a.io'\nmirror = 1", "mirror", id="mirror"),
        pytest.param(
            "[[registry]]\nlocation = 'a.io'\n[[registry.mirror]]\ninsecure = true",
            "no location",
            id="mirror without a location",
        ),
        pytest.param(
            "[[registry]]\nlocation = 'a.io'\n[[registry.mirror]]\nlocation = 'm.io'\n"
            "pull-from-mirror = 'never'",
            "pull-from-mirror",
            id="unknown use",
        ),
        pytest.param(
            "[[registry]]\nlocation = 'a.io'\nmirror-by-digest-only = true\n"
            "[[registry.mirror]]\nlocation = 'm.io'\npull-from-mirror = 'all'",
            "mirror-by-digest-only",
            id="both kinds of use",
        ),
        pytest.param(
            "[[registry]]\nlocation = 'a.io'\nblocked = true\n"
            "[[registry]]\nprefix = 'a.io'\nlocation = 'b.io'",
            "a.io",
            id="blocked and not",
        ),
        pytest.param(
            "[[registry]]\nlocation = 'a.io'\n[[registry]]\nlocation = 'a.io'\ninsecure = true",
            "insecure",
            id="insecure and not",
        ),
    ],
)
def test_what_cannot_be_understood_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse_conf(text, "the-file")
    assert named in str(caught.value)
    assert "the-file" in str(caught.value)


def test_of_two_entries_of_one_file_the_first_counts() -> None:
    text = "[[registry]]\nprefix = 'a.io'\nlocation = '{}'\n"
    (entry,) = parse_conf(text.format("b.io") + text.format("c.io"), "file")
    assert entry.location == "b.io"


def test_what_is_not_about_places_is_left_alone() -> None:
    text = """
    unqualified-search-registries = ["a.io"]
    short-name-mode = "enforcing"
    credential-helpers = ["x"]
    [aliases]
    "app" = "a.io/app"
    """
    assert parse_conf(text, "file") == ()


def write(path: Path, location: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"[[registry]]\nprefix = 'r.io'\nlocation = '{location}'\n")
    return path


def location(conf: RegistriesConf) -> str | None:
    entry = conf.find(Reference.parse("r.io/a"))
    return entry and entry.location


def test_drop_ins_replace_entries_of_the_same_prefix(tmp_path: Path) -> None:
    file = write(tmp_path / "registries.conf", "first.io")
    write(tmp_path / "registries.conf.d" / "20.conf", "last.io")
    write(tmp_path / "registries.conf.d" / "10.conf", "second.io")
    write(tmp_path / "registries.conf.d" / "30.txt", "not-read.io")
    conf = load(str(file), {})
    assert location(conf) == "last.io"
    assert len(conf.entries) == 1


def test_nothing_is_read_unless_it_is_asked_for(tmp_path: Path) -> None:
    home = {"HOME": str(tmp_path)}
    write(tmp_path / ".config" / "containers" / "registries.conf", "own.io")
    variable = write(tmp_path / "v.conf", "variable.io")
    setting = write(tmp_path / "s.conf", "setting.io")
    named = {**home, "CONTAINERS_REGISTRIES_CONF": str(variable)}
    assert load("", home).entries == ()
    assert location(load("system", home)) == "own.io"
    assert location(load("", named)) == "variable.io"
    assert location(load("system", named)) == "variable.io"
    assert location(load(str(setting), named)) == "setting.io"


def test_a_file_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.conf"):
        load(str(tmp_path / "none.conf"), {})
    with pytest.raises(UsageError, match=r"none\.conf"):
        load("", {"CONTAINERS_REGISTRIES_CONF": str(tmp_path / "none.conf")})
