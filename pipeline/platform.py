"""Platforms: what images run on, how selectors are written, and which entry of an index is taken.

Invariant: what matches, and in which order, is what containerd does; an entry that is no image
(attestation, artifact, unknown platform) is never selected.
"""

from __future__ import annotations

import os
import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Final

from stowray.pipeline.errors import InvalidPlatformError
from stowray.pipeline.media_types import CONFIG_TYPES, INDEX_TYPES, MANIFEST_TYPES
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from stowray.pipeline.descriptor import Descriptor

UNKNOWN: Final = "unknown"
ATTESTATION_ANNOTATION: Final = ("vnd.docker.reference.type", "attestation-manifest")
TEXT_LIMIT: Final = 1024

# What a selector of one word may name (Go's lists of systems and architectures).
# fmt: off
KNOWN_OS: Final = frozenset({
    "aix", "android", "darwin", "dragonfly", "freebsd", "hurd", "illumos", "ios", "js", "linux",
    "nacl", "netbsd", "openbsd", "plan9", "solaris", "wasip1", "windows", "zos",
})
KNOWN_ARCHITECTURES: Final = frozenset({
    "386", "amd64", "amd64p32", "arm", "arm64", "arm64be", "armbe", "loong64", "mips", "mips64",
    "mips64le", "mips64p32", "mips64p32le", "mipsle", "ppc", "ppc64", "ppc64le", "riscv",
    "riscv64", "s390", "s390x", "sparc", "sparc64", "wasm",
})
# fmt: on

# uname(2) names that no index uses: mapped for the host only, never for entries.
_MACHINES: Final = {
    "x86_64": ("amd64", ""),
    "amd64": ("amd64", ""),
    "i386": ("386", ""),
    "i486": ("386", ""),
    "i586": ("386", ""),
    "i686": ("386", ""),
    "x86": ("386", ""),
    "aarch64": ("arm64", ""),
    "arm64": ("arm64", ""),
    "armv8l": ("arm", "v8"),
    "armv7l": ("arm", "v7"),
    "armv6l": ("arm", "v6"),
    "armv5tel": ("arm", "v5"),
    "armv5tejl": ("arm", "v5"),
    "ppc64el": ("ppc64le", ""),
    "powerpc64le": ("ppc64le", ""),
    "mips64el": ("mips64le", ""),
    "loongarch64": ("loong64", ""),
}

_WORD = re.compile(r"[A-Za-z0-9_.-]+")
_OS = re.compile(r"[A-Za-z0-9_-]+")
_OPTION = re.compile(r"(?:[A-Za-z0-9_.-]|%[0-9A-Fa-f]{2})*")
_ESCAPE = re.compile(r"%([0-9A-Fa-f]{2})")
_NUMBERED = re.compile(r"v?([0-9]{1,2})")
_ARM64_VARIANT = re.compile(r"v([0-9])(?:\.([0-9]))?")
_WINDOWS_VERSION = re.compile(r"([0-9]{1,3})\.([0-9]{1,3})\.([0-9]{1,5})(?:\..*)?")

# Windows Server 2022: from here on, hosts run containers of this build and later ones.
_WINDOWS_STABLE_BUILD: Final = 20348


@dataclass(frozen=True, slots=True)
class Platform:
    """Operating system, architecture and what refines them, as in an OCI index."""

    os: str
    architecture: str
    variant: str = ""
    os_version: str = ""
    os_features: tuple[str, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Platform:
        """Return ``OS[(VERSION+FEATURE…)][/ARCH[/VARIANT]]``, or ``ARCH`` alone, as a platform."""
        if len(text) > TEXT_LIMIT:
            raise InvalidPlatformError(f"{text[:64]}…", "too long for a platform")
        if "*" in text:
            raise InvalidPlatformError(text, "wildcards are not supported")
        parts = text.split("/")
        if len(parts) > 3 or any(_WORD.fullmatch(part) is None for part in parts[1:]):
            raise InvalidPlatformError(text, "a platform is OS/ARCH[/VARIANT], e.g. linux/arm64/v8")
        system, version, features = _parse_os(text, parts[0])
        if len(parts) == 1:
            return _complete(text, system, version, features)
        variant = parts[2] if len(parts) == 3 else ""
        architecture, variant = _normalize_architecture(parts[1], variant)
        if len(parts) == 2 and (architecture, variant) == ("arm", "v7"):
            # v7 is what `arm` means; it is shown only where it was written.
            variant = ""
        if len(parts) == 3 and (architecture, variant) == ("arm64", ""):
            variant = "v8"
        return cls(system, architecture, variant, version, features)

    @classmethod
    def host(cls, machine: str | None = None, system: str | None = None) -> Platform:
        """Return the platform of this host (or of one with these uname(2) names)."""
        uname = os.uname()
        machine = (machine or uname.machine).lower()
        architecture, variant = _MACHINES.get(machine, (machine, ""))
        if machine.startswith("armv") and machine not in _MACHINES:
            architecture, variant = "arm", machine[3:5]
        return cls((system or uname.sysname).lower(), architecture, variant)

    def normalized(self) -> Platform:
        """Return the one form in which two equal platforms are equal values."""
        architecture, variant = _normalize_architecture(self.architecture, self.variant)
        features = tuple(sorted({feature for feature in self.os_features if feature}))
        return Platform(_normalize_os(self.os), architecture, variant, self.os_version, features)

    def preferences(self) -> list[Platform]:
        """Return what runs on this platform, best first; each normalised."""
        wanted = self.normalized()
        pairs = [(wanted.architecture, wanted.variant)]
        pairs += _lesser(wanted.architecture, wanted.variant)
        return [replace(wanted, architecture=name, variant=variant) for name, variant in pairs]

    def accepts(self, entry: Platform, *, strict: bool = False) -> bool:
        """Tell whether an image for ``entry`` runs on this platform."""
        return self.rank(entry, strict=strict) is not None

    def accepts_os(self, entry: Platform) -> bool:
        """Tell whether ``entry``'s system runs here, whatever its architecture."""
        wanted, other = self.normalized(), entry.normalized()
        if wanted.os != other.os or not set(other.os_features) <= set(wanted.os_features):
            return False
        # Only Windows ties containers to the host's version.
        return wanted.os != "windows" or _windows_runs(wanted.os_version, other.os_version)

    def rank(self, entry: Platform, *, strict: bool = False) -> tuple[int, int] | None:
        """Return how well ``entry`` fits (lower is better), or None when it does not run here.

        Not strict, amd64 also takes 386 and newer variants take older ones: containerd's default.
        """
        return _rank([self.normalized()] if strict else self.preferences(), entry)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "os": self.os,
            "architecture": self.architecture,
            "variant": self.variant,
            "os_version": self.os_version,
            "os_features": list(self.os_features),
        }

    def to_document(self) -> dict[str, Any]:
        """Return the platform as OCI documents write it: with dots, and only what is set."""
        fields = {
            "architecture": self.architecture,
            "os": self.os,
            "os.version": self.os_version,
            "os.features": list(self.os_features),
            "variant": self.variant,
        }
        required = ("architecture", "os")
        return {key: value for key, value in fields.items() if value or key in required}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> Platform:
        """Return the platform that ``to_dict`` described."""
        return cls(
            os=str(fields["os"]),
            architecture=str(fields["architecture"]),
            variant=str(fields["variant"]),
            os_version=str(fields["os_version"]),
            os_features=tuple(str(feature) for feature in fields["os_features"]),
        )

    def __str__(self) -> str:
        if not self.os:
            return UNKNOWN
        options = _encode(self.os_version)
        options += "".join(f"+{_encode(name)}" for name in sorted(self.os_features) if name)
        system = f"{self.os}({options})" if options else self.os
        return "/".join(part for part in (system, self.architecture, self.variant) if part)


def select(
    manifests: Sequence[Descriptor], wanted: Platform, *, strict: bool = False
) -> list[Descriptor]:
    """Return the entries for ``wanted``, best first; the first of equals stays first.

    Entries without a platform come last: only their config can tell what they are.
    """
    images = [entry for entry in manifests if is_image(entry)]
    unnamed = [entry for entry in images if entry.platform is None]
    candidates = [wanted.normalized()] if strict else wanted.preferences()
    ranked = [
        (rank, entry.platform.os_version, entry)
        for entry in images
        if entry.platform is not None and (rank := _rank(candidates, entry.platform)) is not None
    ]
    if wanted.normalized().os == "windows":
        # The newest build that the host can run (containerd's order on Windows).
        ranked.sort(key=lambda item: item[1], reverse=True)
    ranked.sort(key=lambda item: item[0])
    return [entry for _, _, entry in ranked] + unnamed


def select_os(manifests: Sequence[Descriptor], wanted: Platform) -> list[Descriptor]:
    """Return the entries for ``wanted``'s system on any architecture, exact ones first."""
    images = [entry for entry in manifests if is_image(entry) and entry.platform is not None]
    same_os = [entry for entry in images if entry.platform and wanted.accepts_os(entry.platform)]
    exact = set(map(id, select(same_os, wanted, strict=True)))
    return sorted(same_os, key=lambda entry: id(entry) not in exact)


def is_image(entry: Descriptor) -> bool:
    """Tell whether an index entry can be an image: no attestation, artifact or other document."""
    if entry.media_type not in INDEX_TYPES and entry.media_type not in MANIFEST_TYPES:
        return False
    if entry.artifact_type and entry.artifact_type not in CONFIG_TYPES:
        return False
    if ATTESTATION_ANNOTATION in entry.annotations:
        return False
    platform = entry.platform
    return platform is None or UNKNOWN not in (platform.os.lower(), platform.architecture.lower())


def offered(manifests: Iterable[Descriptor]) -> str:
    """Return the platforms of an index as text for an error, in document order."""
    names = [str(entry.platform) for entry in manifests if is_image(entry) and entry.platform]
    return ", ".join(dict.fromkeys(names))


def describe(text: str) -> dict[str, Any]:
    """Return how the selector ``text`` is understood, for people and scripts."""
    try:
        platform = Platform.parse(text)
    except InvalidPlatformError as error:
        return {"input": text, "error": str(error)}
    fields = platform.to_dict()
    features = fields.pop("os_features")
    if features:
        fields["os_features"] = features
    return {"input": text, **fields, "formatted": str(platform)}


def _parse_os(text: str, part: str) -> tuple[str, str, tuple[str, ...]]:
    """Return name, version and features of a selector's first part."""
    name, parenthesis, options = part.partition("(")
    if _OS.fullmatch(name) is None or (parenthesis and not options.endswith(")")):
        raise InvalidPlatformError(text, "it begins with OS or OS(VERSION+FEATURE)")
    version, *features = options.removesuffix(")").split("+") if parenthesis else [""]
    if any(not feature for feature in features):
        raise InvalidPlatformError(text, "an empty feature name")
    decoded = tuple(_decode(text, feature) for feature in features)
    return _normalize_os(name), _decode(text, version), decoded


def _complete(text: str, system: str, version: str, features: tuple[str, ...]) -> Platform:
    """Return the platform of a selector that names only a system or only an architecture."""
    host = Platform.host()
    if system in KNOWN_OS:
        variant = "" if (host.architecture, host.variant) == ("arm", "v7") else host.variant
        return Platform(system, host.architecture, variant, version, features)
    architecture, variant = _normalize_architecture(text, "")
    if architecture not in KNOWN_ARCHITECTURES:
        raise InvalidPlatformError(text, "neither a known system nor a known architecture")
    return Platform(
        host.os, architecture, "" if (architecture, variant) == ("arm", "v7") else variant
    )


def _normalize_os(name: str) -> str:
    lower = name.lower()
    return "darwin" if lower == "macos" else lower


def _normalize_architecture(architecture: str, variant: str) -> tuple[str, str]:
    """Return the names that Go uses, with the default variant left out (arm: written out)."""
    name, variant = architecture.lower(), variant.lower()
    if name == "i386":
        return "386", ""
    if name in ("x86_64", "x86-64", "amd64"):
        return "amd64", "" if variant == "v1" else variant
    if name in ("aarch64", "arm64"):
        variant = (f"v{variant}" if variant[:1].isdigit() else variant).removesuffix(".0")
        return "arm64", "" if variant == "v8" else variant
    if name == "armhf":
        return "arm", "v7"
    if name == "armel":
        return "arm", "v6"
    if name == "arm":
        variant = variant or "v7"
        return "arm", f"v{variant}" if variant in ("5", "6", "7", "8") else variant
    return name, variant


def _lesser(architecture: str, variant: str) -> list[tuple[str, str]]:
    """Return the architectures and variants that also run here, best first."""
    numbered = _NUMBERED.fullmatch(variant)
    number = int(numbered[1]) if numbered else 0
    if architecture == "amd64":
        older = [("amd64", f"v{level}" if level > 1 else "") for level in range(number - 1, 0, -1)]
        return [*older, ("386", "")]
    if architecture == "arm":
        return [("arm", f"v{level}") for level in range(number - 1, 4, -1)]
    if architecture == "arm64":
        return _lesser_arm64(variant)
    return []


def _lesser_arm64(variant: str) -> list[tuple[str, str]]:
    levels = _ARM64_VARIANT.fullmatch(variant or "v8")
    if levels is None or int(levels[1]) not in (8, 9):
        # A variant that nobody knows runs on itself only.
        return []
    major, minor = int(levels[1]), int(levels[2] or 0)
    older = []
    if major == 9:
        older = [f"v9.{level}" if level else "v9" for level in range(minor - 1, -1, -1)]
        # v9.0 branched off v8.5: each v9.x has what v8.(x+5) has, as far as v8 goes.
        minor = min(minor + 6, 10)
    older += [f"v8.{level}" if level else "" for level in range(minor - 1, -1, -1)]
    return [*(("arm64", name) for name in older), ("arm", "v8"), *_lesser("arm", "v8")]


def _rank(candidates: Sequence[Platform], entry: Platform) -> tuple[int, int] | None:
    """Return the place of the first candidate that ``entry`` equals; then more features first."""
    normalized = entry.normalized()
    for position, candidate in enumerate(candidates):
        if _equal(candidate, normalized):
            return position, -len(normalized.os_features)
    return None


def _equal(candidate: Platform, entry: Platform) -> bool:
    """Tell whether a normalised ``entry`` is exactly what ``candidate`` names or asks for less."""
    if (candidate.architecture, candidate.variant) != (entry.architecture, entry.variant):
        return False
    return candidate.accepts_os(entry)


def _windows_runs(host: str, image: str) -> bool:
    """Tell whether a Windows host of one version runs containers of another."""
    wanted, offered_version = _WINDOWS_VERSION.fullmatch(host), _WINDOWS_VERSION.fullmatch(image)
    if not image or wanted is None:
        return True
    if offered_version is None or wanted.group(1, 2) != offered_version.group(1, 2):
        return False
    host_build, image_build = int(wanted[3]), int(offered_version[3])
    if host_build < _WINDOWS_STABLE_BUILD:
        return host_build == image_build
    return _WINDOWS_STABLE_BUILD <= image_build <= host_build


def _encode(option: str) -> str:
    """Return a version or feature with all that a selector does not take as it is escaped."""
    return "".join(
        character
        if character != "%" and _OPTION.fullmatch(character)
        else "".join(f"%{byte:02X}" for byte in character.encode("utf-8", "surrogatepass"))
        for character in option
    )


def _decode(text: str, option: str) -> str:
    if _OPTION.fullmatch(option) is None:
        raise InvalidPlatformError(text, "a version or feature has characters that must be %XX")
    raw = _ESCAPE.sub(lambda match: chr(int(match[1], 16)), option).encode("latin-1")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        raise InvalidPlatformError(text, "a version or feature is not UTF-8") from None
