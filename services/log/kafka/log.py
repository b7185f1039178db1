"""The log of record on Kafka: the `Log` port over one topic."""

from __future__ import annotations

import asyncio
import time
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import TypeVar
from uuid import UUID

from artifact_store.errors import ConfigurationError, CorruptError, InvalidPositionError, UnavailableError
from artifact_store.events import Event, RecordedEvent
from artifact_store.position import Position
from services.config import Settings
from services.log.kafka import topic
from services.log.kafka.cluster import Cluster, Topic
from services.log.kafka.connection import KafkaSettings, bounded, partition_of, record_key
from services.log.kafka.tail import KafkaSubscription, Reader, Watch
from services.log.port import Batch, PackageExtent, Settled, StartOffsets
from services.log.records import BadRecord, BatchSize, Skips, is_administrative, read_record

_FIELDS = tuple(field.name for field in fields(Event))
_BATCH_RECORDS = 500
_BATCH_BYTES = 1 << 20
"""How much a reader holds at a time, as records and as events. A gateway may have many readers with slow clients."""

_BOUNDS = bounded(1 << 20, 4 << 10)
"""Limits what the Kafka client of such a reader holds in addition, however well its records are compressed."""

_SCAN_BATCH = 2000
_REMEMBERED = 10_000
"""A reader knows the last sequence of this many packages, to skip repeated records."""

_POLL_SECONDS = 0.5
_T = TypeVar("_T")


class KafkaLog:
    """See `Log`. Its identity is Kafka's topic id (KIP-516): a topic that was created again has another."""

    def __init__(self, settings: Settings) -> None:
        """Connects to nothing yet. Raises ConfigurationError for settings that cannot work."""
        self.kafka = KafkaSettings.of(settings)
        self.cluster = Cluster(self.kafka)
        self._threads = ThreadPoolExecutor(4, thread_name_prefix="log-ask")
        self._topic: Topic | None = None
        self._passed = False
        """Whether the topic has passed the check."""

    @property
    def topic(self) -> str:
        """See `Log`."""
        return self.kafka.topic

    async def identity(self) -> UUID:
        """See `Log`."""
        return (await self._look()).identity

    async def partitions(self) -> int:
        """See `Log`."""
        return (self._topic or await self._look()).partitions

    def partition_of(self, package_id: UUID) -> int:
        """See `Log`."""
        if self._topic is None:
            raise UnavailableError("the log was not reached yet")
        return partition_of(package_id, self._topic.partitions)

    async def end(self, covering: Position | None = None) -> Position:
        """See `Log`. The last stable offsets: records beyond them belong to open transactions."""
        found = await self._look()
        ends = await self.blocking(lambda: self.cluster.last_stable(range(found.partitions)))
        if covering is not None and covering.log == found.identity:
            beyond = {p: offset for p, offset in covering.offsets.items() if offset > ends.get(p, offset)}
            ends.update(await self._confirmed(beyond))
        return Position(found.identity, ends)

    async def at_time(self, created_at: int) -> Position:
        """See `Log`. Records' timestamps are the times of their events."""
        end = await self.end()
        found = await self.blocking(lambda: self.cluster.at_time(end.offsets, created_at // 1000))
        return Position(end.log, {p: min(offset, found.get(p, offset)) for p, offset in end.offsets.items()})

    async def read(
        self,
        since: Position | None = None,
        *,
        package_id: UUID | None = None,
        extent: PackageExtent | None = None,
        until: Position | None = None,
        follow: bool = False,
        poll_seconds: float = 0.1,
    ) -> AsyncGenerator[RecordedEvent]:
        """See `Log`. Uses one consumer and one thread while the caller iterates.

        `poll_seconds` has no effect: the broker answers a waiting reader as soon as there is a record.
        """
        found = await self._look()
        position = since or Position(found.identity, {})
        position.require(found.identity)
        if any(p >= found.partitions for p in position.offsets):
            raise InvalidPositionError("the position names a partition that the log does not have")
        wanted = range(found.partitions) if package_id is None else [partition_of(package_id, found.partitions)]
        starts = {p: position.offsets.get(p, 0) for p in wanted}
        ends = await self._checked_ends(starts)
        if not follow:
            if until is not None:
                until.require(found.identity)
                ends = {p: min(end, until.offsets.get(p, 0)) for p, end in ends.items()}
            starts = {p: offset for p, offset in starts.items() if offset < ends[p]}
            if not starts:
                return
        key = last = None
        if package_id is not None:
            key = record_key(package_id)
            if extent is not None:
                last = None if follow else extent.last_sequence
                ((p, start),) = starts.items()
                begins = await self.blocking(lambda: self.cluster.at_time([p], extent.created_at // 1000))
                # The record before a position is probably the event that the reader saw last: it shows its sequence.
                starts = {p: max(start - 1 if last is not None and start else start, min(begins.get(p, 0), ends[p]))}
        reading = _Reading(self, starts, None if follow else ends, key, position, last)
        try:
            while (events := await reading.some()) is not None:
                for event in events:
                    yield event
        finally:
            await reading.close()

    async def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        """See `Log`. Uses one consumer and one thread while the caller iterates."""
        wanted = {p: start for p, start in starts.items() if start < ends[p]}
        if not wanted:
            return
        watch = Watch((await self._look()).identity, self.identity)
        reached = await self._checked_ends(wanted, {p: ends[p] for p in wanted})
        if short := [p for p in wanted if ends[p] > reached[p]]:
            raise CorruptError(
                f"partition {short[0]} ends at offset {reached[short[0]]}: the records after it are gone"
            )
        scanning = _Scan(self, wanted, ends, watch, headers=headers)
        with ThreadPoolExecutor(1, thread_name_prefix="log-scan") as thread:
            loop = asyncio.get_running_loop()
            try:
                while (batch := await loop.run_in_executor(thread, scanning.some)) is not None:
                    await watch.check(at_end=scanning.done)
                    yield batch
            finally:
                await loop.run_in_executor(thread, scanning.close)

    async def subscribe(
        self, projection: str, start_offsets: StartOffsets, settled: Settled | None = None
    ) -> KafkaSubscription:
        """See `Log`."""
        await self._look()
        return await KafkaSubscription(self.kafka, self.cluster, projection, start_offsets, settled).open()

    async def damage(self) -> Sequence[str]:
        """See `Log`. Always none: brokers check what they store, and clients what they fetch."""
        return ()

    async def committed(self, projection: str) -> Mapping[int, tuple[int, str]]:
        """See `Log`."""
        return await self.blocking(lambda: self.cluster.committed(self.kafka.projector_group(projection)))

    async def show(self, projection: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        """See `Log`."""
        group = self.kafka.projector_group(projection)
        return await self.blocking(lambda: self.cluster.commit(group, next_offsets, metadata))

    async def lag(self, projection: str) -> Mapping[int, int]:
        """See `Log`. A partition without a commit lags by all its records."""
        ends = (await self.end()).offsets
        committed = await self.committed(projection)
        return {p: max(0, end - committed.get(p, (0, ""))[0]) for p, end in ends.items()}

    async def migrate(self) -> None:
        """See `Log`."""
        self._topic = await self.blocking(lambda: topic.migrate(self.kafka, self.cluster))

    async def check(self) -> None:
        """See `Log`. Checks that only matter at the start are repeated until they pass once."""
        starting = not self._passed
        self._topic = await self.blocking(lambda: topic.check(self.kafka, self.cluster, starting=starting))
        self._passed = True

    async def close(self) -> None:
        """See `Log`."""
        await asyncio.get_running_loop().run_in_executor(self._threads, self.cluster.close)
        self._threads.shutdown(wait=False)

    async def blocking(self, call: Callable[[], _T]) -> _T:
        """Run a blocking request in one of the log's threads."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, call)

    async def _look(self) -> Topic:
        found = await self.blocking(self.cluster.topic)
        if self._topic is None:
            self._topic = found
        # The number of partitions decides where a package's events are: it stays that of the log that was opened.
        elif found.identity == self._topic.identity and (grown := self._topic.difference(found)) is not None:
            raise ConfigurationError(grown)
        return found

    async def _checked_ends(
        self, starts: Mapping[int, int], at_least: Mapping[int, int] | None = None
    ) -> dict[int, int]:
        """Where the partitions end. The caller knows that they do not end before `at_least`."""
        ends, earliest = await asyncio.gather(
            self.blocking(lambda: self.cluster.last_stable(starts)),
            self.blocking(lambda: self.cluster.earliest(starts)),
        )
        beyond = {p: offset for p, offset in (at_least or starts).items() if offset > ends[p]}
        ends.update(await self._confirmed(beyond))
        for p, offset in starts.items():
            if offset > ends[p]:
                raise InvalidPositionError(f"the position is beyond the end of partition {p}")
            if offset < earliest[p]:
                raise CorruptError(f"partition {p} begins at offset {earliest[p]}: events before it are gone")
        return ends

    async def _confirmed(self, offsets: Mapping[int, int]) -> dict[int, int]:
        """The ends of partitions that seemed to end before these offsets: the offsets themselves, unless the newest
        leader agrees that the partition ends earlier."""
        if not offsets:
            return {}
        outside = await self.blocking(lambda: self.cluster.outside(offsets))
        return {p: outside[p][1] if p in outside else offset for p, offset in offsets.items()}


def recorded(event: Event, position: Position) -> RecordedEvent:
    """The event, with the position after it."""
    return RecordedEvent(**{name: getattr(event, name) for name in _FIELDS}, position=position)


class _Scan:
    """Partitions read from one offset to another, undecoded. Every method blocks; for one thread."""

    def __init__(
        self, log: KafkaLog, starts: Mapping[int, int], ends: Mapping[int, int], watch: Watch, *, headers: bool
    ) -> None:
        self._log = log
        self._headers = headers
        self._watch = watch
        self._at = dict(starts)
        self._ends = {p: ends[p] for p in starts}
        self._reader: Reader | None = None

    @property
    def done(self) -> bool:
        """Whether all was read."""
        return self._at == self._ends

    def some(self) -> Batch | None:
        """The next records, perhaps none; None once all were read."""
        if self.done:
            return None
        began = time.monotonic()
        if self._reader is None:
            self._reader = Reader(self._log.kafka, self._at, self._log.cluster)
        found = self._reader.take(_SCAN_BATCH, _POLL_SECONDS, headers=self._headers)
        reached = self._reader.reached()
        if any(offset > self._ends[p] for p, offset in reached.items()):
            found = [r for r in found if r.offset < self._ends[r.partition]]
            reached = {p: min(offset, self._ends[p]) for p, offset in reached.items()}
        self._watch.took(reached, time.monotonic() - began)
        moved = {p: offset for p, offset in reached.items() if offset > self._at[p]}
        self._at.update(moved)
        return Batch(found, moved)

    def close(self) -> None:
        """Release the consumer."""
        if self._reader is not None:
            self._reader.close()


class _Reading:
    """One pass over the log: a reader in its own thread, asked for one batch at a time, so that memory is bounded."""

    def __init__(
        self,
        log: KafkaLog,
        starts: dict[int, int],
        ends: dict[int, int] | None,
        key: bytes | None,
        position: Position,
        last: int | None,
    ) -> None:
        """`last` is the sequence of the last event of the package with this key, if it is known."""
        self._log = log
        self._last = last
        self._since = position.offsets
        self._starts = starts
        self._ends = ends
        self._key = key
        self._position = position
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-read")
        self._reader: Reader | None = None
        self._size = BatchSize(_BATCH_BYTES, _BATCH_RECORDS)
        self._done = False
        self._skips = Skips(log)
        self._stopped: BadRecord | None = None
        self._sequences: OrderedDict[UUID, int] = OrderedDict()
        self._watch = Watch(position.log, log.identity)

    async def some(self) -> list[RecordedEvent] | None:
        """The next events, perhaps none; None once all were read."""
        if self._stopped is not None:
            raise self._stopped.error
        if self._done:
            return None
        found = await asyncio.get_running_loop().run_in_executor(self._thread, self._take)
        await self._watch.check(at_end=self._done)
        events: list[RecordedEvent] = []
        for event in found:
            if isinstance(event, RecordedEvent):
                events.append(event)
            elif not await self._skips.covers(event):
                if not events:
                    raise event.error
                self._stopped = event  # the records before it are returned first
                break
        return events

    async def close(self) -> None:
        """Release consumer and thread."""
        await asyncio.get_running_loop().run_in_executor(self._thread, self._close)
        self._thread.shutdown(wait=False)

    def _take(self) -> list[RecordedEvent | BadRecord]:
        if self._reader is None:
            self._reader = Reader(self._log.kafka, self._starts, self._log.cluster, _BOUNDS)
        began, events = time.monotonic(), list[RecordedEvent | BadRecord]()
        taken = self._reader.take(self._size.most(), _POLL_SECONDS if self._ends is None else 0.05)
        self._size.took(taken)
        for record in taken:
            if self._ends is not None and record.offset >= self._ends[record.partition]:
                continue
            if record.offset < self._since.get(record.partition, 0):
                if self._key == record.key and self._is_last(read_record(record, self._log.partition_of)):
                    self._done = True
                    return events
                continue
            if self._key in (None, record.key):
                found = read_record(record, self._log.partition_of)
                if isinstance(found, BadRecord):
                    events.append(found)
                elif not is_administrative(found) and not self._came_again(found):
                    # From one event to the next the position only moves in the event's partition.
                    self._position = self._position.after(record.partition, record.offset)
                    events.append(recorded(found, self._position))
                    if self._is_last(found):
                        self._done = True
                        return events
        if self._ends is not None:
            reached = self._reader.reached()
            self._watch.took(reached, time.monotonic() - began)
            self._done = all(offset >= self._ends[p] for p, offset in reached.items())
        return events

    def _came_again(self, event: Event) -> bool:
        """Whether the event's package, if it was read recently, already had this sequence."""
        last = self._sequences.pop(event.package_id, 0)
        self._sequences[event.package_id] = max(last, event.sequence)
        if len(self._sequences) > _REMEMBERED:
            self._sequences.popitem(last=False)
        return 1 <= event.sequence <= last

    def _is_last(self, found: Event | BadRecord) -> bool:
        return self._last is not None and isinstance(found, Event) and found.sequence >= self._last

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close()
