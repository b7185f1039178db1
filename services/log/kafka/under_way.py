"""Requests on their way to a writer, which a shutdown waits for."""

from __future__ import annotations

import asyncio


class UnderWay:
    """Counts the requests that `close` waits for and that no writer of this process has yet."""

    def __init__(self) -> None:
        self._count = 0
        self._idle = asyncio.Event()
        self._idle.set()

    def __enter__(self) -> None:
        self._count += 1
        self._idle.clear()

    def __exit__(self, *_: object) -> None:
        self._count -= 1
        if not self._count:
            self._idle.set()

    async def none(self) -> None:
        """Wait until there is none."""
        await self._idle.wait()
