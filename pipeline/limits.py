"""Every limit that a layer is held to, with its unit and its default.

Invariant: whatever the bytes of a layer say, memory and work stay within these figures; beyond one
of them stands a ``LayerError``, never a guess and never a shortened result.
"""

from __future__ import annotations

from stowray.pipeline.values import dataclass

KIB = 1 << 10
MIB = 1 << 20
GIB = 1 << 30


@dataclass(frozen=True, slots=True)
class LayerLimits:
    """The limits of one layer; sizes are bytes."""

    layer_size: int = 256 * GIB
    """Bytes of the uncompressed tar stream; absolute, as honest zstd reaches ratios of 32 000."""

    unpacked_size: int = 256 * GIB
    """Sum of the sizes that the entries claim, holes of sparse files included, and of the files of
    layers below that are copied for a hard link to them."""

    entries: int = 5_000_000
    """Entries of one layer, metadata headers not counted."""

    metadata_size: int = MIB
    """Bytes of one PAX header or GNU long name (CVE-2022-2879)."""

    metadata_headers: int = 8
    """PAX and GNU headers in a row before one entry; honest writers make at most three."""

    path_size: int = 64 * KIB
    """Bytes of one name or link target. Above PATH_MAX, because trees are walked by descriptor."""

    component_size: int = 255
    """Bytes of one component of a name (NAME_MAX of ext4, xfs, btrfs and overlayfs)."""

    sparse_segments: int = 65_536
    """Data segments of one sparse file (CVE-2025-58183)."""

    xattr_name_size: int = 255
    """Bytes of the name of an extended attribute (XATTR_NAME_MAX)."""

    xattr_value_size: int = 64 * KIB
    """Bytes of the value of an extended attribute (XATTR_SIZE_MAX)."""

    window_size: int = 128 * MIB
    """Bytes of history that a zstd frame may demand: the format's own default for decoders."""


DEFAULT_LIMITS = LayerLimits()
