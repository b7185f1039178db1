"""Slow bodies must not hold what others wait for: one that trickles in is given up, but only while somebody waits."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterable, AsyncIterator, Callable
from types import TracebackType
from typing import Generic, Self, TypeVar

from services.errors import PushBackError

Piece = TypeVar("Piece")
Part = TypeVar("Part")

LOOK_SECONDS = 5.0
SLOW_BYTES_PER_SECOND = 64 * 1024
"""At this pace a part of 8 MiB is held for two minutes."""

_MOSTLY = 0.8
_RETRY_SECONDS = 10.0


class Pace(Generic[Piece]):
    """A body, and a block in which it is read; the block ends in PushBackError when the body is slow and others wait.

    About every `look_seconds` it is asked whether others are `waiting`. If so, and if most of that time was spent
    waiting for the body, which brought less than SLOW_BYTES_PER_SECOND, what runs in the block is cancelled. A store
    that is slow is not held against the body.
    """

    def __init__(
        self,
        body: AsyncIterable[Piece],
        waiting: Callable[[], bool],
        *,
        size: Callable[[Piece], int],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """`size` says how many bytes a piece of the body has."""
        self._body = body
        self._size = size
        self._others_wait = waiting
        self._look_seconds = look_seconds
        self._window = look_seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._got = 0
        self._waited = 0.0
        self._since: float | None = None

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._look_later()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, at)
        except TimeoutError:
            if not self._limit.expired():
                raise
            raise PushBackError(
                f"the body came at less than {SLOW_BYTES_PER_SECOND // 1024} KiB/s while other uploads waited for the "
                "memory that it held; nothing was stored",
                _RETRY_SECONDS,
            ) from None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self.watched(self._body, self._size)

    async def watched(self, stream: AsyncIterable[Part], size: Callable[[Part], int]) -> AsyncIterator[Part]:
        """A stream that is itself a piece of the body, read before the next piece is asked for: it counts as the body.

        `size` says how many bytes a part of it has.
        """
        self._since = self._loop.time()
        async for part in stream:
            self._waited += self._loop.time() - self._since
            self._since = None
            self._got += size(part)
            yield part
            self._since = self._loop.time()
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None:
            self._waited += now - self._since
            self._since = now
        slow = self._got < self._window * SLOW_BYTES_PER_SECOND
        if slow and self._waited >= _MOSTLY * self._window and self._others_wait():
            self._limit.reschedule(now)
            return
        self._got, self._waited = 0, 0.0
        self._look_later()

    def _look_later(self) -> None:
        # Drawn, so that of many slow bodies one makes room and the others see that nobody waits any more.
        self._window = self._look_seconds * random.uniform(0.75, 1.25)
        self._timer = self._loop.call_later(self._window, self._look)
