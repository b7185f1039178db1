"""A budget of bytes that all uploads of a process share, so that many at a time do not add up to too much memory."""

from __future__ import annotations

import asyncio
from collections import deque
from types import TracebackType
from typing import Self


class ByteBudget:
    """At most `limit` bytes are given out at a time, first come first served. Belongs to one event loop.

    Nobody may wait for more while holding a part that only becomes free by getting more: an upload takes the whole of
    a part before it fills it, so that every part that was begun can also be finished.
    """

    def __init__(self, limit: int) -> None:
        if limit < 1:
            raise ValueError("a budget needs at least one byte")
        self.limit = limit
        self._free = limit
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """Bytes that are not given out."""
        return self._free

    def share(self) -> Share:
        """An empty share of the budget, for one upload; a context manager that gives all back at its end."""
        return Share(self)

    async def take(self, amount: int) -> None:
        """Wait until `amount` bytes are free and it is this caller's turn. Raises ValueError above the limit."""
        if amount > self.limit:
            raise ValueError(f"{amount} bytes can never be free in a budget of {self.limit}")
        if not self._waiting and amount <= self._free:
            self._free -= amount
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted in the very moment of the cancellation
                self.give(amount)
            else:
                self._grant()  # those behind may fit where this one did not
            raise

    def give(self, amount: int) -> None:
        """Give bytes back."""
        self._free += amount
        self._grant()

    def _grant(self) -> None:
        while self._waiting:
            amount, turn = self._waiting[0]
            if not turn.done():  # done before its turn: cancelled
                if amount > self._free:
                    return
                self._free -= amount
                turn.set_result(None)
            self._waiting.popleft()


class Share:
    """What one upload holds of a budget; everything is given back when its context ends."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0

    @property
    def held(self) -> int:
        """Bytes held."""
        return self._held

    async def take(self, amount: int) -> None:
        """Wait for `amount` bytes of the budget."""
        await self._budget.take(amount)
        self._held += amount

    def give(self, amount: int) -> None:
        """Give back `amount` of what is held; nothing once the context ended, which gave all back."""
        amount = min(amount, self._held)
        self._held -= amount
        self._budget.give(amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.give(self._held)
