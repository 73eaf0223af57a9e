"""What is fuzzed: each reader of foreign or stored bytes, with what it may answer and its seeds.

Invariant: a target takes any bytes and returns, or raises one of the errors that its reader is
documented to raise (they are swallowed here); whatever else escapes is a finding. Where a reader's
answer can be checked (it parses its own output to the same, a digest's length is right, a tar's
entries fit its limits), it is.
"""

from __future__ import annotations

import atexit
import errno
import functools
import hashlib
import json
import os
import re
import shutil
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgpack

from stowray.pipeline import (
    addresses,
    answers,
    challenge,
    compress,
    documents,
    media_types,
    oci_manifest,
    policy_json,
    redact,
    registries_conf,
    retry,
    serve_range,
    strict_json,
    tokens,
)
from stowray.pipeline.credentials import Credentials
from stowray.pipeline.digest import HEX_LENGTHS, Digest
from stowray.pipeline.docker_archive import _item
from stowray.pipeline.entry_list import read_entry_list
from stowray.pipeline.errors import (
    InvalidDigestError,
    InvalidPlatformError,
    InvalidReferenceError,
    LayerError,
    ManifestError,
    StorageError,
    UsageError,
)
from stowray.pipeline.hosts_toml import parse_duration, parse_hosts
from stowray.pipeline.image import Image
from stowray.pipeline.ingeststate import LENGTH, IngestState
from stowray.pipeline.journal import Journal
from stowray.pipeline.layer import stage_layer
from stowray.pipeline.layer_trees import LayerRecord
from stowray.pipeline.layout import entries, other_entries, spell
from stowray.pipeline.limits import LayerLimits
from stowray.pipeline.lock_file import decode_lock, encode_lock
from stowray.pipeline.mountinfo import parse_mountinfo
from stowray.pipeline.overlay import ChainView
from stowray.pipeline.pax import parse as parse_pax
from stowray.pipeline.platform import Platform
from stowray.pipeline.prewarm_plan_file import parse_plan
from stowray.pipeline.probe import Capabilities
from stowray.pipeline.recordfile import decode_record, encode_record
from stowray.pipeline.records import BlobRecord, ReferenceRecord
from stowray.pipeline.reference import Reference
from stowray.pipeline.removal import remove_tree
from stowray.pipeline.runtime_spec import RunConfig, resolve_user
from stowray.pipeline.settings import load_settings
from stowray.pipeline.snapshot_record import Snapshot
from stowray.pipeline.source import parse_source
from stowray.pipeline.tar import TarReader
from stowray.pipeline.tar_entry import FILE
from stowray.pipeline.toml_text import parse_toml
from stowray.pipeline.trust import Stamp
from tests.support import tars
from tests.support.vectors import table

if TYPE_CHECKING:
    from collections.abc import Callable

CORPUS = Path(__file__).parent / "corpus"
SHA = "sha256:" + "a" * 64
LIMITS = LayerLimits(
    layer_size=1 << 20,
    unpacked_size=1 << 22,
    entries=2000,
    metadata_size=1 << 14,
    path_size=1 << 12,
    sparse_segments=256,
    window_size=1 << 20,
)
_DIGEST = re.compile(r"(sha256:[0-9a-f]{64}|sha512:[0-9a-f]{128})", re.ASCII)


@dataclass(frozen=True)
class Target:
    """One reader: how it is called, with what it begins, and what its bytes are made of."""

    name: str
    run: Callable[[bytes], None]
    seeds: tuple[bytes, ...]
    words: tuple[bytes, ...] = ()
    mend: Callable[[bytes], bytes] | None = None  # what makes a mutation worth reading on
    longest: int = 4096

    def inputs(self) -> list[bytes]:
        """Return the seeds with those that are kept on disk: former findings and new paths."""
        kept = sorted((CORPUS / self.name).glob("*")) if (CORPUS / self.name).is_dir() else []
        return [*self.seeds, *(path.read_bytes() for path in kept)]


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogateescape")


@functools.cache
def scratch() -> Path:
    """A folder in memory of this process."""
    parent = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
    path = Path(tempfile.mkdtemp(prefix="stowray-fuzz-", dir=parent))
    owner = os.getpid()

    def remove() -> None:
        if os.getpid() == owner:
            shutil.rmtree(path, ignore_errors=True)

    atexit.register(remove)
    return path


# -- names


def reference(data: bytes) -> None:
    try:
        parsed = Reference.parse(_text(data))
    except InvalidReferenceError:
        return
    assert Reference.parse(parsed.canonical).canonical == parsed.canonical
    assert Reference.parse(parsed.familiar) == Reference.parse(parsed.canonical)
    assert Reference.from_dict(parsed.to_dict()) == parsed
    assert parsed.canonical.isascii() and parsed.canonical.isprintable()
    spelled = spell(parsed.canonical)
    assert re.fullmatch(r"[A-Za-z0-9]+(?:(?:[-._:@+/]|--)[A-Za-z0-9]+)*", spelled), spelled


def source(data: bytes) -> None:
    try:
        parsed = parse_source(_text(data))
    except (InvalidReferenceError, UsageError):
        return
    assert parse_source(parsed.canonical).canonical == parsed.canonical


def digest(data: bytes) -> None:
    text = _text(data)
    good = _DIGEST.fullmatch(text) is not None and not text.endswith("\n")
    try:
        parsed = Digest(text)
    except InvalidDigestError:
        assert not good, text
        return
    assert good, text
    assert len(parsed.encoded) == HEX_LENGTHS[parsed.algorithm]


def platform(data: bytes) -> None:
    try:
        parsed = Platform.parse(_text(data))
    except InvalidPlatformError:
        return
    assert Platform.parse(str(parsed)).normalized() == parsed.normalized()
    assert parsed.normalized().accepts(parsed.normalized())
    Platform.host("x86_64").rank(parsed)
    assert Platform.from_dict(parsed.to_dict()) == parsed


# -- documents


def document(data: bytes) -> None:
    try:
        parsed = documents.parse_document(data, "", SHA)
    except ManifestError:
        return
    for served in (media_types.OCI_INDEX, media_types.OCI_MANIFEST):
        try:
            documents.parse_document(data, served, SHA)
        except ManifestError:
            continue
    documents.detect_media_type(data)
    if isinstance(parsed, documents.Manifest):
        try:
            documents.check_image(parsed, SHA)
        except ManifestError:
            return
        twin = oci_manifest.oci_twin(data, parsed.media_type)
        if twin is not None:
            again = documents.parse_document(twin, "", SHA)
            assert isinstance(again, documents.Manifest)
            assert [part.digest for part in again.layers] == [part.digest for part in parsed.layers]


def config(data: bytes) -> None:
    try:
        parsed = documents.parse_config(data, SHA)
        run = RunConfig.parse(parsed.document(), SHA)
        resolve_user(run.user, b"root:x:0:0::/:/bin/sh\na:x:1:1::/:\n", b"root:x:0:\n", SHA)
    except ManifestError:
        return


def layout_index(data: bytes) -> None:
    try:
        documents.parse_layout_index(data, "index.json")
    except ManifestError:
        return


def json_object(data: bytes) -> None:
    try:
        parsed = strict_json.parse_object(data)
    except strict_json.JSONError:
        return
    json.dumps(parsed).encode("utf-8")
    assert json.loads(data).keys() == parsed.keys()


def archive_list(data: bytes) -> None:
    try:
        rows = strict_json.parse(data)
        for row in rows if isinstance(rows, list) else ():
            _item(row)
    except (strict_json.JSONError, ManifestError):
        return


# -- answers of registries


def challenges(data: bytes) -> None:
    text = data.decode("latin-1")
    parsed = challenge.parse(text.split("\n"))
    challenge.choose(parsed)
    for one in parsed:
        assert one.scheme == one.scheme.lower()
        tokens.merge_scopes(tokens.parse_scopes(one.parameters.get("scope", "")))


def headers(data: bytes) -> None:
    text = data.decode("latin-1")
    found = answers.parse_content_range(text)
    assert found is None or found.first <= found.last
    answers.parse_unsatisfied(text)
    assert "\n" not in answers.parse_warning(text)
    seconds = retry.retry_after(text, 1_700_000_000.0)
    assert seconds is None or 0 < seconds <= retry.RETRY_AFTER_LIMIT
    for size in (0, 1, 1000):
        try:
            part = serve_range.requested_part(text, None, '"x"', size)
        except serve_range.UnsatisfiableRangeError:
            continue
        assert part is None or 0 <= part.start < part.start + part.length <= size
    try:
        length = answers.parse_length([text])
    except ValueError:
        return
    assert length is not None and length >= 0


def answer(data: bytes) -> None:
    code, message = answers.describe(data)
    assert len(code) + len(message) < 1 << 17
    shown = redact.redact_text(message, ("secret",))
    assert all(character.isprintable() for character in shown), shown
    redact.redact_url(_text(data))
    redact.public_url(_text(data))
    redact.query_secrets(_text(data))
    try:
        token = tokens.parse_answer(data)
    except ValueError:
        return
    assert token.value.isascii()


def address(data: bytes) -> None:
    url = data.decode("latin-1")
    for refusal in (addresses.refusal, addresses.realm_refusal):
        try:
            refusal(url, registry="example.org", scheme="https")
        except ValueError:
            continue
    try:
        reason = addresses.foreign_refusal(url)
    except ValueError:
        return
    plain = re.fullmatch(r"https?://(127|10|169\.254)(\.\d{1,2}){2,3}(/.*)?", url, re.ASCII)
    assert reason or not plain, url


# -- settings


def hosts_toml(data: bytes) -> None:
    try:
        parse_hosts(data.decode("utf-8", "replace"), Path("/etc/hosts.d/example.org"))
    except UsageError:
        return


def duration(data: bytes) -> None:
    try:
        assert parse_duration(_text(data)) >= 0
    except ValueError:
        return


def registries(data: bytes) -> None:
    try:
        found = registries_conf.parse_conf(data.decode("utf-8", "replace"), "registries.conf")
    except UsageError:
        return
    conf = registries_conf.RegistriesConf(found)
    for text in ("docker.io/library/a:1", "example.org:5000/b/c@" + SHA):
        wanted = Reference.parse(text)
        entry = conf.find(wanted)
        if entry is not None:
            for mirror in entry.mirrors:
                mirror.serves(wanted)


def policy(data: bytes) -> None:
    try:
        parsed = policy_json.parse_policy(data, "policy.json")
        parsed.check(Reference.parse("docker.io/library/a:1"))
    except UsageError:
        return


def settings(data: bytes) -> None:
    path = scratch() / "settings.toml"
    path.write_bytes(data)
    try:
        load_settings(config=str(path))
    except UsageError:
        return


def logins(data: bytes) -> None:
    path = scratch() / "auth.json"
    path.write_bytes(data)
    try:
        # No helpers: those that the file names would be started.
        if b"cred" not in data:
            Credentials({"PATH": ""}, str(path)).find("example.org", "a/b")
    except UsageError:
        return


def prewarm(data: bytes) -> None:
    try:
        parse_plan(parse_toml(data.decode("utf-8", "replace"), "plan.toml"), "plan.toml")
    except UsageError:
        return


def lock(data: bytes) -> None:
    try:
        parsed = decode_lock(data.decode("utf-8", "replace"), "lock.toml")
    except UsageError:
        return
    again = decode_lock(encode_lock(parsed), "lock.toml")
    assert again == parsed


# -- what the store reads back


def journal(data: bytes) -> None:
    path = scratch() / "journal"
    path.write_bytes(data)
    history = Journal(path).read()
    last = 0
    for point in history.checkpoints:
        assert point.generation == history.generation and point.offset > last
        last = point.offset
    at = 10
    for start, end in history.beyond(10, 10_000):
        assert at <= start < end <= 10_000
        at = end


def ingest_state(data: bytes) -> None:
    path = scratch() / "state"
    path.write_bytes(data)
    state = IngestState.follow(path)
    if state is not None:
        try:
            assert len(data) == LENGTH
            numbers = (state.generation, state.prefix, state.size, state.status, state.boot)
            assert all(0 <= number < 1 << 64 for number in numbers)
            assert state.prefix in (0, struct.unpack("=7Q", data[:56])[2])
        finally:
            state.close()


def index(data: bytes) -> None:
    folder = scratch() / "layout"
    folder.mkdir(exist_ok=True)
    (folder / "index.json").write_bytes(data)
    found = other_entries(folder, "docker.io/library/a:1")
    if found is not None:
        json.dumps(sorted(found, key=lambda entry: str(entry)))


def record(data: bytes) -> None:
    payload = decode_record(data)
    if payload is None:
        return
    assert encode_record(payload)
    content = payload.get("payload")
    fields: dict[str, Any] = content if isinstance(content, dict) else payload
    for kind in (ReferenceRecord, Snapshot, LayerRecord, BlobRecord, Capabilities):
        kind.parse(fields)  # type: ignore[attr-defined]
    Stamp.parse(payload.get("stamp"))
    known = ReferenceRecord.parse(fields)
    if known is not None:
        entries([known], Platform.host("x86_64"))
        assert ReferenceRecord.parse(known.payload()) == known


def entry_list(data: bytes) -> None:
    folder = scratch() / "listed"
    (folder / "tree").mkdir(parents=True, exist_ok=True)
    from stowray.pipeline.entry_list import entry_list_path

    entry_list_path(folder / "tree").write_bytes(data)
    try:
        read_entry_list(folder / "tree")
    except StorageError:
        return


def wire(data: bytes) -> None:
    try:
        fields = json.loads(data)
    except (ValueError, RecursionError):
        return
    if isinstance(fields, dict):
        try:
            Image.from_dict(fields)
        except (KeyError, TypeError, ValueError, AttributeError, *_NAMES):
            return


_NAMES = (InvalidDigestError, InvalidReferenceError, InvalidPlatformError, ManifestError)


def mounts(data: bytes) -> None:
    try:
        parse_mountinfo(data)
    except StorageError:
        return


# -- layers


def _pieces(data: bytes) -> Callable[[], bytes]:
    """Return a reader of ``data`` in pieces whose sizes depend on it."""
    size = (512, 700, 1, 1 << 16)[len(data) % 4] if len(data) < 1 << 14 else 1 << 12
    return tars.source(data, size)


def tar(data: bytes) -> None:
    reader = TarReader(_pieces(data), LIMITS)
    count = 0
    try:
        for entry in reader:
            count += 1
            assert count <= LIMITS.entries
            assert b"\0" not in entry.name and b"\0" not in entry.linkname
            assert 0 <= entry.size <= LIMITS.unpacked_size
            assert entry.kind == FILE or entry.size == 0
            assert 0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32
            at = 0
            for start, length in entry.sparse or ():
                assert at <= start and start + length <= entry.size
                at = start + length
            if count % 2:
                for part in reader.data():
                    assert len(part)
    except LayerError:
        return


def pax(data: bytes) -> None:
    try:
        parse_pax(data)
    except LayerError:
        return


def stream(data: bytes) -> None:
    inflate = compress.decompress(_pieces(data), LIMITS)
    total = 0
    try:
        while chunk := inflate():
            total += len(chunk)
            assert total <= LIMITS.layer_size
    except LayerError:
        return


def stage(data: bytes) -> None:
    """Stage the layer for real, beside a canary that must not change."""
    base = scratch() / "stage"
    if not base.exists():
        base.mkdir()
        (base / "canary").write_bytes(b"canary")
        os.symlink("canary", base / "link")
        _canary.append(_look(base))
    tree = base / "tree"
    tree.mkdir(0o700)
    before = os.listdir("/proc/self/fd")
    try:
        staged = stage_layer(
            _pieces(data), tree, limits=LIMITS, privileged=os.geteuid() == 0, algorithm="sha256"
        )
    except LayerError:
        pass
    except StorageError as error:
        # What the file system cannot hold (a device as a plain user, a name it does not take).
        assert error.__cause__ is None or getattr(error.__cause__, "errno", 0) not in (
            errno.ENOENT,
            errno.EBADF,
        ), error
    else:
        assert staged.diff_id.startswith("sha256:")
        with ChainView([tree], os.geteuid() == 0) as view:
            for node in view.walk():
                assert b".." not in node.path.split(b"/")
    finally:
        remove_tree(tree)
    assert len(os.listdir("/proc/self/fd")) == len(before)
    assert _look(base) == _canary[0], "HOST PATH WAS CHANGED"


_canary: list[tuple[object, ...]] = []


def _look(base: Path) -> tuple[object, ...]:
    status = (base / "canary").lstat()
    return (
        sorted(os.listdir(base)),
        status.st_mode,
        status.st_uid,
        status.st_nlink,
        status.st_mtime_ns,
        (base / "canary").read_bytes(),
        os.readlink(base / "link"),
    )


# -- seeds


def mend_tar(data: bytes) -> bytes:
    """Return the archive with the checksum of each header right: else nothing behind it is read."""
    blocks = bytearray(data)
    for start in range(0, len(blocks) - 511, 512):
        block = blocks[start : start + 512]
        if block[257:262] == b"ustar" or (block[156] in b"0123456LKxgS" and block[0]):
            total = sum(block) - sum(block[148:156]) + 8 * 32
            blocks[start + 148 : start + 156] = b"%06o\0 " % (total & 0o777777)
    return bytes(blocks)


def mend_record(data: bytes) -> bytes:
    """Return the record with its checksum right."""
    at = data.find(b'",')
    if not data.startswith(b'{"checksum":"') or at < 0:
        return data
    body = data[at + 2 :]
    try:
        json.loads(b"{" + body)
    except (ValueError, RecursionError):
        return data  # our own checksum never stands above what is not JSON
    return b'{"checksum":"' + hashlib.sha256(body).hexdigest().encode() + b'",' + body


def mend_entry_list(data: bytes) -> bytes:
    """Return the list with its checksum right."""
    import zlib

    unpacker = msgpack.Unpacker(raw=False, strict_map_key=False)
    unpacker.feed(data)
    try:
        header = unpacker.unpack()
        body = data[unpacker.tell() :]
    except (ValueError, TypeError, msgpack.UnpackException):
        return data
    if not isinstance(header, dict):
        return data
    try:
        return bytes(
            msgpack.packb({**header, "version": 1, "crc32": zlib.crc32(body), "size": len(body)})
            + body
        )
    except (TypeError, ValueError, OverflowError, RecursionError):
        return data


def _json(value: object) -> bytes:
    return json.dumps(value, separators=(",", ":")).encode()


def _manifest(docker: bool) -> bytes:
    kind = media_types.DOCKER_MANIFEST if docker else media_types.OCI_MANIFEST
    layer = media_types.DOCKER_LAYER if docker else "application/vnd.oci.image.layer.v1.tar"
    config_type = media_types.DOCKER_CONFIG if docker else media_types.OCI_CONFIG
    return _json(
        {
            "schemaVersion": 2,
            "mediaType": kind,
            "config": {"mediaType": config_type, "digest": SHA, "size": 2, "data": "e30="},
            "layers": [
                {"mediaType": f"{layer}", "digest": SHA, "size": 10, "urls": ["https://x/"]}
            ],
            "annotations": {"a": "b"},
        }
    )


_INDEX = _json(
    {
        "schemaVersion": 2,
        "mediaType": media_types.OCI_INDEX,
        "manifests": [
            {
                "mediaType": media_types.OCI_MANIFEST,
                "digest": SHA,
                "size": 7,
                "platform": {
                    "os": "linux",
                    "architecture": "arm64",
                    "variant": "v8",
                    "os.features": ["a"],
                },
                "annotations": {
                    "org.opencontainers.image.ref.name": "a:1",
                    "org.stowray.reference": "docker.io/library/b:1",
                },
            }
        ],
    }
)
_CONFIG = _json(
    {
        "os": "linux",
        "architecture": "amd64",
        "config": {
            "User": "a:root",
            "Env": ["A=b"],
            "Cmd": ["/bin/sh"],
            "Labels": {"a": "b"},
            "WorkingDir": "/",
        },
        "rootfs": {"type": "layers", "diff_ids": [SHA]},
        "history": [{"created_by": "x", "empty_layer": True}],
    }
)
_JSON_WORDS = (
    b'"mediaType"',
    b'"schemaVersion"',
    b'"digest"',
    b'"size"',
    b'"layers"',
    b'"manifests"',
    b'"config"',
    b'"platform"',
    b'"rootfs"',
    b'"diff_ids"',
    b"null",
    b"true",
    b"-1",
    b"1e3",
    b"9223372036854775808",
    b"[",
    b"{",
    b'"\\ud800"',
    b"[" * 200,
    b"NaN",
    SHA.encode(),
    b'"data"',
    b'"urls"',
    b'"artifactType"',
    b'"subject"',
)


def _records() -> tuple[bytes, ...]:
    stamp = Stamp("boot", "host", 5).payload()
    from stowray.pipeline.descriptor import Descriptor

    known = ReferenceRecord(
        reference="docker.io/library/a:1",
        platform="linux/amd64",
        resolved=Descriptor(media_type=media_types.OCI_INDEX, digest=Digest(SHA), size=1),
        manifest=Digest(SHA),
        manifest_media_type=media_types.OCI_MANIFEST,
        manifest_size=1,
        config=Digest(SHA),
        layers=(Digest(SHA),),
        chain_id=SHA,
        unpacked=True,
        pinned=False,
        created=1.5,
    )
    snapshot = Snapshot(Digest(SHA), None, Digest(SHA), Digest(SHA), "o1-x", 1, 2, 3, 1.5)
    layer = LayerRecord(Digest(SHA), None, 1, 2, 3, {"n": [1]}, ("w",))
    payloads = (
        known.payload(),
        snapshot.payload(),
        layer.payload(),
        BlobRecord(5, ("a/b",), Stamp("boot", "host", 5)).payload(),
    )
    return tuple(encode_record({"stamp": stamp, "payload": payload}) for payload in payloads)


_SEGMENTS = [(0, 3), (1024, 1)]


def _tars() -> tuple[bytes, ...]:
    return (
        tars.archive(
            tars.directory("d"),
            tars.file("d/f", b"data"),
            tars.symlink("d/l", "../d/f"),
            tars.hardlink("h", "d/f"),
            tars.whiteout("d/gone"),
            tars.opaque("d"),
        ),
        tars.archive(tars.fifo("p"), tars.device("c", 1, 3), tars.file("a" * 99, b"x" * 600)),
        tars.archive(tars.pax([("path", "long/name"), ("mtime", "1.5")]), tars.file("x", b"1")),
        tars.archive(tars.gnu_long("n" * 150), tars.file("x", b"1")),
        tars.archive(
            tars.pax([("SCHILY.xattr.user.a", "b"), ("uid", "70000"), ("size", "3")]),
            tars.file("x", b"123"),
        ),
        tars.archive(tars.old_sparse("s", _SEGMENTS, 2000, b"abcd")),
        tars.archive(tars.pax_sparse("s", "0.1", _SEGMENTS, 2000, b"abcd")),
        tars.archive(tars.pax_sparse("s", "1.0", _SEGMENTS, 2000, b"abcd")),
        tars.END,
    )


def _streams() -> tuple[bytes, ...]:
    import sys

    if sys.version_info >= (3, 14):
        from compression import zstd
    else:
        from backports import zstd
    data = _tars()[0]
    frame = zstd.compress(data)
    skippable = b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd"
    return (
        data,
        tars.gzipped(data),
        tars.gzipped(data, members=3),
        tars.gzipped(data) + bytes(600),
        frame,
        skippable + frame + frame,
        b"",
    )


def _journals() -> tuple[bytes, ...]:
    def pack(*items: object) -> bytes:
        return b"".join(msgpack.packb(item) for item in items)

    return (
        pack(
            ["generation", 1, 1, "boot", "host"],
            ["checkpoint", 1, 100, b"d" * 32],
            ["checkpoint", 1, 200, b"e" * 32],
            ["island", 1, 300, 400],
            ["island", 1, 350, 500],
        ),
        pack(["generation", 1, 1, "b", "h"], ["generation", 1, 2, "b", "h"]),
        b"",
    )


def _texts(name: str, *tables: str) -> tuple[bytes, ...]:
    found = [row["input"] for kind in tables for row in table(name)[kind]]
    return tuple(text.encode("utf-8", "surrogatepass")[:4096] for text in found)


def _challenge_seeds() -> tuple[bytes, ...]:
    rows = table("auth_transport")["challenge"]
    return tuple(row["header"].encode("utf-8") for row in rows)


@functools.cache
def targets() -> dict[str, Target]:
    """All targets by name."""
    toml = (b"[", b"]", b"=", b'"', b"\n", b"[[", b"]]", b"true", b"-1", b"1e9", b"'''", b"{", b"}")
    state = struct.pack(
        "=8Q", int.from_bytes(b"STOWING1", "little"), 1, 5, 5 ^ (1 << 64) - 1, 9, 1, 7, 0
    )
    found = (
        Target(
            "reference",
            reference,
            _texts("references", "valid"),
            (b":", b"@", b"/", b"sha256:", b"..", b"[::1]", b"\xd9\xa1", b"localhost", b"\n"),
        ),
        Target(
            "source",
            source,
            (b"oci:/a/b:1", b"oci-archive:/a.tar", b"docker-archive:/a.tar:b:1", b"docker://a/b:1"),
            (b"oci:", b":", b"/", b"@", b"\0", SHA.encode()),
        ),
        Target(
            "digest", digest, (SHA.encode(), b"sha512:" + b"0" * 128), (b"sha256:", b"\n", b"A")
        ),
        Target(
            "platform",
            platform,
            (
                b"linux/amd64",
                b"linux/arm/v7",
                b"windows(10.0.17763)/amd64",
                b"linux(+a+b)/arm64/v8",
            ),
            (b"/", b"(", b")", b"+", b"%2B", b"linux", b"arm", b"v7"),
        ),
        Target("document", document, (_manifest(False), _manifest(True), _INDEX), _JSON_WORDS),
        Target("config", config, (_CONFIG,), _JSON_WORDS),
        Target("layout_index", layout_index, (_INDEX,), _JSON_WORDS),
        Target("json_object", json_object, (_CONFIG, b'{"a":[1,2.5,"x",null]}'), _JSON_WORDS),
        Target(
            "archive_list",
            archive_list,
            (_json([{"Config": "a.json", "RepoTags": ["a:1"], "Layers": ["l/layer.tar"]}]),),
            (*_JSON_WORDS, b'"Config"', b'"RepoTags"', b'"Layers"', b"../"),
        ),
        Target(
            "challenges",
            challenges,
            _challenge_seeds(),
            (b"Bearer", b"Basic", b'realm="', b"scope=", b",", b'\\"', b"=", b"\n", b" "),
        ),
        Target(
            "headers",
            headers,
            (
                b"bytes 0-9/10",
                b"bytes */10",
                b"bytes=0-5",
                b"bytes=-5",
                b'299 - "text"',
                b"120",
                b"Wed, 21 Oct 2015 07:28:00 GMT",
            ),
            (b"bytes", b"-", b"/", b"*", b"=", b'"', b"9" * 30, b"GMT", b"-0000"),
        ),
        Target(
            "answer",
            answer,
            (
                _json({"errors": [{"code": "DENIED", "message": "no", "detail": {"a": 1}}]}),
                b"<Error><Code>ExpiredToken</Code><Message>m</Message></Error>",
                _json({"token": "abc", "expires_in": 300}),
                b"https://a:b@host/p?X-Amz-Signature=1",
            ),
            (
                *_JSON_WORDS,
                b'"errors"',
                b'"code"',
                b'"token"',
                b'"expires_in"',
                b"<Code>",
                b"\x1b[",
            ),
        ),
        Target(
            "address",
            address,
            (b"https://example.org/a", b"http://127.0.0.1:80/", b"https://[::ffff:10.0.0.1]/x"),
            (b"://", b"@", b"[", b"]", b"0x7f", b"127.1", b"localhost", b"%25", b":", b"\t", b"\\"),
        ),
        Target(
            "hosts_toml",
            hosts_toml,
            (
                (
                    b'server = "https://a"\n[host."https://m"]\ncapabilities=["pull"]\nca="x.pem"\n'
                    b'client=[["a","b"]]\nskip_verify=true\noverride_path=true\ndial_timeout="1m30s"\n'
                    b'[host."https://m".header]\nx-a=["b"]\n'
                ),
            ),
            (*toml, b"server", b"capabilities", b"ca", b"client", b"https://", b"http://[::1]"),
        ),
        Target(
            "duration", duration, (b"1m30s", b"0", b"1.5h"), (b"ms", b"\xc2\xb5s", b".", b"9" * 40)
        ),
        Target(
            "registries",
            registries,
            (
                (
                    b'[[registry]]\nprefix="*.example.org"\nlocation="m.org/x"\nblocked=false\n'
                    b'[[registry.mirror]]\nlocation="n"\ninsecure=true\npull-from-mirror="tag-only"\n'
                ),
            ),
            (*toml, b"registry", b"mirror", b"location", b"prefix", b"docker.io", b"*."),
        ),
        Target(
            "policy",
            policy,
            (
                _json(
                    {
                        "default": [{"type": "insecureAcceptAnything"}],
                        "transports": {"docker": {"docker.io/library": [{"type": "reject"}]}},
                    }
                ),
            ),
            (*_JSON_WORDS, b'"default"', b'"transports"', b'"signedBy"', b'"reject"', b'"docker"'),
        ),
        Target(
            "settings",
            settings,
            (b'store="/x"\nengine="local"\n[registry]\nconnections=3\nplain_http=["a"]\n',),
            (*toml, b"[registry]", b"[unpack]", b"workers", b"store", b"~nobody/"),
        ),
        Target(
            "logins",
            logins,
            (
                _json({"auths": {"example.org": {"auth": "YTpi"}, "https://b/v1/": {"auth": "?"}}}),
                _json({"auths": {"example.org/a": {"identitytoken": "t", "username": "u"}}}),
            ),
            (*_JSON_WORDS, b'"auths"', b'"auth"', b'"YTpi"', b"example.org"),
        ),
        Target(
            "prewarm",
            prewarm,
            (
                (
                    b'images=["a:1",{reference="b:1",platforms=["linux/arm64"]}]\nlock="l"\n'
                    b'deliver=["podman"]\nwaves=["1","50%"]\n[nodes]\ninclude=["n*"]\n'
                    b'[limits]\nparallel=2\nbandwidth="10M"\n[failure]\n'
                ),
            ),
            (*toml, b"images", b"nodes", b"limits", b"failure", b"waves", b"%", b"deadline"),
        ),
        Target(
            "lock",
            lock,
            (
                b'version=1\ntool="t"\ncreated="c"\n[[images]]\nreference="a:1"\ndigest="'
                + SHA.encode()
                + b'"\nmedia_type="m"\nsize=5\n[images.manifests]\n"linux/amd64"="'
                + SHA.encode()
                + b'"\n',
            ),
            (*toml, b"version", b"images", b"digest", SHA.encode(), b"manifests"),
        ),
        Target(
            "journal", journal, _journals(), (b"\x95\xaageneration", b"\x94\xa6island", b"\xcf")
        ),
        Target("ingest_state", ingest_state, (state, bytes(64), b""), (b"STOWING1", b"\xff" * 8)),
        Target("index", index, (_INDEX, b"{}"), _JSON_WORDS),
        Target("record", record, _records(), _JSON_WORDS, mend_record),
        Target(
            "entry_list",
            entry_list,
            (
                msgpack.packb({"version": 1, "crc32": 0, "size": 0})
                + msgpack.packb([b"a", 1, 0o644, 0, 0, 5, [0, 0], {b"user.a": b"b"}]),
            ),
            (b"\x98", b"\xc4\x01a", b"\xc0", b"\x92\x00\x00", b"\x80", b"\xcf"),
            mend_entry_list,
        ),
        Target("wire", wire, (_CONFIG, _INDEX, _manifest(False)), _JSON_WORDS),
        Target(
            "mounts",
            mounts,
            (b"36 35 98:0 /a /mnt\\0402 rw,noatime master:1 - ext3 /dev/root rw,errors=x\n",),
            (b" - ", b"\\040", b"\n", b" "),
        ),
        Target(
            "pax", pax, (tars.record("path", "x") + tars.record("mtime", "1.5"),), (b"=", b"\n")
        ),
        Target("tar", tar, _tars(), (b"ustar", b"\0", b"\x80", b"x", b"L"), mend_tar, 1 << 14),
        Target(
            "stage",
            stage,
            _tars(),
            (b"../", b"/", b".wh.", b".wh..wh..opq", b"\x80", b"ustar", b"canary"),
            mend_tar,
            1 << 14,
        ),
        Target("stream", stream, _streams(), (b"\x1f\x8b", b"\x28\xb5\x2f\xfd"), None, 1 << 14),
    )
    return {target.name: target for target in found}
