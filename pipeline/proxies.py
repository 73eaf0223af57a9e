"""Which proxy a request goes through: the environment variables that every tool reads.

Invariant: loopback is never reached through a proxy, and a proxy's credentials are its own: they
are never part of a request to an origin.
"""

from __future__ import annotations

import ipaddress
from dataclasses import field
from typing import TYPE_CHECKING

from stowray.pipeline.addresses import (
    DEFAULT_PORTS,
    is_loopback,
    literal,
    origin_of,
    split_host,
)
from stowray.pipeline.errors import UsageError
from stowray.pipeline.redact import public_url, url_secrets
from stowray.pipeline.values import dataclass

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Proxies:
    """Proxy URLs by scheme (``""`` for none) and the hosts that are reached without one."""

    http: str = field(default="", repr=False)
    https: str = field(default="", repr=False)
    bypass: tuple[str, ...] = ()

    @classmethod
    def read(cls, environment: Mapping[str, str]) -> Proxies:
        """Return what the environment says; lower case wins over upper case, as in curl."""

        def value(name: str) -> str:
            # In CGI the request header "Proxy:" becomes HTTP_PROXY (httpoxy, CVE-2016-5385).
            upper = name.upper()
            if upper == "HTTP_PROXY" and "REQUEST_METHOD" in environment:
                upper = ""
            return (environment.get(name) or environment.get(upper) or "").strip()

        # Under its own name, as it is the one to be mended.
        fallback = _checked("all_proxy", value("all_proxy"))
        bypass = tuple(part.lower() for part in value("no_proxy").replace(",", " ").split())
        return cls(
            http=_checked("http_proxy", value("http_proxy") or fallback),
            https=_checked("https_proxy", value("https_proxy") or fallback),
            bypass=bypass,
        )

    def secrets(self) -> tuple[str, ...]:
        """Return the passwords in the proxies' URLs."""
        return (*url_secrets(self.http), *url_secrets(self.https))

    def choose(self, url: str) -> str:
        """Return the proxy for ``url``, ``""`` for none."""
        scheme, host, port = origin_of(url)
        proxy = self.https if scheme == "https" else self.http
        if not proxy or is_loopback(f"[{host}]" if ":" in host else host):
            return ""
        return "" if any(_matches(rule, host, port) for rule in self.bypass) else proxy


def _checked(name: str, proxy: str) -> str:
    if not proxy:
        return ""
    if "://" not in proxy:
        proxy = f"http://{proxy}"
    try:
        scheme, host, _ = origin_of(proxy)
    except ValueError:
        scheme, host = "", ""
    if scheme not in DEFAULT_PORTS or not host:
        raise UsageError(name.upper(), f"not the URL of an http(s) proxy: {public_url(proxy)}")
    return proxy


def _matches(rule: str, host: str, port: int) -> bool:
    """Return whether a NO_PROXY entry covers ``host``: name, suffix, address, network, ``*``."""
    if rule == "*":
        return True
    address = literal(host)
    if "/" in rule:
        try:
            network = ipaddress.ip_network(rule, strict=False)
        except ValueError:
            return False
        return address is not None and address.version == network.version and address in network
    bare = literal(rule) if rule.count(":") > 1 and not rule.startswith("[") else None
    if bare is not None:
        return address == bare
    try:
        name, wanted = split_host(rule)
    except ValueError:
        return False
    if wanted is not None and wanted != port:
        return False
    if (own := literal(name)) is not None:
        return address == own
    name = name.removeprefix("*").strip(".")
    return host == name or host.endswith("." + name)
