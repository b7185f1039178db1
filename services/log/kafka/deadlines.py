"""The time by which a partition's requests must be answered: one timer for all, where a timer each costs as much as the
rest of a request's way through the event loop.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any


class Deadlines:
    """Futures of one partition, which get an error when `seconds` are over; for use on the event loop.

    They are answered about in the order in which they came, so that few are remembered beyond their answer.
    """

    def __init__(self, seconds: float, late: Callable[[], Exception]) -> None:
        """`late` makes the error."""
        self._seconds = seconds
        self._late = late
        self._open: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def remembered(self) -> int:
        """How many futures are held, answered ones included."""
        return len(self._open)

    def unanswered(self) -> list[asyncio.Future[Any]]:
        """Those that still wait."""
        return [answer for _, answer in self._open if not answer.done()]

    def watch(self, answer: asyncio.Future[Any]) -> None:
        """Give the future `seconds` from now."""
        loop, waiting = answer.get_loop(), self._open
        while waiting and waiting[0][1].done():
            waiting.popleft()
        waiting.append((loop.time() + self._seconds, answer))
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now, waiting = loop.time(), self._open
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, answer = waiting.popleft()
            if not answer.done():
                answer.set_exception(self._late())
        self._timer = loop.call_at(waiting[0][0], self._expire, loop) if waiting else None
