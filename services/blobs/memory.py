"""Memory for parts of bodies: a budget that all uploads of a process share, and buffers that return their memory."""

from __future__ import annotations

import asyncio
import mmap
import zlib
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from types import TracebackType
from typing import Self

from artifact_store.errors import PushBackError

TURN_SECONDS = 30.0
"""How long an upload waits for its first memory."""

SMALL_BYTES = 256 * 1024
"""An upload that needs no more than this may take it from the bytes that a budget reserves for small uploads."""


class PartBuffer:
    """A buffer of `capacity` bytes, filled from its beginning.

    Its pages come from the system and go back to it at `close`. The heap would keep them: glibc stops mapping large
    blocks on their own once one was freed (mallopt(3), M_MMAP_THRESHOLD), and after a few gigabytes of uploads a
    process was measured to hold three times its budget. A few pages are kept for the next buffers: measured, new pages
    cost twenty times as much processor time as filling existing ones.
    """

    def __init__(self, capacity: int) -> None:
        self._pages: mmap.mmap | None = (
            _SPARE.pop() if _SPARE and capacity <= _SPARE_BYTES else mmap.mmap(-1, max(capacity, _SPARE_BYTES))
        )
        self._capacity = capacity
        self._length = 0
        self._crc32 = 0

    def __len__(self) -> int:
        return self._length

    @property
    def crc32(self) -> int:
        """CRC-32 of the bytes so far, updated as they arrive, while they are still in the processor's cache."""
        return self._crc32

    def append(self, data: bytes | memoryview) -> None:
        """Append bytes. Raises ValueError if there is no room."""
        end = self._length + len(data)
        if self._pages is None or end > self._capacity:
            raise ValueError(f"no room for {end} bytes in a buffer of {self._capacity}, or in a closed one")
        self._pages[self._length : end] = data
        self._length = end
        self._crc32 = zlib.crc32(data, self._crc32)

    def read(self, start: int, end: int) -> bytes:
        """A copy of the bytes from `start` to before `end`, or to the end of the content."""
        return b"" if self._pages is None else self._pages[start : min(end, self._length)]

    def views(self, size: int) -> Iterator[memoryview]:
        """The content, so many bytes at a time and without a copy. Each view ends when the next one is asked for."""
        if self._pages is None:
            return
        with memoryview(self._pages) as pages:
            start = 0
            while start < self._length:  # which is 0 once the buffer is closed
                with pages[start : min(start + size, self._length)] as view:
                    yield view
                start += size

    def clear(self) -> None:
        """Empty the buffer, to be filled again."""
        self._length = self._crc32 = 0

    def close(self) -> None:
        """Give the memory back. The buffer is empty afterwards, so that a lingering request finds nothing."""
        self.clear()
        pages, self._pages = self._pages, None
        if pages is None:
            return
        if len(pages) == _SPARE_BYTES and len(_SPARE) < _MOST_SPARE:
            _SPARE.append(pages)
            return
        with suppress(BufferError):  # a thread still hashes a view of them: its end frees them
            pages.close()


_SPARE_BYTES = 8 << 20
_MOST_SPARE = 4
_SPARE: list[mmap.mmap] = []
"""Pages of closed buffers, of `_SPARE_BYTES` each, for the next buffers of at most that size.

Every smaller buffer has that many bytes too; only the filled pages take memory.
"""


class ByteBudget:
    """At most `limit` bytes are given out at a time, first come, first served. Belongs to one event loop.

    An upload must not wait for more bytes while it holds a part that it can only finish with them. So it takes the
    whole memory of a part before it fills it, and every part that was begun can also be finished.

    In addition, `small` bytes are reserved for uploads that need little, so that they need not queue with those that
    wait for whole parts, which slow clients may hold for long. When these bytes are given out too, a small upload waits
    like any other.
    """

    def __init__(self, limit: int, *, small: int = 0) -> None:
        if limit < 1:
            raise ValueError("a budget needs at least one byte")
        self.limit = limit
        self._free = limit
        self._free_small = small
        self._waiting: deque[tuple[int, asyncio.Future[None]]] = deque()

    @property
    def free(self) -> int:
        """The number of bytes that are free."""
        return self._free

    @property
    def contended(self) -> bool:
        """Whether anybody waits for bytes."""
        return any(not turn.done() for _, turn in self._waiting)

    def share(self) -> Share:
        """An empty share of the budget, for one upload. A context manager, which gives back everything at its end."""
        return Share(self)

    def take_small(self, amount: int) -> bool:
        """Take bytes reserved for small uploads, at once or not at all. Returns whether they were taken."""
        if amount > min(SMALL_BYTES, self._free_small):
            return False
        self._free_small -= amount
        return True

    def give_small(self, amount: int) -> None:
        """Give back what `take_small` took."""
        self._free_small += amount

    async def take(self, amount: int) -> None:
        """Wait until `amount` bytes are free and it is this caller's turn. Raises ValueError above the limit."""
        if amount > self.limit:
            raise ValueError(f"{amount} bytes can never be free in a budget of {self.limit}")
        if self.take_at_once(amount):
            return
        turn: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((amount, turn))
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():  # granted at the moment of the cancellation
                self.give(amount)
            else:
                self._grant()  # those behind may fit where this one did not
            raise

    def take_at_once(self, amount: int) -> bool:
        """Take `amount` bytes if they are free and nobody waits. Returns whether they were taken."""
        if self._waiting or amount > self._free:
            return False
        self._free -= amount
        return True

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
    """The part of a budget that one upload holds; everything is given back when its context ends."""

    def __init__(self, budget: ByteBudget) -> None:
        self._budget = budget
        self._held = 0
        self._small = 0

    @property
    def held(self) -> int:
        """The number of bytes held."""
        return self._held + self._small

    async def take(self, amount: int) -> None:
        """Wait for `amount` bytes of the budget."""
        if not self.take_at_once(amount):
            await self._budget.take(amount)
            self._held += amount

    def take_at_once(self, amount: int) -> bool:
        """Take `amount` bytes of the budget without waiting. Returns whether they were taken."""
        if not self.held and self._budget.take_small(amount):
            self._small = amount
            return True
        if not self._budget.take_at_once(amount):
            return False
        self._held += amount
        return True

    async def take_in_turn(
        self,
        amount: int,
        *,
        seconds: float = TURN_SECONDS,
        others: str = "uploads under way",
        nothing: str = "stored",
        retry_after: float = 5.0,
    ) -> None:
        """Wait for the first bytes, but not for ever, because others may hold all memory and send slowly.

        Raises PushBackError. Its text is "`others` held all memory ...; nothing was `nothing`".
        """
        if self.take_at_once(amount):
            return
        try:
            async with asyncio.timeout(seconds):
                await self.take(amount)
        except TimeoutError:
            raise PushBackError(
                f"{others} held all memory for {seconds:g} s; nothing was {nothing}", retry_after
            ) from None

    def give(self, amount: int) -> None:
        """Give back `amount` bytes. Does nothing after the context has ended, which gave everything back."""
        small = min(amount, self._small)
        self._small -= small
        self._budget.give_small(small)
        amount = min(amount - small, self._held)
        self._held -= amount
        self._budget.give(amount)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.give(self.held)
