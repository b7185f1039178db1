"""Decides where requests may go, and sends them only there.

An owner may name any URL, and its host may resolve to anything, at any time. So addresses are checked where they are
used: the resolver refuses a host if one of its addresses is forbidden, and hands the checked addresses to the
connection. For hosts that are already addresses, a socket with a forbidden address is refused as well. Nothing else
looks up names, and no redirect is followed.

Public addresses are allowed with https. Private, loopback, link-local and all other special ranges are forbidden unless
an operator has listed them; http is allowed there too. An IPv4 address inside an IPv6 address counts as itself.
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any
from urllib.parse import urlsplit

import aiohttp
from aiohttp.abc import AbstractResolver, ResolveResult

from artifact_store.errors import InvalidRequestError

MAX_URL_CHARACTERS = 2_048
MAX_ANSWER_BYTES = 1_024
"""How much of an answer is read, and kept with the delivery."""

_NAT64 = IPv6Network("64:ff9b::/96")
_LOCAL_NAT64 = IPv6Network("64:ff9b:1::/48")
_HOSTS_OF_CLOUDS = frozenset({IPv4Address("168.63.129.16")})
"""Public addresses that serve only machines inside a cloud (Azure's host agent)."""

_HOSTS_REMEMBERED = 10_000

_NUMERIC = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+))*\.?", re.IGNORECASE)

Address = IPv4Address | IPv6Address
Lookup = Callable[[str, int], Awaitable[Iterable[str]]]
"""Finds the addresses of a host."""


class ForbiddenTargetError(OSError):
    """The target is forbidden."""


class NotSentError(Exception):
    """There was no answer; the text says why."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A receiver's answer. `text` is the beginning of its body; None if it must not be shown."""

    status: int
    text: str | None
    retry_after: str | None


class Targets:
    """Sends messages to receivers. Use it inside `async with`, on one event loop."""

    def __init__(
        self, allowed: Iterable[str] = (), *, timeout_seconds: float = 15.0, look_up: Lookup | None = None
    ) -> None:
        """`allowed` are networks (CIDR) in addition to the public ones. A whole request may take `timeout_seconds`.

        Raises ValueError if one of them is not a network.
        """
        self._allowed = [ip_network(text) for text in allowed]
        self._look_up = look_up or _look_up
        self._seconds = timeout_seconds
        self._sessions: dict[str, aiohttp.ClientSession] = {}
        self._public: dict[str, bool] = {}
        """Whether all addresses of a host were public when they were last looked up."""

    def check(self, url: str) -> None:
        """Raise InvalidRequestError unless requests may go to the URL, as far as this is known without a lookup."""
        try:
            parts = urlsplit(url)
            host, port = parts.hostname or "", parts.port
        except ValueError:
            raise InvalidRequestError("url must be https://HOST[:PORT]/PATH") from None
        if parts.scheme not in ("https", "http") or not host or port == 0 or len(url) > MAX_URL_CHARACTERS:
            raise InvalidRequestError(
                f"url must be https://HOST[:PORT]/PATH of at most {MAX_URL_CHARACTERS} characters"
            )
        if not url.isascii() or not url.isprintable() or " " in url or "\\" in url:
            raise InvalidRequestError("url must be ASCII: encode other characters (punycode, percent-encoding)")
        if parts.username is not None or parts.password is not None or parts.fragment:
            raise InvalidRequestError("url must have neither user, password nor fragment")
        address = _address(host)
        if address is None and _NUMERIC.fullmatch(host):
            raise InvalidRequestError("url must write an IPv4 address as four decimal numbers")
        if address is not None and not self._allows(address, parts.scheme):
            raise InvalidRequestError(f"url: {self._why_not(address)}")
        if parts.scheme == "http" and not self._allowed:
            raise InvalidRequestError("url must be https: http is only for networks in ARTIFACT_STORE_WEBHOOK_ALLOW")

    async def __aenter__(self) -> Targets:
        for scheme in ("https", "http"):
            guard = _Guard(self, scheme)
            connector = aiohttp.TCPConnector(
                resolver=guard,
                socket_factory=guard.open_socket,
                use_dns_cache=False,
                limit=0,  # each subscription has its own limit: hanging receivers must not use up that of others
                keepalive_timeout=30.0,
                ssl=ssl.create_default_context(),
            )
            self._sessions[scheme] = aiohttp.ClientSession(
                connector=connector,
                timeout=aiohttp.ClientTimeout(total=self._seconds),
                cookie_jar=aiohttp.DummyCookieJar(),
                auto_decompress=False,
                trust_env=False,
                headers={"User-Agent": "artifact-store", "Accept-Encoding": "identity"},
            )
        return self

    async def __aexit__(self, *_: object) -> None:
        for session in self._sessions.values():
            await session.close()

    async def send(self, url: str, body: bytes, headers: dict[str, str]) -> Answer:
        """Send a message. Redirects are answers like any other. Takes at most the time-out.

        Raises NotSentError: the target is forbidden, cannot be reached, or gives no answer in time or no HTTP answer.
        """
        try:
            return await self._post(url, body, headers)
        except TimeoutError:
            raise NotSentError(f"no answer within {self._seconds:g} s") from None
        except InvalidRequestError as error:
            raise NotSentError(error.detail) from None
        except (aiohttp.ClientError, OSError, ValueError) as error:
            raise NotSentError(_reason(error)) from None

    async def _post(self, url: str, body: bytes, headers: dict[str, str]) -> Answer:
        self.check(url)
        parts = urlsplit(url)
        scheme, host = parts.scheme, parts.hostname or ""
        if (address := _address(host)) is not None:
            self._note(host, public=_is_public(_effective(address)))
        async with self._sessions[scheme].post(url, data=body, headers=headers, allow_redirects=False) as response:
            received = await response.content.read(MAX_ANSWER_BYTES)
            # Owners must not see answers from private networks: they might subscribe in order to read them.
            text = received.decode("utf-8", "replace") if self._public.get(host) else None
            return Answer(response.status, text, response.headers.get("Retry-After"))

    async def addresses(self, host: str, port: int, scheme: str) -> list[str]:
        """The addresses of a host. Raises ForbiddenTargetError unless all of them are allowed, and OSError."""
        found = list(await self._look_up(host, port))
        if not found:
            raise OSError(f"{host} has no address")
        for text in found:
            self.require(text, scheme)
        self._note(host, public=all(_is_public(_effective(ip_address(text.partition("%")[0]))) for text in found))
        return found

    def _note(self, host: str, *, public: bool) -> None:
        if len(self._public) >= _HOSTS_REMEMBERED:
            self._public.clear()
        self._public[host] = public

    def require(self, text: str, scheme: str) -> None:
        """Raise ForbiddenTargetError unless requests may go to this address."""
        address = _address(text)
        if address is None or not self._allows(address, scheme):
            why = "its address cannot be read" if address is None else self._why_not(address)
            raise ForbiddenTargetError(why)

    def _allows(self, address: Address, scheme: str) -> bool:
        effective = _effective(address)
        if any(effective in network or address in network for network in self._allowed):
            return True
        return scheme == "https" and _is_public(effective)

    @staticmethod
    def _why_not(address: Address) -> str:
        if _is_public(_effective(address)):
            return f"{address} is not in ARTIFACT_STORE_WEBHOOK_ALLOW, so it must be reached by https"
        return f"{address} is no public address, and not in ARTIFACT_STORE_WEBHOOK_ALLOW"


class _Guard(AbstractResolver):
    """Checks where the requests of one scheme go."""

    def __init__(self, targets: Targets, scheme: str) -> None:
        self._targets = targets
        self._scheme = scheme

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        """See `AbstractResolver`."""
        found = await self._targets.addresses(host, port, self._scheme)
        return [
            ResolveResult(
                hostname=host,
                host=text,
                port=port,
                family=socket.AF_INET6 if ":" in text else socket.AF_INET,
                proto=socket.IPPROTO_TCP,
                flags=socket.AI_NUMERICHOST | socket.AI_NUMERICSERV,
            )
            for text in found
        ]

    async def close(self) -> None:
        """See `AbstractResolver`."""

    def open_socket(self, about: tuple[Any, ...]) -> socket.socket:
        """A socket for this address. This is the last moment to refuse the address."""
        family, kind, protocol, _, where = about
        self._targets.require(where[0], self._scheme)
        return socket.socket(family, kind, protocol)


def _reason(error: BaseException) -> str:
    """Why there is no answer. Contains nothing that the receiver sent."""
    for cause in (error, error.__cause__, error.__context__, getattr(error, "os_error", None)):
        if isinstance(cause, ForbiddenTargetError):
            return str(cause)
    if isinstance(error, aiohttp.ClientConnectorError):
        return f"no connection: {error.os_error.strerror or type(error.os_error).__name__}"
    if isinstance(error, aiohttp.ClientConnectionError):
        return "the connection was lost"
    if isinstance(error, aiohttp.ClientPayloadError):
        return "the answer was cut off"
    if isinstance(error, aiohttp.ClientResponseError):
        return "the answer is not HTTP"
    return type(error).__name__


async def _look_up(host: str, port: int) -> Iterable[str]:
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return [str(where[0]) for *_, where in found]


def _address(text: str) -> Address | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _effective(address: Address) -> Address:
    """The IPv4 address that an IPv6 address embeds in any form; otherwise the address itself."""
    if isinstance(address, IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address.sixtofour is not None:
        return address.sixtofour
    if address in _NAT64 or int(address) >> 32 == 0:
        return IPv4Address(int(address) & 0xFFFFFFFF) if int(address) > 1 else address
    return address


def _is_public(address: Address) -> bool:
    if address in _HOSTS_OF_CLOUDS or address.is_multicast or address.is_reserved or address.is_unspecified:
        return False
    if isinstance(address, IPv6Address) and (address.is_site_local or address in _LOCAL_NAT64):
        return False
    return address.is_global
