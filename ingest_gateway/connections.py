"""Connections: HTTP as aiohttp speaks it, with our limits, and problems for what is no HTTP at all.

A connection for which there is no place is taken all the same, so that its client hears why and when to come again: it
gets the answer to one request and is closed. Of these there are few at a time, and none stays long.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from aiohttp import web

from ingest_gateway.admission import Places
from services.errors import PushBackError

HEADER_BYTES = 32 * 1024
"""Longest request line and longest header; a position of a thousand partitions has some 20 KiB."""

KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may stand without a request, or take for the head of its first one."""

MAX_EXCESS = 128
"""How many connections without a place there may be at a time; further ones are cut off."""

EXCESS_SECONDS = 10.0
"""How long one of them may stand; also how long the rest of a body is read that nobody wants."""


class Connection(web.RequestHandler):
    """One client's connection. `refusal` says why it has no place, if it has none."""

    __slots__ = ("_client", "_server", "refusal")

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
        self.refusal: PushBackError | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin, with a place or without one."""
        super().connection_made(transport)
        client = client_of(self)
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
        if self._client is not None:
            self._server.places.give(self._client)
            self._client = None
        self._server.excess.discard(self)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """The answer to what the parser refused; `App` has answered everything else, so that only cuts remain.

        Raises ConnectionError where there is nobody to answer or an answer has begun.
        """
        if request.writer.output_size > 0 or status != 400:
            raise ConnectionResetError("the answer was cut off") from exc
        lines = (message or "").strip().splitlines() or ["it is malformed"]
        return self._server.refuse(request, lines[0][:200])

    def cut(self) -> None:
        """End it at once."""
        if self.transport is not None:
            self.transport.abort()


class Server(web.Server):
    """Makes a connection for every client."""

    def __init__(
        self,
        handler: Callable[[web.BaseRequest], Awaitable[web.StreamResponse]],
        refuse: Callable[[web.BaseRequest, str], web.StreamResponse],
        places: Places,
    ) -> None:
        """`refuse` answers what the parser could not read, and is told why."""
        super().__init__(handler)
        self.refuse = refuse
        self.places = places
        self.excess: set[Connection] = set()

    def __call__(self) -> web.RequestHandler:
        return Connection(self)

    def exceeded(self, connection: Connection) -> None:
        """There is one more without a place."""
        if len(self.excess) >= MAX_EXCESS:
            connection.cut()
            return
        self.excess.add(connection)
        asyncio.get_running_loop().call_later(EXCESS_SECONDS, connection.cut)


def client_of(protocol: web.RequestHandler) -> str:
    """Whose connection this is: the address, without the port."""
    peer = protocol.peername
    return peer[0] if isinstance(peer, tuple) else ""
