"""The tail of the log, shared by all followers of one gateway: it is read, decoded and put into JSON only once.

A reader for every follower would cost threads, connections and descriptors that writes need. A follower has its own
reader only while it catches up on events that the tail no longer keeps. It takes all others from the shared tail, so a
follower that reconnects soon costs little. Clients that read up to the log's end and then stop share the same limited
number of readers.
"""

from __future__ import annotations

import asyncio
import math
from collections import OrderedDict, deque
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence, Set
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field
from itertools import islice, takewhile
from typing import Self
from uuid import UUID

from artifact_store.documents.event_lines import event_head, event_heads
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.events import RecordedEvent
from artifact_store.models import EventFilter
from artifact_store.position import Position
from services.log.port import Log, PackageExtent, partition_read
from services.registry.origins import ExtentOf, Origins, in_order_of_time

ROOM_BYTES = 8 << 20
"""How many bytes of the tail are kept for followers that lag a little."""

READERS = 16
"""How many clients may catch up at a time, each with about ten descriptors; others wait for their turn."""

TURN_SECONDS = 10.0
"""How long a client may catch up while others wait for a turn."""

PATIENCE_SECONDS = 2.0
"""A client that takes nothing for this long loses its turn (s)."""

MARK_SECONDS = 5.0
"""How often a client whose events are all filtered out gets its position."""

_AT_ONCE_BYTES = 48 * 1024
"""The most that a follower gets at once. It stays below the 64 KiB that a connection buffers before it waits."""

_AT_ONCE_EVENTS = 1000
_BREATH = 200
"""Reading yields to the event loop after this many events."""

_LENIENT_SECONDS = 2.0
"""How long reading may wait in total while most followers need the oldest events, until they have caught up again."""

_EVENT_BYTES, _OFFSET_BYTES = 500, 100
"""Estimated bytes of memory for an event beside its texts, and for each offset of its position."""


Frame = Callable[[str, bytes, str], bytes]
"""Formats an event for a client, from its type, its `event_head`, and the text of the position after it."""


@dataclass(frozen=True, slots=True, eq=False)
class Form:
    """The form in which a client gets events. Followers with the same object share the bytes made for them."""

    frame: Frame
    manifests: bool = True
    """Whether events that finalize packages contain their manifests."""


@dataclass(slots=True)
class TailEvent:
    """One event of the tail. `position` is the position after it and after all events that the tail had before it."""

    partition: int
    offset: int
    package_id: UUID
    event_type: str
    head: bytes
    lean_head: bytes
    """The head without a manifest."""
    position: Position
    position_text: str
    _pieces: dict[Form, bytes] = field(default_factory=dict)

    @classmethod
    def of(cls, event: RecordedEvent, partition: int) -> Self:
        """The event, which lies in this partition, put into JSON."""
        position = event.position
        head, lean = event_heads(event)
        offset = position.offsets[partition] - 1
        return cls(partition, offset, event.package_id, event.event_type, head, lean, position, str(position))

    @property
    def size(self) -> int:
        """Estimated bytes of memory, including its forms as a line and as a server-sent event."""
        texts = 3 * (len(self.head) + len(self.position_text))
        return texts + _OFFSET_BYTES * len(self.position.offsets) + _EVENT_BYTES

    def piece(self, form: Form) -> bytes:
        """The bytes for a client that has read as far as the tail; made once for all such clients."""
        found = self._pieces.get(form)
        if found is None:
            found = self._pieces[form] = self.piece_at(form, self.position_text)
        return found

    def piece_at(self, form: Form, position: str) -> bytes:
        """The bytes for a client that has read further in some partition, so that its position becomes `position`."""
        return form.frame(self.event_type, self.head if form.manifests else self.lean_head, position)


Mark = Callable[[str], bytes]
"""Formats a position that a client has come to without an event."""


class Tail:
    """Reads the log for all followers of a gateway, while there are any. Belongs to one event loop."""

    def __init__(
        self,
        log: Log,
        room_bytes: int = ROOM_BYTES,
        extent: ExtentOf | None = None,
        origins: Origins | None = None,
    ) -> None:
        """`extent` finds where a package's events lie, which saves reading its whole partition.

        Events are filtered by the `origins` of their packages.
        """
        self._log = log
        self._origins = origins or Origins()
        self._extent = extent
        self._room_bytes = room_bytes
        self._turns = asyncio.Semaphore(READERS)
        self._followers = 0
        self._run: _Run | None = None

    async def end(self, since: Position | None = None) -> Position:
        """Where the log ends now. Raises as `Log.end`."""
        return await self._log.end(since)

    async def at_time(self, created_at: int) -> Position:
        """See `Log`."""
        return await self._log.at_time(created_at)

    async def follow(
        self,
        since: Position | None,
        wanted: EventFilter,
        form: Form,
        mark: Mark | None = None,
        *,
        quiet_seconds: float = math.inf,
    ) -> AsyncGenerator[bytes]:
        """Wanted events after `since`, each once, one or more per piece; never ends.

        With `mark`, a client gets its position from time to time while events are filtered out.

        The first empty piece means that the follower has caught up; another one comes whenever there was nothing for
        `quiet_seconds`. Memory is bounded however slow the caller is. Raises as `Log.read`. A record that cannot be
        decoded does not end a follower of another package, unless it is the first record that the follower reads.
        """
        at, clock = _Standing(since), asyncio.get_running_loop().time
        if wanted.package_id is not None:
            mark = None  # even a position would reveal that a hidden package exists
        marked, untold, joined = clock(), False, False
        while True:
            async with self._seat(wanted, form) as seat:
                kept = 0
                # The seat has all events from this moment on; earlier ones are kept, or are read up to the log's end.
                while await self._behind(at) and not (kept := seat.go_back(at.position)):
                    missed = self._missed(at, wanted, form, None, mark)
                    async with feed(missed, PATIENCE_SECONDS) as pieces:
                        while (piece := await pieces.take_within(quiet_seconds)) is not None:
                            yield piece
                at.in_step = seat.is_abreast_of(at.position)
                while seat.number < kept and (found := await seat.take(at)) is not None:
                    untold = found.passed_over
                    if found.data:
                        yield found.data
                if not joined:
                    joined = True
                    yield b""
                given = clock()
                try:
                    while True:
                        marks = mark is not None and untold
                        due = given + quiet_seconds
                        if not await seat.wait(min(due, marked + MARK_SECONDS) if marks else due):
                            found = None
                        elif (found := await seat.take(at)) is None:
                            break
                        if found is not None:
                            untold = found.passed_over
                            if found.data:
                                given = clock()
                                yield found.data
                        if mark is not None and untold and clock() >= marked + MARK_SECONDS:
                            given = marked = clock()
                            untold = False
                            yield mark(str(at.position))
                        if clock() >= given + quiet_seconds:
                            given = clock()
                            yield b""
                except CorruptError:
                    if wanted.package_id is None:
                        raise
                    # It may be another package's record: later events of this one can still be read from the log.
            # Or it was too slow, and the events that it missed are no longer kept.
            at.caught_up = at.in_step = False

    async def read(
        self,
        since: Position | None,
        until: Position,
        wanted: EventFilter,
        form: Form,
        mark: Mark | None = None,
        *,
        by_time: bool = False,
    ) -> AsyncGenerator[bytes]:
        """Wanted events after `since` up to `until`, one or more per piece. With `by_time`, sorted by their times.

        Takes turns with followers that catch up. Memory is bounded however slow the caller is. Raises as `Log.read`.
        For `mark` see `follow`.
        """
        at = _Standing(since)
        while not at.caught_up:
            missed = self._missed(at, wanted, form, until, mark, by_time=by_time)
            async with feed(missed, PATIENCE_SECONDS) as pieces:
                while (piece := await pieces.take()) is not None:
                    yield piece

    async def _behind(self, at: _Standing) -> bool:
        """Whether events before the tail remain to be read. Raises InvalidPositionError, LogIdentityError."""
        if at.caught_up:
            return False
        end = await self._log.end(at.position)
        if at.position is None:
            return any(end.offsets.values())
        at.position.require_within(end)
        return not at.position.covers(end)

    async def _missed(
        self,
        at: _Standing,
        wanted: EventFilter,
        form: Form,
        until: Position | None,
        mark: Mark | None,
        *,
        by_time: bool = False,
    ) -> AsyncGenerator[bytes]:
        """Events from where the client stands to the log's end, or as many as it can read in its turn."""
        package_id, extent = wanted.package_id, None
        if package_id is not None and self._extent is not None:
            extent = await self._extent(package_id)
            if extent is not None and until is None:
                extent = PackageExtent(extent.created_at)  # a follower must have all up to the tail
        if by_time and until is not None and package_id is None:
            events = in_order_of_time(self._log, at.position, until)
        else:
            events = self._log.read(at.position, package_id=package_id, extent=extent, until=until)
        async with self._turns, aclosing(events):
            turn_ends = asyncio.get_running_loop().time() + TURN_SECONDS
            seen = True
            async for event in events:
                at.position = event.position
                seen = await self._origins.shows(event, wanted)
                if seen:
                    head = event_head(event, manifest=form.manifests)
                    yield form.frame(event.event_type, head, str(event.position))
                if self._turns.locked() and asyncio.get_running_loop().time() > turn_ends:
                    return
        # Even a position would reveal that a hidden package exists.
        if not seen and mark is not None and package_id is None:
            yield mark(str(at.position))
        at.caught_up = True

    @asynccontextmanager
    async def _seat(self, wanted: EventFilter, form: Form) -> AsyncIterator[_Seat]:
        self._followers += 1
        try:
            if self._run is None or self._run.over:
                self._run = _Run(self._log, self._room_bytes, self._origins)
            with await self._run.seat(wanted, form) as seat:
                yield seat
        finally:
            self._followers -= 1
            if not self._followers and self._run is not None:
                ended, self._run = self._run, None
                await ended.close()


@dataclass(slots=True)
class _Standing:
    """How far a client has read."""

    position: Position | None
    caught_up: bool = False
    in_step: bool = False
    """Whether the client has nothing that the tail does not have: its positions are those of the tail."""


@dataclass(slots=True)
class _Found:
    """The bytes that a follower gets for some events of the tail."""

    data: bytes
    end: int
    """The number of the event after them."""
    position: Position | None
    """The position after them."""
    passed_over: bool
    """Whether the last of them was filtered out."""
    in_step: bool
    """As in `_Standing`, after them."""


class _Run:
    """One reader of the log from its end on, until nobody follows or reading fails."""

    def __init__(self, log: Log, room_bytes: int, origins: Origins) -> None:
        self._log = log
        self.origins = origins
        self._room_bytes = room_bytes
        self._kept: deque[TailEvent] = deque()
        self._kept_bytes = 0
        self._first = 0  # the number of the oldest that is kept
        self._kept_from: Position
        """The position before the oldest kept event."""
        self._begun = asyncio.Event()
        self.position: Position
        """The position after the last event that was read; only set once reading has begun."""
        self._waiting: set[asyncio.Future[None]] = set()
        self._channels: dict[tuple[EventFilter, Form], _Channel] = {}
        self._pieces: OrderedDict[tuple[_Channel, int, str | None], _Found] = OrderedDict()
        self._pieces_bytes = 0
        self._seats: set[_Seat] = set()
        self._waited = 0.0
        """How long reading has waited for followers since most of them were last near the end (s)."""
        self._task = asyncio.create_task(self._read())
        self._task.add_done_callback(self._ended)

    @property
    def over(self) -> bool:
        """Whether it has stopped reading."""
        return self._task.done()

    @property
    def end(self) -> int:
        """The number of the next event."""
        return self._first + len(self._kept)

    async def seat(self, wanted: EventFilter, form: Form) -> _Seat:
        """A seat after all events read so far. Raises whatever reading raised."""
        await self._begun.wait()
        self.require()
        channel = self._channels.get((wanted, form))
        if channel is None:
            channel = self._channels[wanted, form] = _Channel(self, wanted, form)
        channel.seats += 1
        self._seats.add(seat := _Seat(self, channel, self.end))
        return seat

    def leave(self, seat: _Seat, channel: _Channel) -> None:
        """Give back a seat."""
        self._seats.discard(seat)
        channel.seats -= 1
        if not channel.seats:
            self._channels.pop((channel.wanted, channel.form), None)

    def events(self, number: int) -> Sequence[TailEvent] | None:
        """Events from this number on, up to _AT_ONCE_EVENTS; None if the first of them is no longer kept."""
        if number < self._first:
            return None
        start = number - self._first
        return list(islice(self._kept, start, start + _AT_ONCE_EVENTS))

    def first_after(self, position: Position) -> int | None:
        """The number of the first event after this position; None if some events after it may not be kept."""
        if not position.covers(self._kept_from):
            return None
        offsets = position.offsets
        read = takewhile(lambda event: event.offset < offsets.get(event.partition, 0), self._kept)
        return self._first + sum(1 for _ in read)

    async def shared(self, channel: _Channel, number: int, since: Position | None) -> _Found | None:
        """The bytes for followers of a channel that are before this event; made once.

        `since` is where they stand, None for those in step. Followers that join together stand at the same position,
        beyond the tail in some partitions, until an event of each of these has come: they share too.

        None if the event is no longer kept. The number must be that of an event that was read.
        """
        key = (channel, number, None if since is None else str(since))
        found = self._pieces.get(key)
        if found is None:
            found = await channel.make(number, since)
            if found is not None and channel.seats > 1 and key not in self._pieces:
                self._pieces[key] = found
                self._pieces_bytes += _piece_bytes(key[2], found)
                while self._pieces_bytes > self._room_bytes and len(self._pieces) > 1:
                    (_, _, stands), dropped = self._pieces.popitem(last=False)
                    self._pieces_bytes -= _piece_bytes(stands, dropped)
        return found

    def require(self) -> None:
        """Raise whatever reading raised, if it is over."""
        if self.over:
            self._task.result()
            raise UnavailableError("the log is no longer followed")

    def wait(self) -> asyncio.Future[None]:
        """A future that is done when there is another event, or reading is over. Always pass it to `forget`."""
        waiting = asyncio.get_running_loop().create_future()
        self._waiting.add(waiting)
        return waiting

    def forget(self, waiting: asyncio.Future[None]) -> None:
        """See `wait`."""
        self._waiting.discard(waiting)

    async def close(self) -> None:
        """Stop reading, and forget what was read; returns once the log's reader is closed."""
        self._task.cancel()
        await asyncio.wait([self._task])
        self._kept.clear()
        self._pieces.clear()

    async def _read(self) -> None:
        self.position = self._kept_from = end = await self._log.end()
        self._begun.set()
        before, count = end.offsets, 0
        async with aclosing(self._log.read(end, follow=True)) as events:
            async for event in events:
                self._keep(event, partition_read(self._log, event, before))
                before = event.position.offsets
                count += 1
                if count % _BREATH == 0:
                    await asyncio.sleep(0)
                    await self._be_lenient()

    async def _be_lenient(self) -> None:
        """Wait while most followers still need the oldest events, which are dropped next. Otherwise all of them would
        catch up with separate readers. A few slow followers are not waited for, and many only for _LENIENT_SECONDS."""
        while len(self._kept) > 2 * _BREATH and self._kept_bytes > self._room_bytes * 3 // 4:
            soon_dropped = self._first + len(self._kept) // 2
            if 2 * sum(seat.number < soon_dropped for seat in self._seats) <= len(self._seats):
                self._waited = 0.0
                return
            if self._waited >= _LENIENT_SECONDS:
                return
            self._waited += _LOOK_SECONDS
            await asyncio.sleep(_LOOK_SECONDS)

    def _keep(self, event: RecordedEvent, partition: int) -> None:
        self.origins.note(event)
        kept = TailEvent.of(event, partition)
        self.position = event.position
        self._kept.append(kept)
        self._kept_bytes += kept.size
        while self._kept_bytes > self._room_bytes and len(self._kept) > 1:
            dropped = self._kept.popleft()
            self._kept_bytes -= dropped.size
            self._kept_from = dropped.position
            self._first += 1
        self._wake()

    def _wake(self) -> None:
        waiting, self._waiting = self._waiting, set()
        for each in waiting:
            if not each.done():
                each.set_result(None)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # retrieve it here, in case nobody awaits the task
        self._begun.set()
        self._wake()


def _piece_bytes(stands: str | None, found: _Found) -> int:
    """The estimated memory of a piece for those that stand there."""
    return len(found.data) + len(stands or "") + _EVENT_BYTES


class _Channel:
    """The followers of a run that want the same events in the same form."""

    def __init__(self, run: _Run, wanted: EventFilter, form: Form) -> None:
        self._run = run
        self.wanted = wanted
        self.form = form
        self.seats = 0

    async def make(self, number: int, since: Position | None) -> _Found | None:
        """The bytes for a follower that is before this event: as many events as fit into _AT_ONCE_BYTES.

        A follower with `since` may have read some of them, or be further than the tail in some partition. None if the
        event is no longer kept.
        """
        events = self._run.events(number)
        if events is None:
            return None
        wanted, form = self.wanted, self.form
        hidden: Set[UUID] = frozenset()
        if wanted.needs_origins:
            hidden = await self._run.origins.hidden({event.package_id for event in events}, wanted)
        pieces: list[bytes] = []
        in_step, size, end, passed_over = since is None, 0, number, False
        position = since
        for event in events:
            position, text, end = event.position, None, end + 1
            if not in_step and since is not None:
                # Catching up may have read this event, and may have read further than the tail in some partition.
                read_before = event.offset < since.offsets.get(event.partition, 0)
                in_step = position.covers(since)
                if not in_step:
                    position = position.furthest(since)
                    text = str(position)
                since = position
                if read_before:
                    continue
            passed_over = not wanted.takes(event.package_id, event.event_type) or event.package_id in hidden
            if not passed_over:
                pieces.append(event.piece(form) if text is None else event.piece_at(form, text))
                size += len(pieces[-1])
                if size >= _AT_ONCE_BYTES:
                    break
        return _Found(b"".join(pieces), end, position, passed_over, in_step)


class _Seat:
    """One follower's place in the tail. Use it inside `with`."""

    def __init__(self, run: _Run, channel: _Channel, number: int) -> None:
        self._run = run
        self._channel = channel
        self.number = number
        """The number of the event that the follower gets next."""
        self._waiting: asyncio.Future[None] | None = None
        self._alarm: asyncio.TimerHandle | None = None
        """Wakes the follower. It is not cancelled when events come, because most timers would be set in vain."""

    def __enter__(self) -> _Seat:
        return self

    def __exit__(self, *_: object) -> None:
        self._run.leave(self, self._channel)
        if self._alarm is not None:
            self._alarm.cancel()

    async def wait(self, until: float) -> bool:
        """Wait for an event until `until`, by the event loop's clock (s). Returns whether there is one.

        Raises whatever reading raised.
        """
        run, loop = self._run, asyncio.get_running_loop()
        while self.number >= run.end:
            run.require()
            if loop.time() >= until:
                return False
            if until < math.inf and (self._alarm is None or self._alarm.when() > until):
                if self._alarm is not None:
                    self._alarm.cancel()
                self._alarm = loop.call_at(until, self._ring)
            self._waiting = run.wait()
            try:
                await self._waiting
            finally:
                run.forget(self._waiting)
        return True

    def _ring(self) -> None:
        self._alarm = None
        if self._waiting is not None and not self._waiting.done():
            self._waiting.set_result(None)

    def go_back(self, position: Position | None) -> int:
        """Go back to the first event after this position, if all events from there on are kept.

        Returns the number after the last of them, or 0 if they are not all kept. The follower must not have taken
        anything yet.
        """
        number = None if position is None else self._run.first_after(position)
        if number is None:
            return 0
        self.number = number
        return self._run.end

    def is_abreast_of(self, position: Position | None) -> bool:
        """Whether the follower has read exactly as far as the tail, so that no event waits for it."""
        run = self._run
        return self.number == run.end and (position is None or run.position.covers(position))

    async def take(self, at: _Standing) -> _Found | None:
        """The next bytes for the follower, in order; None if events were dropped before it could take them.

        Advances `at`.
        """
        found = await self._run.shared(self._channel, self.number, None if at.in_step else at.position)
        if found is not None:
            self.number, at.position, at.in_step = found.end, found.position, found.in_step
        return found


_LOOK_SECONDS = 0.01

AHEAD_BYTES = 64 * 1024
"""How many bytes may wait for a slow client. Reading pauses above that; one event may exceed it."""


class Feed:
    """Lines read ahead for one client, up to a bounded number of bytes. Belongs to one event loop."""

    def __init__(self, lines: AsyncGenerator[bytes], patience: float | None = None) -> None:
        self._patience = patience
        self._waiting = bytearray()
        self._news = asyncio.Event()
        self._room = asyncio.Event()
        self._reader = asyncio.create_task(self._read(lines))
        self._reader.add_done_callback(lambda _: self._news.set())

    async def take(self) -> bytes | None:
        """Wait for lines and return all bytes that are waiting; None at the end.

        Returns no bytes if an empty line was read, which only means that nothing has failed so far. Cancelling it loses
        nothing. Raises whatever reading the lines raised, after the bytes that came before.
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

    async def take_within(self, seconds: float) -> bytes | None:
        """As `take`, but also returns no bytes if there was nothing for this many seconds."""
        if math.isinf(seconds):
            return await self.take()
        scope = asyncio.timeout(seconds)
        try:
            async with scope:
                return await self.take()
        except TimeoutError:
            if not scope.expired():
                raise
            return b""

    async def close(self) -> None:
        """Stop reading; returns once the source is closed."""
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
    """A feed of these lines, which lasts as long as the block.

    With `patience`, it ends early if AHEAD_BYTES wait and the client takes nothing for this many seconds.
    """
    opened = Feed(lines, patience)
    try:
        yield opened
    finally:
        await opened.close()
