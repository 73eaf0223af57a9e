from __future__ import annotations

from pathlib import Path

import pytest

from stowray.pipeline.endpoint import Connection
from stowray.pipeline.errors import UsageError
from stowray.pipeline.hosts_toml import (
    ALL,
    find_certificates,
    find_hosts,
    parse_duration,
    parse_hosts,
)

PLACE = Path("/etc/hosts.d/docker.io")


def parse(text: str):
    return parse_hosts(text, PLACE)


def write(directory: Path, name: str, text: str = "") -> Path:
    (directory / name).mkdir()
    if text:
        (directory / name / "hosts.toml").write_text(text)
    return directory / name


def test_hosts_keep_the_order_of_the_file_and_the_server_is_last() -> None:
    found = parse(
        """
        server = "https://registry-1.docker.io"
        [host."https://z.example.com"]
        [host."https://a.example.com:5000"]
        [host."http://m.example.com"]
        """
    )
    assert [(host.scheme, host.address) for host in found.hosts] == [
        ("https", "z.example.com"),
        ("https", "a.example.com:5000"),
        ("http", "m.example.com"),
    ]
    assert (found.server.scheme, found.server.address) == ("https", "registry-1.docker.io")


def test_a_file_without_a_server_means_the_registry_itself() -> None:
    found = parse('skip_verify = true\ncapabilities = ["pull"]\n[host."https://m"]\n')
    assert found.server.address == ""
    assert found.server.connection.skip_verify
    # As in containerd: its capabilities are for a server that the file names.
    assert found.server.capabilities == ALL


@pytest.mark.parametrize(
    ("url", "override", "path"),
    [
        ("https://m", False, "/v2"),
        ("https://m/", False, "/v2"),
        ("https://m/v2", False, "/v2"),
        ("https://m/v2/", False, "/v2"),
        ("https://m/v2/mirror", False, "/v2/mirror/v2"),
        ("https://m/v2/mirror", True, "/v2/mirror"),
        ("https://m/cache", True, "/cache"),
        ("https://m", True, ""),
        ("m.example.com:5000", False, "/v2"),
    ],
)
def test_the_path_of_the_api(url: str, override: bool, path: str) -> None:
    (host,) = parse(f'[host."{url}"]\noverride_path = {str(override).lower()}').hosts
    assert host.path == path
    assert host.scheme == "https"


@pytest.mark.parametrize(
    ("line", "capabilities"),
    [
        ("", ALL),
        ("capabilities = []", ALL),
        ('capabilities = ["pull"]', {"pull"}),
        ('capabilities = ["Pull", "RESOLVE"]', {"pull", "resolve"}),
        ('capabilities = ["push"]', {"push"}),
        ('capabilities = ["pull", "referrers"]', {"pull", "referrers"}),
    ],
)
def test_capabilities(line: str, capabilities: frozenset[str]) -> None:
    (host,) = parse(f'[host."https://m"]\n{line}').hosts
    assert host.capabilities == capabilities


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ('ca = "a.pem"', Connection(ca_files=(f"{PLACE}/a.pem",))),
        ('ca = "/abs/a.pem"', Connection(ca_files=("/abs/a.pem",))),
        ('ca = ["a.pem", "/b.pem"]', Connection(ca_files=(f"{PLACE}/a.pem", "/b.pem"))),
        ('client = "c.pem"', Connection(client_pairs=((f"{PLACE}/c.pem", ""),))),
        ('client = ["/c", "/d"]', Connection(client_pairs=(("/c", ""), ("/d", "")))),
        (
            'client = [["/c.cert", "k.key"], ["/d.pem", ""]]',
            Connection(client_pairs=(("/c.cert", f"{PLACE}/k.key"), ("/d.pem", ""))),
        ),
        ("skip_verify = true", Connection(skip_verify=True)),
        ('dial_timeout = "1m1.5s"', Connection(connect_seconds=61.5)),
        ('dial_timeout = ""', Connection()),
        ('proxy = "http://p:3128"', Connection(proxy="http://p:3128")),
        ("later_key = 1\nrewrite = {}", Connection()),
    ],
)
def test_how_a_host_is_reached(line: str, expected: Connection) -> None:
    (host,) = parse(f'[host."https://m"]\n{line}').hosts
    assert host.connection == expected
    assert parse(line).server.connection == expected


def test_headers_have_one_or_several_values_and_do_not_show_themselves() -> None:
    (host,) = parse(
        '[host."https://m".header]\nx-key = "sesame-open"\nx-more = ["one", "two"]'
    ).hosts
    assert host.headers == (("x-key", "sesame-open"), ("x-more", "one"), ("x-more", "two"))
    assert "sesame" not in repr(host)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        pytest.param("server = ", "TOML", id="not TOML"),
        pytest.param(f"server = {'[' * 5000}", "TOML", id="nested too deeply"),
        pytest.param("server = 1", "server", id="server is no string"),
        pytest.param("host = 1", "host", id="host is no table"),
        pytest.param('[host]\n"https://m" = 1', "https://m", id="one host is no table"),
        pytest.param('[host."ftp://m"]', "ftp://m", id="scheme"),
        pytest.param('[host."https://"]', "https://", id="no host"),
        pytest.param('[host."https://m:x"]', "https://m:x", id="port"),
        pytest.param('[host."https://m?a=b"]', "a=b", id="query"),
        pytest.param('capabilities = ["fly"]', "fly", id="capability"),
        pytest.param("capabilities = [1]", "capabilities", id="capability is no string"),
        pytest.param("ca = 1", "ca", id="ca"),
        pytest.param("client = 1", "client", id="client"),
        pytest.param('client = [["a"]]', "client", id="half a pair"),
        pytest.param('skip_verify = "yes"', "skip_verify", id="flag"),
        pytest.param("dial_timeout = 1", "dial_timeout", id="number for a duration"),
        pytest.param('dial_timeout = "1"', "dial_timeout", id="duration without a unit"),
        pytest.param('dial_timeout = "-1s"', "dial_timeout", id="negative duration"),
        pytest.param('proxy = "socks5://p"', "proxy", id="proxy"),
        pytest.param("header = 1", "header", id="header"),
        pytest.param('[header]\n"a b" = "x"', "a b", id="header name"),
        pytest.param('[header]\nhost = "x"', "host", id="header of ours"),
        pytest.param('[header]\nx = "a\\r\\nb: c"', "header x", id="header injection"),
    ],
)
def test_what_cannot_be_understood_is_named(text: str, named: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(text)
    assert named in str(caught.value)
    assert str(PLACE) in str(caught.value)


@pytest.mark.parametrize("line", ["", "ca = 1", "override_path = 1"])
def test_a_login_in_a_url_is_refused_and_not_shown(line: str) -> None:
    with pytest.raises(UsageError) as caught:
        parse(f'[host."https://user:sesame@m"]\n{line}')
    assert "sesame" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("1s", 1), ("500ms", 0.5), ("1h2m3s", 3723), (".5s", 0.5), ("2µs", 2e-6)],
)
def test_durations(text: str, seconds: float) -> None:
    assert parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize(
    ("existing", "registry", "found"),
    [
        (["docker.io", "_default"], "docker.io", "docker.io"),
        (["_default"], "docker.io", "_default"),
        (["r.io_5000_", "r.io:5000", "_default"], "r.io:5000", "r.io_5000_"),
        (["r.io:5000", "_default"], "r.io:5000", "r.io:5000"),
        (["r.io", "_default"], "r.io:5000", "_default"),
        (["[::1]"], "[::1]", "[::1]"),
        (["[::1]_5000_"], "[::1]:5000", "[::1]_5000_"),
        (["quay.io"], "docker.io", None),
        ([], "docker.io", None),
    ],
)
def test_which_directory(
    tmp_path: Path, existing: list[str], registry: str, found: str | None
) -> None:
    for name in existing:
        write(tmp_path, name, f'server = "https://from-{existing.index(name)}"')
    hosts = find_hosts(str(tmp_path), registry)
    if found is None:
        assert hosts is None
    else:
        assert hosts is not None
        assert hosts.file == str(tmp_path / found / "hosts.toml")
        assert hosts.listed


def test_an_empty_directory_hides_the_default(tmp_path: Path) -> None:
    write(tmp_path, "_default", '[host."https://m"]')
    write(tmp_path, "docker.io")
    hosts = find_hosts(str(tmp_path), "docker.io")
    assert hosts is not None
    assert not hosts.listed
    assert hosts.hosts == ()
    assert hosts.server.connection == Connection()


def test_certificates_without_a_list_of_hosts(tmp_path: Path) -> None:
    place = write(tmp_path, "r.io:5000")
    for name in ("b.crt", "a.crt", "client.cert", "client.key", "other.key", "notes.txt"):
        (place / name).touch()
    expected = Connection(
        ca_files=(str(place / "a.crt"), str(place / "b.crt")),
        client_pairs=((str(place / "client.cert"), str(place / "client.key")),),
    )
    hosts = find_hosts(str(tmp_path), "r.io:5000")
    assert hosts is not None
    assert hosts.server.connection == expected
    assert find_certificates(str(tmp_path), "r.io:5000") == expected
    assert find_certificates(str(tmp_path), "other.io") == Connection()


def test_a_certificate_without_its_key_is_named(tmp_path: Path) -> None:
    (write(tmp_path, "r.io") / "client.cert").touch()
    with pytest.raises(UsageError, match=r"client\.key"):
        find_hosts(str(tmp_path), "r.io")


def test_a_directory_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no such directory"):
        find_hosts(str(tmp_path / "none"), "r.io")
