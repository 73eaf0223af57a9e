"""Which hosts are this machine, which are private, and where a registry may send us.

Invariant: no answer of a registry makes us talk to an address that is nearer to us than the
registry itself (loopback, private networks, link-local metadata services), nor to anything but
http(s), nor from https to http. Host names are judged as written, in every spelling that the
resolver reads as an address (``127.1``, ``0x7f000001``, IPv4-mapped IPv6).
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

if TYPE_CHECKING:
    from collections.abc import Collection

DEFAULT_PORTS = {"http": 80, "https": 443}

# How near an address is to us.
_PUBLIC, _PRIVATE, _LOOPBACK, _NEVER = range(4)
_NUMERIC = re.compile(r"(?:0[xX][0-9a-fA-F]*|[0-9]+)(?:\.(?:0[xX][0-9a-fA-F]*|[0-9]+)){0,3}")
_HOST_PORT = re.compile(r"(?P<host>\[[^\[\]]+\]|[^\[\]:]+)(?::(?P<port>[0-9]*))?")

Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def split_host(address: str) -> tuple[str, int | None]:
    """Return host (an IPv6 address without its brackets) and port of ``host[:port]``.

    Raises ValueError for what is neither.
    """
    match = _HOST_PORT.fullmatch(address)
    if match is None:
        raise ValueError(address)
    port = int(match["port"]) if match["port"] else None
    if port is not None and port > 65535:
        raise ValueError(address)
    return match["host"].strip("[]").lower(), port


def canonical_address(scheme: str, address: str) -> str:
    """Return ``address`` with its port spelt out; what is no address stays as it is."""
    try:
        host, port = split_host(address)
    except ValueError:
        return address
    name = f"[{host}]" if ":" in host else host
    return f"{name}:{DEFAULT_PORTS[scheme] if port is None else port}"


def literal(host: str) -> Address | None:
    """Return the address that ``host`` spells, ``None`` when it is a name."""
    host = host.strip("[]").partition("%")[0]
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        if not _NUMERIC.fullmatch(host):
            return None
        # inet_aton(3) forms, which getaddrinfo(3) takes too.
        try:
            return ipaddress.IPv4Address(socket.inet_aton(host))
        except OSError:
            return None
    if isinstance(address, ipaddress.IPv6Address):
        return _embedded(address) or address
    return address


def is_loopback(address: str) -> bool:
    """Return whether ``host[:port]`` is this machine, for which plain http needs no leave."""
    if address.endswith(":"):
        return False
    try:
        host, _ = split_host(address)
    except ValueError:
        return False
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def same_origin(first: str, second: str) -> bool:
    """Return whether two URLs have the same scheme, host and port (RFC 6454, section 4)."""
    return origin_of(first) == origin_of(second)


def origin_of(url: str) -> tuple[str, str, int]:
    """Return scheme, host and port of ``url``; ValueError for a port that there cannot be."""
    split = urlsplit(url)
    scheme = split.scheme.lower()
    # Port 0 is one that nobody can listen on, not the usual one.
    port = DEFAULT_PORTS.get(scheme, 0) if split.port is None else split.port
    return scheme, (split.hostname or "").lower(), port


def scheme_of(url: str) -> str:
    """Return the scheme of ``url`` in lower case, as registries may write it in any (RFC 3986)."""
    return urlsplit(url).scheme


def refusal(url: str, *, registry: str, scheme: str, trusted: Collection[str] = ()) -> str:
    """Return why a redirect from ``registry`` to ``url`` is not followed; ``""`` when it is.

    ``scheme`` is the one of the request that was answered; ``trusted`` are hosts that the settings
    name themselves.
    """
    return _refusal(url, registry, scheme, trusted, near_allowed=True)


def realm_refusal(url: str, *, registry: str, scheme: str, trusted: Collection[str] = ()) -> str:
    """Return why no token is asked for at ``url``; ``""`` when it may be.

    Stricter than a redirect, because credentials go there: an address that is not public must be
    the registry itself, host and port, or be named in the settings.
    """
    return _refusal(url, registry, scheme, trusted, near_allowed=False)


def foreign_refusal(url: str) -> str:
    """Return why a layer is not fetched from ``url`` of its descriptor; ``""`` when it may be."""
    return _refusal(url, "", "https", (), near_allowed=False)


def _refusal(
    url: str, registry: str, scheme: str, trusted: Collection[str], *, near_allowed: bool
) -> str:
    try:
        target_scheme, host, port = origin_of(url)
    except ValueError:
        return "not a URL"
    if target_scheme not in DEFAULT_PORTS:
        return "not http(s)"
    if not host:
        return "no host"
    if target_scheme == "http" and scheme == "https":
        return "from https to http"
    name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if registry and canonical_address(scheme, registry) == name:
        return ""
    if any(canonical_address(target_scheme, known) == name for known in trusted):
        return ""
    target = _nearness(host)
    if target == _PUBLIC:
        return ""
    own = _registry_nearness(registry, trusted)
    if near_allowed and target != _NEVER and target <= own:
        return ""
    return "an address that is not public"


def _registry_nearness(registry: str, trusted: Collection[str]) -> int:
    try:
        host, _ = split_host(registry)
    except ValueError:
        return _PUBLIC
    nearness = _nearness(host)
    if nearness == _PUBLIC and registry in trusted:
        # Plain http by the user's own word: such a registry lives in a private network.
        return _PRIVATE
    return nearness


def is_refused_peer(address: str, registry_peer: str) -> bool:
    """Return whether a *name* to which a registry sent us must not lead to ``address``.

    ``registry_peer`` is the address at which the registry itself was reached, ``""`` when that is
    not known. Private addresses are let pass here: names of storage services lead to them where a
    cloud's private endpoints are used.
    """
    nearness = _nearness(address)
    return nearness > _PRIVATE and nearness > (_nearness(registry_peer) if registry_peer else 0)


def _nearness(host: str) -> int:
    host = host.rstrip(".")
    if host == "localhost" or host.endswith(".localhost"):
        return _LOOPBACK
    address = literal(host)
    if address is None:
        return _PUBLIC
    if address.is_link_local or address.is_multicast:
        return _NEVER
    if address.is_loopback or address.is_unspecified:
        return _LOOPBACK
    return _PRIVATE if not address.is_global else _PUBLIC


def _embedded(address: ipaddress.IPv6Address) -> ipaddress.IPv4Address | None:
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    # NAT64 (RFC 6052) and IPv4-compatible addresses reach the embedded address.
    packed = address.packed
    if packed[:12] == bytes.fromhex("0064ff9b0000000000000000") or (
        packed[:12] == bytes(12) and packed[12] != 0
    ):
        return ipaddress.IPv4Address(packed[12:])
    return None
