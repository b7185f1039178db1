"""A feed of lines for one client: read ahead of the client by a bounded number of bytes, handed over in pieces."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing, asynccontextmanager

AHEAD_BYTES = 64 * 1024
"""Most bytes that wait for a slow client, beside one event; behind them reading stops."""


class Feed:
    """The reading end and the writing end of the bytes in between. Belongs to one event loop."""

    def __init__(self, lines: AsyncGenerator[bytes], patience: float | None = None) -> None:
        self._patience = patience
        self._waiting = bytearray()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._reader = asyncio.create_task(self._read(lines))
        self._reader.add_done_callback(lambda _: self._news.set())

    async def take(self) -> bytes | None:
        """Wait for news and return all bytes that are waiting; None at the end.

        May return no bytes: an empty line says that there is something to tell, if only that nothing failed. Cancelling
        it loses nothing. Raises what reading the lines raised, after the bytes that came before.
        """
        await self._news.wait()
        if not self._waiting and self._reader.done():
            self._reader.result()
            return None
        piece = bytes(self._waiting)
        self._waiting.clear()
        self._room.set()
        if not self._reader.done():
            self._news.clear()
        return piece

    async def close(self) -> None:
        """Stop reading; returns when the source is closed."""
        self._reader.cancel()
        await asyncio.wait([self._reader])

    async def _read(self, lines: AsyncGenerator[bytes]) -> None:
        async with aclosing(lines):
            async for line in lines:
                self._waiting += line
                self._news.set()
                if len(self._waiting) >= AHEAD_BYTES:
                    self._room.clear()
                    try:
                        async with asyncio.timeout(self._patience):
                            await self._room.wait()
                    except TimeoutError:
                        return


@asynccontextmanager
async def feed(lines: AsyncGenerator[bytes], patience: float | None = None) -> AsyncIterator[Feed]:
    """A feed of these lines, closed on the way out.

    With `patience`, it ends early, the lines closed, when a client takes nothing of AHEAD_BYTES for so many seconds.
    """
    opened = Feed(lines, patience)
    try:
        yield opened
    finally:
        await opened.close()
