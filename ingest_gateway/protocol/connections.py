"""Connections: aiohttp's HTTP with our limits, and problem documents for requests that cannot be parsed.

A connection for which there is no place is still accepted, so that its client learns why and when to retry: it gets the
answer to one request and is closed. Few such connections exist at a time, and none stays long.

`AllowedHosts` are the names of a gateway, and the defence against foreign web pages. A page in a browser sends requests
to the addresses of its own name. If its owner makes that name resolve to 127.0.0.1 (DNS rebinding), the browser takes a
gateway on loopback for the page's server. `Host` still has the page's name then. A page that sends to another name is
recognised by `Origin` (Fetch standard).
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from aiohttp import web
from aiohttp.http_exceptions import BadHttpMessage

from artifact_store.errors import ArtifactStoreError, PushBackError
from artifact_store.rules import parse_number
from ingest_gateway.admission import Places, Room
from ingest_gateway.protocol.http_errors import (
    ForeignOriginError,
    HeadTooLargeError,
    MalformedHttpError,
    UnknownHostError,
)

HEADER_BYTES = 32 * 1024
"""Longest request line and longest header; a position of 1,024 partitions has 6 KiB, in the previous format 11."""

HEAD_BYTES = 64 * 1024
"""Longest head of a request: its line and all its headers."""

_PIECE_BYTES = 16 * 1024  # of what may hold the end of a body: so many bytes of a head may be parsed before they count
_HEAD_END = b"\r\n\r\n"
_CLOSE = {"Connection": "close"}

KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may be idle, or take to send the head of its first request."""

QUIET_SECONDS = 0.5
"""While it stops, a gateway closes connections that have been idle for this long."""

_LOOK_SECONDS = 0.02

_SITE_BITS = 64

MAX_EXCESS = 128
"""How many connections without a place may exist at a time. Further ones are aborted."""

EXCESS_SECONDS = 10.0
"""How long one of them may exist; also how long the rest of an unwanted body is read."""


class Connection(web.RequestHandler):
    """One client's connection. `refusal` says why it has no place; None if it has one."""

    __slots__ = ("_client", "_cut_off", "_heads", "_leaving", "_server", "refusal")

    def __init__(self, server: Server) -> None:
        super().__init__(
            server,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # how aiohttp is told to keep none: `App` keeps ours
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            auto_decompress=False,  # bytes are stored as they are sent
        )
        self._server = server
        self._client: str | None = None
        self._heads: _BoundedParser | None = None
        self._leaving: set[Callable[[], None]] = set()
        self._cut_off: BaseException | None = None
        self.refusal: PushBackError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Take a place, or note why there is none."""
        super().connection_made(transport)
        client = client_of(self)
        self._heads = _BoundedParser(self._parser, self._server.heads, client, self._is_idle)
        self._parser = self._heads  # type: ignore[assignment]  # it has what is called of a parser
        try:
            self._server.places.take(client)
        except PushBackError as error:
            self.refusal = error
            self._server.exceeded(self)
        else:
            self._client = client

    def connection_lost(self, exc: BaseException | None) -> None:
        """Give the place back."""
        super().connection_lost(exc)
        if self._heads is not None:
            self._heads.release()
            self._heads = None  # it refers to this connection
        if self._client is not None:
            self._server.places.give(self._client)
            self._client = None
        self._server.excess.discard(self)
        for leave in tuple(self._leaving):
            leave()

    async def start(self) -> None:
        """Answer requests until the connection ends.

        If an answer is cut off, an error ends it. The tracebacks of the error and of its cause hold frames, which hold
        the task, which holds the error. Only a full garbage collection would free this cycle, and all that it holds.
        """
        try:
            await super().start()
        finally:
            error, self._cut_off = self._cut_off, None
            while error is not None:
                error.__traceback__, error = None, error.__context__

    @contextmanager
    def when_lost(self, leave: Callable[[], None]) -> Iterator[None]:
        """Call `leave` as soon as the connection is lost, if that happens during the block."""
        self._leaving.add(leave)
        try:
            yield
        finally:
            self._leaving.discard(leave)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to a head that the parser refused. `App` answers all other errors.

        Raises ConnectionError if an answer has begun, or if there is nobody to answer.
        """
        if request.writer.output_size > 0 or status != 400:
            self._cut_off = ConnectionResetError("the answer was cut off")
            raise self._cut_off from exc
        if isinstance(exc, _RefusedHeadError):
            return self._server.refuse(request, exc.reason)
        lines = (message or "").strip().splitlines() or ["it is malformed"]
        return self._server.refuse(
            request,
            MalformedHttpError(f"this is not valid HTTP: {lines[0][:200]}", _CLOSE),
        )

    def _is_idle(self) -> bool:
        """Whether no request is being answered or waiting for its answer."""
        return self._current_request is None and not self._messages

    def quiet_since(self) -> float | None:
        """When the last answer ended, on the event loop's clock (s); None while a request arrives or is in progress."""
        if self._waiter is None or self._waiter.done() or self._heads is None or self._heads.has_begun:
            return None
        return self._next_keepalive_close_time - KEEP_ALIVE_SECONDS

    def cut(self) -> None:
        """Abort the connection."""
        if self.transport is not None:
            self.transport.abort()


class _RefusedHeadError(BadHttpMessage):
    """A head that is too large, malformed, or without room: in the form that aiohttp expects from a parser."""

    def __init__(self, reason: ArtifactStoreError) -> None:
        super().__init__(reason.detail)
        self.reason = reason


class _BoundedParser:
    """aiohttp's parser of one connection, with a bound for each head and for the heads of all connections together.

    The parser bounds only the line length and the number of lines, and so lets a head grow to 4 MiB. The beginning of
    a head is known only after the parser has read a piece, so pieces are small where a body may end.
    """

    def __init__(self, parser: Any, room: Room, client: str, is_idle: Callable[[], bool]) -> None:
        """`is_idle` says whether all requests parsed so far are answered."""
        self._parser = parser
        self._room = room
        self._client = client
        self._is_idle = is_idle
        self._held = 0
        """How many bytes of the room are taken."""
        self._head = 0  # bytes of the current head
        self._body: Any = None  # the payload of the current body
        self._left: int | None = None  # bytes that it still lacks; None if chunks determine its end
        self._last = b""  # its last bytes
        self._failed = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._parser, name)

    def feed_data(self, data: bytes) -> tuple[Sequence[Any], bool, bytes]:
        """See aiohttp's parsers. Raises _RefusedHeadError; BadHttpMessage. After either, further data is ignored."""
        messages: list[Any] = []
        upgraded, tail, at = False, b"", 0
        while not self._failed:
            piece = data[at : at + self._step(data, at)]
            at += len(piece)
            try:
                found, upgraded, tail = self._parser.feed_data(piece)
                self._count(piece, found)
            except BadHttpMessage:
                self._fail()
                raise
            except (IndexError, ValueError):  # yarl raises IndexError for a target such as http://[::1]@/
                self._fail()
                raise _RefusedHeadError(MalformedHttpError("the request target is not a URL", _CLOSE)) from None
            messages += found
            if upgraded or at == len(data):
                tail += data[at:]
                break
        return messages, upgraded, tail

    @property
    def has_begun(self) -> bool:
        """Whether a head has begun and not ended yet."""
        return self._head > 0

    def _fail(self) -> None:
        self._failed = True
        self.release()

    def release(self) -> None:
        """Give back all room."""
        if self._held:
            self._room.give(self._client, self._held)
            self._held = 0

    def _step(self, data: bytes, at: int) -> int:
        """How many of the bytes from `at` on may be parsed at once."""
        rest = len(data) - at
        if self._body is None:
            return _PIECE_BYTES
        if self._left is not None:
            return rest if self._left > rest else _PIECE_BYTES
        straddling = self._last + data[at : at + len(_HEAD_END) - 1]
        return _PIECE_BYTES if _HEAD_END in straddling or data.find(_HEAD_END, at) >= 0 else rest

    def _count(self, piece: bytes, found: Sequence[Any]) -> None:
        """Take room for the heads in a piece, and for bytes after the end of a body: they begin the next head."""
        # Searched only where a head ended: a search through all bytes of a large body takes a tenth of its time.
        behind = len(piece) - piece.find(_HEAD_END) - len(_HEAD_END) if found else 0
        for message, body in found:
            size = len(message.path) + sum(len(name) + len(value) + 4 for name, value in message.raw_headers)
            self._hold(size, more=max(0, size - self._head))
            behind -= body.total_bytes + (size if self._body is not None else 0)
            self._head, self._body = 0, body
            self._left = None if message.chunked else _length_of(message.headers) - body.total_bytes
        if not found and self._body is not None and self._left is not None:
            self._left -= len(piece)
            behind = -self._left
        self._last = piece[1 - len(_HEAD_END) :]
        if self._body is None:
            behind = len(piece)
        elif not self._body.is_eof():
            return
        elif self._left is None:
            behind = len(piece) - piece.rfind(_HEAD_END) - len(_HEAD_END)
        self._body = None
        if behind > 0:
            self._head += behind
            self._hold(self._head, more=behind)

    def _hold(self, size: int, *, more: int) -> None:
        if size > HEAD_BYTES:
            raise _RefusedHeadError(
                HeadTooLargeError(f"the head of a request may have at most {HEAD_BYTES:,} bytes", _CLOSE)
            )
        if size == more and self._is_idle():
            self.release()
        try:
            self._room.take(self._client, more)
        except PushBackError as error:
            raise _RefusedHeadError(error) from None
        self._held += more


def _length_of(headers: Mapping[str, str]) -> int:
    """The body's length. Raises _RefusedHeadError if it has too many digits: aiohttp's parser accepts any number."""
    length = parse_number(headers.get("Content-Length", "0"))
    if length is None:
        raise _RefusedHeadError(MalformedHttpError("Content-Length is not a number of at most 19 digits", _CLOSE))
    return length


class Server(web.Server):
    """Creates a connection for every client."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        refuse: Callable[[web.BaseRequest, ArtifactStoreError], web.StreamResponse],
        places: Places,
        heads: Room,
    ) -> None:
        """`refuse` answers a refused head. All connections share `places` and `heads`."""
        super().__init__(handler)
        self.refuse = refuse
        self.places = places
        self.heads = heads
        self.excess: set[Connection] = set()

    def __call__(self) -> web.RequestHandler:
        return Connection(self)

    async def let_go(self) -> None:
        """Close every connection once it has been idle for QUIET_SECONDS. Returns when none is left.

        After an answer with `Connection: close`, a client sends no further request on that connection. After any other
        answer it may be sending one at this moment, which would be lost.
        """
        loop = asyncio.get_running_loop()
        while self.connections:
            for connection in self.connections:
                since = connection.quiet_since() if isinstance(connection, Connection) else None
                if since is not None and loop.time() - since >= QUIET_SECONDS:
                    connection.force_close()
            await asyncio.sleep(_LOOK_SECONDS)

    def exceeded(self, connection: Connection) -> None:
        """Keep a connection without a place for EXCESS_SECONDS, or abort it if there are too many."""
        if len(self.excess) >= MAX_EXCESS:
            connection.cut()
            return
        self.excess.add(connection)
        asyncio.get_running_loop().call_later(EXCESS_SECONDS, connection.cut)


def client_of(protocol: web.RequestHandler) -> str:
    """The client for which limits are counted: an IPv4 address or an IPv6 network."""
    peer = protocol.peername
    return _counted_as(peer[0]) if isinstance(peer, tuple) else ""


@lru_cache(4096)
def _counted_as(address: str) -> str:
    """The address, or its /64 for IPv6: a site has a whole /64 (RFC 6177), and could pose as many clients with it."""
    found = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(found, ipaddress.IPv4Address):
        return address
    return str(found.ipv4_mapped or ipaddress.ip_network((found, _SITE_BITS), strict=False))


_ALWAYS_LOCAL = ("localhost",)
_REMEMBERED = 256
_MEND = "name it in ARTIFACT_STORE_ALLOWED_HOSTS"


class AllowedHosts:
    """The hosts that requests may name. A host without a port allows any port."""

    def __init__(self, allowed_hosts: Collection[str] = (), *, loopback: bool = True) -> None:
        """Without `allowed_hosts`, any host is allowed, unless the gateway listens on `loopback`."""
        self._allowed = frozenset(host.lower() for host in allowed_hosts)
        self._any = not loopback and not allowed_hosts
        self._checked = lru_cache(_REMEMBERED)(self._check)

    def check(self, hosts: Iterable[str], origins: Iterable[str]) -> None:
        """Check all values of `Host` and `Origin`. A page in a browser always sends one of them.

        Raises MalformedHttpError, UnknownHostError, ForeignOriginError.
        """
        self._checked(tuple(hosts), tuple(origins))

    def _check(self, hosts: tuple[str, ...], origins: tuple[str, ...]) -> None:
        if len(hosts) > 1 or len(origins) > 1:
            raise MalformedHttpError("a request may have only one Host and one Origin")
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
        """An address always counts as ours: it is not a name, and so cannot be made to resolve elsewhere."""
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
