"""Connections: HTTP as aiohttp speaks it, with our limits, and problems for what is no HTTP at all."""

from __future__ import annotations

import asyncio

from aiohttp import web

from ingest_gateway.problems import MalformedHttpError, answer_of

HEADER_BYTES = 32 * 1024
"""Longest request line and longest header; a position of a thousand partitions has some 20 KiB."""

KEEP_ALIVE_SECONDS = 75.0
"""How long a connection may stand without a request, or take for the head of its first one."""


class Connection(web.RequestHandler):
    """One client's connection."""

    __slots__ = ()

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
        response = answer_of(MalformedHttpError(f"this is not HTTP that can be read: {lines[0][:200]}"))
        response.force_close()
        return response


class Server(web.Server):
    """Makes a connection for every client."""

    def __call__(self) -> web.RequestHandler:
        return Connection(
            self,
            loop=asyncio.get_running_loop(),
            access_log=None,  # type: ignore[arg-type]  # how aiohttp is told to keep none: `App` keeps ours
            keepalive_timeout=KEEP_ALIVE_SECONDS,
            max_line_size=HEADER_BYTES,
            max_field_size=HEADER_BYTES,
            auto_decompress=False,  # bytes are stored as they are sent
        )
