"""What the store remembers about references and blobs.

Invariant: records are the truth about what is here and ``index.json`` is derived from them. Each
is replaced in one step and proves itself whole; a damaged one counts as absent for whoever asks
what is present, and stops the collector, which must not guess what it named.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from stowray.pipeline.descriptor import Descriptor
from stowray.pipeline.digest import Digest
from stowray.pipeline.errors import InvalidDigestError
from stowray.pipeline.files import replace_file, translated
from stowray.pipeline.recordfile import encode_record, read_record_file
from stowray.pipeline.trust import Stamp
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from pathlib import Path

    from stowray.pipeline.trust import Trust


@dataclass(frozen=True, slots=True)
class Record:
    """A record's content; ``trusted`` says whether what it speaks of survived as it was written."""

    payload: dict[str, Any]
    stamp: Stamp
    trusted: bool


def write_record(path: Path, payload: dict[str, Any], stamp: Stamp) -> None:
    """Replace the record at ``path``; ``stamp`` is of when what it speaks of was complete."""
    data = encode_record({"stamp": stamp.payload(), "payload": payload})
    with translated(path, "write a record"):
        try:
            replace_file(path, data)
        except FileNotFoundError:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            replace_file(path, data)


def read_record(path: Path, trust: Trust) -> Record | None:
    """Return the record at ``path``, or None when it is missing or damaged."""
    return parse_record(read_record_file(path), trust)


def parse_record(content: dict[str, Any] | None, trust: Trust) -> Record | None:
    """Return the record that a record file's content makes, or None."""
    if content is None:
        return None
    payload, stamp = content.get("payload"), Stamp.parse(content.get("stamp"))
    if not isinstance(payload, dict) or stamp is None:
        return None
    return Record(payload, stamp, trust.trusts(stamp))


@dataclass(frozen=True, slots=True)
class BlobRecord:
    """What is known of one digest: its proven size and which repositories have it.

    ``verified`` is of when the bytes were last proven; it stays when ``repositories`` grows,
    because hearing of a blob proves nothing about the copy that is here.
    """

    size: int = -1
    repositories: tuple[str, ...] = ()
    verified: Stamp | None = None

    def with_repository(self, repository: str) -> BlobRecord:
        """Return the record after ``repository`` served or confirmed the digest."""
        return replace(self, repositories=tuple(sorted({*self.repositories, repository})))

    def payload(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "size": self.size,
            "repositories": list(self.repositories),
            "verified": None if self.verified is None else self.verified.payload(),
        }

    @classmethod
    def parse(cls, payload: dict[str, Any]) -> BlobRecord:
        """Return the record that ``payload`` made; what does not fit is left at its default."""
        size, repositories = payload.get("size"), payload.get("repositories")
        return cls(
            size=size if type(size) is int else -1,
            repositories=tuple(text for text in repositories if isinstance(text, str))
            if isinstance(repositories, list)
            else (),
            verified=Stamp.parse(payload.get("verified")),
        )


@dataclass(frozen=True, slots=True)
class ReferenceRecord:
    """One image that is here: a reference and a platform, with all digests that it needs."""

    reference: str
    platform: str
    resolved: Descriptor
    manifest: Digest
    manifest_media_type: str
    manifest_size: int
    config: Digest
    layers: tuple[Digest, ...]
    chain_id: str
    unpacked: bool
    pinned: bool
    created: float
    # The manifest's OCI twin for other tools, where it needs one; see ``oci_manifest``.
    twin: Digest | None = None
    twin_size: int = 0
    # What else the reference led to: inner indexes, and other images of the same platform.
    others: tuple[Digest, ...] = ()

    @property
    def digests(self) -> tuple[Digest, ...]:
        """Every blob that the image needs, and that was pulled with it."""
        twin = () if self.twin is None else (self.twin,)
        own = (self.resolved.digest, self.manifest, *twin, self.config, *self.layers)
        return (*own, *self.others)

    def payload(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {
            "reference": self.reference,
            "platform": self.platform,
            "resolved": {
                "media_type": self.resolved.media_type,
                "digest": str(self.resolved.digest),
                "size": self.resolved.size,
            },
            "manifest": str(self.manifest),
            "manifest_media_type": self.manifest_media_type,
            "manifest_size": self.manifest_size,
            "config": str(self.config),
            "layers": [str(layer) for layer in self.layers],
            "chain_id": str(self.chain_id),
            "unpacked": self.unpacked,
            "pinned": self.pinned,
            "created": self.created,
            "twin": "" if self.twin is None else str(self.twin),
            "twin_size": self.twin_size,
            "others": [str(digest) for digest in self.others],
        }

    @classmethod
    def parse(cls, payload: dict[str, Any]) -> ReferenceRecord | None:
        """Return the record that ``payload`` made, or None when it is of another form."""
        try:
            resolved = payload["resolved"]
            return cls(
                reference=str(payload["reference"]),
                platform=str(payload["platform"]),
                resolved=Descriptor(
                    media_type=str(resolved["media_type"]),
                    digest=Digest(str(resolved["digest"])),
                    size=int(resolved["size"]),
                ),
                manifest=Digest(str(payload["manifest"])),
                manifest_media_type=str(payload["manifest_media_type"]),
                manifest_size=int(payload["manifest_size"]),
                config=Digest(str(payload["config"])),
                layers=tuple(Digest(str(layer)) for layer in payload["layers"]),
                chain_id=str(payload["chain_id"]),
                unpacked=bool(payload["unpacked"]),
                pinned=bool(payload["pinned"]),
                created=float(payload["created"]),
                twin=Digest(str(payload["twin"])) if payload["twin"] != "" else None,
                twin_size=int(payload["twin_size"]),
                # Records of before do not have it.
                others=tuple(Digest(str(digest)) for digest in payload.get("others", ())),
            )
        except (KeyError, TypeError, ValueError, InvalidDigestError):
            return None
