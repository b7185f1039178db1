"""Which names a gateway is reached by, and whose pages may send to it: the defence against pages of strangers.

A page in a browser sends to whatever its own name resolves to. When its owner lets that name resolve to 127.0.0.1 (DNS
rebinding), the browser takes a gateway on loopback for the page's own server. `Host` still has the page's name then. A
page that sends to another name shows itself by `Origin` (Fetch standard).
"""

from __future__ import annotations

import ipaddress
from collections.abc import Collection, Iterable
from functools import lru_cache
from urllib.parse import urlsplit

from ingest_gateway.protocol.http_errors import ForeignOriginError, MalformedHttpError, UnknownHostError

_ALWAYS_LOCAL = ("localhost",)
_REMEMBERED = 256
_MEND = "name it in ARTIFACT_STORE_ALLOWED_HOSTS"


class AllowedHosts:
    """The hosts that requests may name. One without a port stands for any port."""

    def __init__(self, allowed_hosts: Collection[str] = (), *, loopback: bool = True) -> None:
        """Unless the gateway listens on `loopback`, no `allowed_hosts` means that any host will do."""
        self._allowed = frozenset(host.lower() for host in allowed_hosts)
        self._any = not loopback and not allowed_hosts
        self._checked = lru_cache(_REMEMBERED)(self._check)

    def check(self, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """Check all values of `Host` and `Origin`. What sends neither is no page in a browser.

        Raises MalformedHttpError, UnknownHostError, ForeignOriginError.
        """
        self._checked(tuple(hosts), tuple(origins))

    def _check(self, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
        if len(hosts) > 1 or len(origins) > 1:
            raise MalformedHttpError("a request has one Host and one Origin at most")
        host = next(iter(hosts), "").lower()
        if hosts and not self._any and not self._is_ours(host):
            raise UnknownHostError(f"this gateway is not called {host[:255]!a}: if it should be, {_MEND}")
        for origin in origins:
            authority = _authority(origin)
            if authority != host and not self._is_allowed(authority):
                raise ForeignOriginError(
                    f"pages of {origin[:255]!a} may not send to this gateway: if it serves them, {_MEND}"
                )

    def _is_ours(self, authority: str) -> bool:
        """An address is nobody's name, and so cannot be made to resolve elsewhere."""
        return self._is_allowed(authority) or _is_address(authority) or _name(authority) in _ALWAYS_LOCAL

    def _is_allowed(self, authority: str) -> bool:
        return authority in self._allowed or _name(authority) in self._allowed


def _authority(origin: str) -> str:
    try:
        return urlsplit(origin.lower()).netloc
    except ValueError:
        return ""


def _name(authority: str) -> str:
    name, _, port = authority.rpartition(":")
    return name if name and port.isdecimal() else authority


def _is_address(authority: str) -> bool:
    name = _name(authority)
    try:
        ipaddress.ip_address(name[1:-1] if name.startswith("[") and name.endswith("]") else name)
    except ValueError:
        return False
    return True
