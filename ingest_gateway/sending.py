"""Answers on their way to clients that may be slow: waited for as long as they take bytes, and no longer."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable

from aiohttp import web

from ingest_gateway.admission import Bounds
from ingest_gateway.problems import AnswerTimeoutError

SENT_AT_ONCE_BYTES = 256 * 1024
"""Most bytes that a client has one span of time for: the longer the piece, the later it shows that nobody takes it."""


async def taken(writing: Awaitable[None], size: int, bounds: Bounds) -> None:
    """Wait until `size` bytes are written.

    Raises ConnectionError; AnswerTimeoutError: the client takes less than `Bounds.body_bytes_per_second`, measured over
    `Bounds.body_idle_seconds` at least. Only time in which it is waited for counts.
    """
    seconds = max(bounds.body_idle_seconds, size / bounds.body_bytes_per_second)
    try:
        async with asyncio.timeout(seconds):
            await writing
    except TimeoutError:
        raise AnswerTimeoutError(f"the client did not take {size:,} bytes of it within {seconds:g} s") from None


def held(response: web.StreamResponse) -> bytes:
    """The body that an answer holds whole; nothing of one that is streamed."""
    return response.body if isinstance(response, web.Response) and isinstance(response.body, bytes) else b""
