"""What must be true of a store at any moment, whatever ended the last process: read from outside.

Invariant: nothing of the code under test is used here. The formats are read again from their
description (an OCI image layout; records as JSON behind a SHA-256 of themselves), so that a
mistake in the code cannot hide itself.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from tests.support.interpose import locked_elsewhere

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

Json = dict[str, Any]
_TEMPORARY = (".tmp-", ".probe-")
_REFERENCE = "org.stowray.reference"
# What a power cut may leave and whoever uses it finds out.
_UNFINISHED = ("ingest", "trash", "leases", "quarantine")


def read_record(path: Path) -> Json | None:
    """Return a record file's content, None when it is not whole."""
    data = path.read_bytes()
    head, _, body = data.partition(b'",')
    if head != b'{"checksum":"' + hashlib.sha256(body).hexdigest().encode():
        return None
    content: Json = json.loads(b"{" + body)
    return content


def fingerprint(tree: Path) -> str:
    """Return a digest of all that a tree says: names, kinds, modes, owners, times, contents."""
    root = os.fsencode(tree)
    hasher = hashlib.sha256()
    inodes: dict[tuple[int, int], int] = {}
    pending = [b""]
    names: list[bytes] = [b""]
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(root, prefix)) as found:
            for entry in found:
                name = prefix + entry.name
                names.append(name)
                if entry.is_dir(follow_symlinks=False):
                    pending.append(name + b"/")
    for name in sorted(names):
        path = os.path.join(root, name)
        status = os.lstat(path)
        kind = stat.S_IFMT(status.st_mode)
        row: list[object] = [name, status.st_mode, status.st_uid, status.st_gid]
        if (kind, status.st_rdev) != (stat.S_IFCHR, 0):  # a whiteout's time says nothing
            row.append(status.st_mtime_ns)
        if kind == stat.S_IFREG:
            with open(path, "rb") as content:
                row.append(hashlib.file_digest(content, "sha256").hexdigest())
        elif kind == stat.S_IFLNK:
            row.append(os.readlink(path))
        else:
            row.append(status.st_rdev if kind in (stat.S_IFCHR, stat.S_IFBLK) else 0)
        if kind != stat.S_IFDIR:
            row.append(inodes.setdefault((status.st_dev, status.st_ino), len(inodes)))
        attributes = sorted(os.listxattr(path, follow_symlinks=False))
        row += [(key, os.getxattr(path, key, follow_symlinks=False)) for key in attributes]
        hasher.update(repr(row).encode())
    return hasher.hexdigest()


def trees_of(store: Path) -> dict[str, str]:
    """Return the fingerprint of each finished layer tree by its name."""
    layers = store / "layers"
    found = {path.name: path for path in layers.iterdir() if not path.name.startswith(".")}
    return {name: fingerprint(path / "tree") for name, path in found.items()}


def check_store(
    store: Path, trees: Mapping[str, str] | None = None, *, finished: bool = False
) -> None:
    """Check all that must hold after a kill; with ``finished`` also that nothing is left over.

    ``trees`` are the fingerprints that the layer trees must have (those that it knows).
    """
    if not (store / "version").exists():
        return  # killed while it was being made: no store yet
    problems: list[str] = []
    sizes = _check_blobs(store, problems)
    chains = _check_snapshots(store, trees or {}, problems)
    known = _check_references(store, sizes, chains, problems)
    _check_sources(store, sizes, problems)
    _check_index(store, sizes, known, problems)
    _check_locks(store, problems)
    if finished:
        _check_finished(store, problems)
    assert not problems, "\n".join([f"{store} is not as it must be:", *problems])


def _check_blobs(store: Path, problems: list[str]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for algorithm in ("sha256", "sha512"):
        for path in (store / "blobs" / algorithm).iterdir():
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                problems.append(f"{path} is no regular file")
                continue
            if status.st_mode & 0o777 != 0o444:
                problems.append(f"{path} has mode {status.st_mode:o}")
            with path.open("rb") as content:
                if hashlib.file_digest(content, algorithm).hexdigest() != path.name:
                    problems.append(f"{path} IS A FALSE BLOB")
            sizes[f"{algorithm}:{path.name}"] = status.st_size
    return sizes


def _check_snapshots(store: Path, trees: Mapping[str, str], problems: list[str]) -> set[str]:
    layers = store / "layers"
    for path in layers.iterdir():
        if path.name.startswith(_TEMPORARY):
            continue
        record = read_record(path / "layer.json") if (path / "layer.json").exists() else None
        if record is None:
            problems.append(f"{path} bears its name without a whole record")
            continue
        diff_id = str(record["payload"]["diff_id"])
        if diff_id.partition(":")[2] not in path.name.split("-"):
            problems.append(f"{path} is of {diff_id}")
        if path.name in trees and fingerprint(path / "tree") != trees[path.name]:
            problems.append(f"{path} IS A FALSE TREE")
    links: dict[str, Json] = {}
    for path in (store / "snapshots").iterdir():
        if path.name.startswith("."):
            continue
        record = read_record(path)
        if record is None:
            problems.append(f"{path} is not whole")
            continue
        links[record["payload"]["chain_id"]] = record["payload"]
    for chain_id, link in links.items():
        parent, diff_id = link["parent"], link["diff_id"]
        text = f"{parent} {diff_id}".encode()
        expected = diff_id if parent is None else f"sha256:{hashlib.sha256(text).hexdigest()}"
        if chain_id != expected:
            problems.append(f"snapshot {chain_id} is not of {parent} and {diff_id}")
    return {chain_id for chain_id in links if _is_complete(store, links, chain_id)}


def _is_complete(store: Path, links: Mapping[str, Json], chain_id: str) -> bool:
    current: str | None = chain_id
    while current is not None:
        link = links.get(current)
        if link is None or not (store / "layers" / link["layer"] / "tree").is_dir():
            return False
        current = link["parent"]
    return True


def _check_references(
    store: Path, sizes: Mapping[str, int], chains: set[str], problems: list[str]
) -> dict[str, list[Json]]:
    known: dict[str, list[Json]] = {}
    for folder in (store / "refs").iterdir():
        if folder.name.startswith("."):
            continue
        for path in folder.iterdir():
            if path.name.startswith("."):
                continue
            record = read_record(path)
            if record is None:
                problems.append(f"{path} is not whole")
                continue
            payload = record["payload"]
            name = payload["reference"]
            if hashlib.sha256(name.encode()).hexdigest() != folder.name:
                problems.append(f"{path} is of {name}")
            known.setdefault(name, []).append(payload)
            needed = [payload["resolved"]["digest"], payload["manifest"], payload["config"]]
            needed += [*payload["layers"], *([payload["twin"]] if payload["twin"] else [])]
            for digest in needed:
                if digest not in sizes:
                    problems.append(f"{name} is recorded and lacks {digest}")
            if payload["unpacked"] and payload["chain_id"] not in {"", *chains}:
                problems.append(f"{name} is recorded as unpacked and is not")
    return known


def _check_sources(store: Path, sizes: Mapping[str, int], problems: list[str]) -> None:
    for algorithm in ("sha256", "sha512"):
        for path in (store / "sources" / algorithm).iterdir():
            if path.name.startswith("."):
                continue
            record = read_record(path)
            if record is None:
                problems.append(f"{path} is not whole")
                continue
            digest = f"{algorithm}:{path.name}"
            size, proven = record["payload"]["size"], record["payload"]["verified"]
            if proven and digest in sizes and sizes[digest] != size:
                problems.append(f"{digest} is recorded with {size} bytes and has {sizes[digest]}")


def _check_index(
    store: Path, sizes: Mapping[str, int], known: Mapping[str, list[Json]], problems: list[str]
) -> None:
    index = json.loads((store / "index.json").read_bytes())
    if json.loads((store / "oci-layout").read_bytes())["imageLayoutVersion"] != "1.0.0":
        problems.append("oci-layout is of another version")
    if (store / "refs" / ".changing").exists():
        return  # a change was cut short: the next one derives the whole index anew
    listed = sorted(entry["annotations"][_REFERENCE] for entry in index["manifests"])
    recorded = sorted(name for name, records in known.items() for _ in records)
    if listed != recorded:
        problems.append(f"the index lists {listed}, recorded are {recorded}")
    for entry in index["manifests"]:
        if sizes.get(entry["digest"]) != entry["size"]:
            problems.append(f"the index lists {entry['digest']}, which is not there")


def _check_locks(store: Path, problems: list[str]) -> None:
    places = [*(store / "locks").iterdir(), *(store / "ingest").glob("*/lock")]
    problems += [f"{path} is held" for path in places if locked_elsewhere(path)]


def wait_quiet(store: Path, seconds: float = 60.0) -> None:
    """Wait until nobody holds a lock: a session works on for a moment for a pull that has ended.

    What is held for longer is :func:`check_store`'s to tell.
    """
    import time

    end = time.monotonic() + seconds
    while time.monotonic() < end:
        problems: list[str] = []
        with suppress(FileNotFoundError):
            _check_locks(store, problems)
            if not problems:
                return
        time.sleep(0.02)


def _check_finished(store: Path, problems: list[str]) -> None:
    for folder in _UNFINISHED:
        problems += [f"{path} is left over" for path in (store / folder).iterdir()]
    for path in store.rglob(".*"):
        if "/tree/" not in str(path) and path.name.startswith((*_TEMPORARY, ".changing")):
            problems.append(f"{path} is left over")
    for path in (store / "locks").iterdir():
        if len(path.stem) >= 64:
            problems.append(f"{path} is left over")


def age(store: Path, seconds: float = 3 * 24 * 3600.0) -> None:
    """Make all that looks unfinished old, so that a collection need not wait for a day."""
    import time

    then = time.time() - seconds
    for path in [store, *store.rglob("*")]:
        if "tree" not in path.relative_to(store).parts and not path.is_symlink():
            os.utime(path, (then, then))
