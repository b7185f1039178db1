"""The tail of the log, for all who follow it through one gateway: read, decoded and put into JSON once.

A reader of its own for every follower would cost threads, connections and descriptors that writes need. A follower
reads by itself only what came before it, or what it missed because it was slow; then it takes what all take.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from contextlib import aclosing, asynccontextmanager
from typing import NamedTuple
from uuid import UUID

from services.errors import UnavailableError
from services.http.events import event_head
from services.log.port import Log, RecordedEvent
from services.log.position import Position

ROOM_BYTES = 8 << 20
"""How much of the tail is kept for followers that are not quite as fast."""

READERS = 16
"""How many followers read what came before them at a time, by some ten descriptors each; others wait for their turn."""

_AT_ONCE_BYTES = 64 * 1024
_BREATH = 50
"""After so many events the event loop has a turn."""


class TailEvent(NamedTuple):
    """One event of the tail. `position` lies behind it and behind all that the tail had before it."""

    partition: int
    offset: int
    package_id: UUID
    event_type: str
    head: bytes
    position: Position
    position_text: str


Frame = Callable[[str, bytes, str], bytes]
"""How an event is sent: from its type, its `event_head`, and the text of the position behind it."""


class Tail:
    """What a gateway's followers share. Belongs to one event loop; reads while there is a follower."""

    def __init__(self, log: Log, room_bytes: int = ROOM_BYTES) -> None:
        self._log = log
        self._room_bytes = room_bytes
        self._turns = asyncio.Semaphore(READERS)
        self._followers = 0
        self._run: _Run | None = None

    async def follow(
        self, since: Position | None, package_id: UUID | None, frame: Frame
    ) -> AsyncGenerator[bytes, None]:
        """Events behind `since`, of one package or of all, each once, one or more to a piece; never ends.

        The first empty piece says that what came before is read. Memory is bounded however slow the caller is.
        Raises as `Log.read`.
        """
        while True:
            async with self._seat() as seat:
                # Whatever comes behind this moment is in the seat; what came before is read up to the log's end.
                async with self._turns, aclosing(self._log.read(since, package_id=package_id)) as before:  # type: ignore[type-var]  # every adapter's is a generator
                    async for event in before:
                        since = event.position
                        yield frame(event.event_type, event_head(event), str(since))
                yield b""
                while (found := await seat.take()) is not None:
                    pieces, since = _framed(found, since, package_id, frame)
                    if pieces:
                        yield b"".join(pieces)
            # It was too slow, and what it missed is kept no longer: it is in the log.

    @asynccontextmanager
    async def _seat(self) -> AsyncIterator[_Seat]:
        self._followers += 1
        try:
            if self._run is None or self._run.over:
                self._run = _Run(self._log, self._room_bytes)
            yield await self._run.seat()
        finally:
            self._followers -= 1
            if not self._followers and self._run is not None:
                ended, self._run = self._run, None
                await ended.close()


def _framed(
    found: Sequence[TailEvent], since: Position | None, package_id: UUID | None, frame: Frame
) -> tuple[list[bytes], Position | None]:
    """The pieces that are new behind `since` and wanted, and the position behind all."""
    pieces, in_step = [], since is None
    for event in found:
        position, text = event.position, event.position_text
        if not in_step and since is not None:
            # What was read before may hold this event, and may reach further than the tail does in some partition.
            read_before = event.offset < since.offsets.get(event.partition, 0)
            in_step = position.covers(since)
            if not in_step:
                position = position.furthest(since)
                text = str(position)
            if read_before:
                since = position
                continue
        if package_id in (None, event.package_id):
            pieces.append(frame(event.event_type, event.head, text))
        since = position
    return pieces, since


class _Run:
    """The tail from one moment on, until nobody follows or reading fails."""

    def __init__(self, log: Log, room_bytes: int) -> None:
        self._log = log
        self._room_bytes = room_bytes
        self._kept: deque[TailEvent] = deque()
        self._kept_bytes = 0
        self._first = 0  # the number of the oldest that is kept
        self._begun = asyncio.Event()
        self._news = asyncio.Event()
        self._task = asyncio.create_task(self._read())
        self._task.add_done_callback(self._ended)

    @property
    def over(self) -> bool:
        """Whether it reads no more."""
        return self._task.done()

    async def seat(self) -> _Seat:
        """A place behind all that has been read. Raises what reading raised."""
        await self._begun.wait()
        self._require()
        return _Seat(self, self._first + len(self._kept))

    async def take(self, number: int) -> Sequence[TailEvent] | None:
        """Wait for the events from this number on, and return some; None when it is not kept any more."""
        while number >= self._first + len(self._kept):
            self._require()
            await self._news.wait()
        if number < self._first:
            return None
        found, size = [], 0
        for i in range(number - self._first, len(self._kept)):
            found.append(event := self._kept[i])
            size += len(event.head)
            if size >= _AT_ONCE_BYTES:
                break
        return found

    def _require(self) -> None:
        if self.over:
            self._task.result()
            raise UnavailableError("the log is not followed any more")

    async def close(self) -> None:
        """Stop reading; returns when the log's reader is closed."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _read(self) -> None:
        end = await self._log.end()
        self._begun.set()
        count = 0
        async with aclosing(self._log.read(end, follow=True)) as events:  # type: ignore[type-var]  # as above
            async for event in events:
                self._keep(event)
                count += 1
                if count % _BREATH == 0:
                    await asyncio.sleep(0)

    def _keep(self, event: RecordedEvent) -> None:
        partition, position, head = self._log.partition_of(event.package_id), event.position, event_head(event)
        offset = position.offsets[partition] - 1
        self._kept.append(
            TailEvent(partition, offset, event.package_id, event.event_type, head, position, str(position))
        )
        self._kept_bytes += len(head)
        while self._kept_bytes > self._room_bytes and len(self._kept) > 1:
            self._kept_bytes -= len(self._kept.popleft().head)
            self._first += 1
        self._wake()

    def _wake(self) -> None:
        self._news.set()
        self._news = asyncio.Event()

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # there may be nobody left to hear of it
        self._begun.set()
        self._wake()


class _Seat:
    """Where one follower stands in the tail."""

    def __init__(self, run: _Run, number: int) -> None:
        self._run = run
        self._number = number

    async def take(self) -> Sequence[TailEvent] | None:
        """Wait for events and return some, in order; None when some that were not taken are kept no longer.

        Raises what reading raised.
        """
        found = await self._run.take(self._number)
        if found is not None:
            self._number += len(found)
        return found
