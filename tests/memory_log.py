"""A log in memory with several partitions, for tests of its readers: a fake of the `Log` port that can be disturbed.

As on Kafka, offsets have gaps (where transaction markers would be), a group spreads the partitions over its members,
and after a rebalance each partition is read from where `start_offsets` says.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from itertools import accumulate
from uuid import UUID, uuid4

from artifact_store.errors import CorruptError, InvalidPositionError, UnavailableError
from artifact_store.events import AdministrativePayload, Event, LogSkipped, RecordedEvent
from artifact_store.position import Position
from schemas.codec import UndecodableEventError, decode, encode
from services.log.port import Batch, PackageExtent, Record, Settled, StartOffsets
from services.log.records import AdministrativeHead, BadRecord, administrative_event, is_administrative

_FIELDS = tuple(Event.__slots__)
_POLL_BYTES = 2 << 20


def skip_of(log: MemoryLog, record: Record, after: AdministrativeHead | None = None) -> Event:
    """An operator's confirmation that this record is no event, the next administrative record after that one."""
    bad = BadRecord.of(record, "it cannot be read")
    payload = LogSkipped(log.id, bad.partition, bad.offset, bad.digest, bad.size_bytes, bad.cause, "a test")
    return administrative_event(payload, after, created_at=1, actor="ada", command_id=uuid4())


class MemoryLog:
    """See `Log`. `hole` offsets are left out after every `every`-th record of a partition."""

    def __init__(self, partitions: int = 3, *, every: int = 5, hole: int = 1) -> None:
        self.id = uuid4()
        self.unavailable = False
        self.readers = 0
        self.members: list[MemorySubscription] = []
        self.groups: dict[str, dict[int, tuple[int, str]]] = {}
        self._records: list[list[Record]] = [[] for _ in range(partitions)]
        self._ends = [0] * partitions
        self._every = every
        self._hole = hole
        self._changed = asyncio.Event()

    def append(self, *events: Event) -> None:
        """Append the events, each to its package's partition."""
        for event in events:
            self.append_raw(self.partition_of(event.package_id), encode(event), str(event.package_id).encode())

    def append_raw(self, partition: int, value: bytes, key: bytes = b"") -> None:
        """Append a record of this value, whatever it is."""
        records = self._records[partition]
        records.append(Record(partition, self._ends[partition], key, value))
        self._ends[partition] += 1
        if len(records) % self._every == 0:
            self._ends[partition] += self._hole
        self._changed.set()

    def append_administrative(self, event: Event) -> None:
        """Append a record of the partition's own, to the partition that it names."""
        assert isinstance(event.payload, AdministrativePayload)
        self.append_raw(event.payload.partition, encode(event), str(event.package_id).encode())

    def truncate(self, partition: int, end: int = 0) -> None:
        """Lose the records of the partition from this offset on, as a restore from an older copy would."""
        self._records[partition] = [record for record in self._records[partition] if record.offset < end]
        self._ends[partition] = end

    async def identity(self) -> UUID:
        self._reach()
        return self.id

    async def partitions(self) -> int:
        return len(self._records)

    @property
    def topic(self) -> None:
        return None

    def partition_of(self, package_id: UUID) -> int:
        return package_id.int % len(self._records)

    async def end(self, covering: Position | None = None) -> Position:
        self._reach()
        return Position(self.id, dict(enumerate(self._ends)))

    async def at_time(self, created_at: int) -> Position:
        self._reach()
        found = dict(enumerate(self._ends))
        for partition, records in enumerate(self._records):
            times = [(decode(record.value).created_at, record.offset) for record in records]
            found[partition] = next((offset for time, offset in times if time >= created_at), found[partition])
        return Position(self.id, found)

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
        end = await self.end()
        at = since or Position(self.id, {})
        at.require(self.id)
        if not end.covers(at):
            raise InvalidPositionError("the position is beyond the log's end")
        if until is not None and not follow:
            end = Position(self.id, {p: min(offset, until.offsets.get(p, 0)) for p, offset in end.offsets.items()})
        self.readers += 1
        try:
            while True:
                for partition, records in enumerate(self._records):
                    start = at.offsets.get(partition, 0)
                    for record in [r for r in records if start <= r.offset < end.offsets[partition]]:
                        await asyncio.sleep(0)
                        at = at.after(partition, record.offset)
                        if package_id is not None and record.key != str(package_id).encode():
                            continue
                        try:
                            event = decode(record.value)
                        except UndecodableEventError as error:
                            raise CorruptError(str(error)) from error
                        if is_administrative(event):
                            continue
                        yield RecordedEvent(**{name: getattr(event, name) for name in _FIELDS}, position=at)
                if not follow:
                    return
                if (now := await self.end()) == end:
                    await self.wait_for_change(poll_seconds)
                end = now
        finally:
            self.readers -= 1

    async def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        at = dict(starts)
        while behind := {p: at[p] for p in at if at[p] < ends[p]}:
            self._reach()
            await asyncio.sleep(0)
            for partition, start in behind.items():
                found, reached = self.take(partition, start, 20)
                at[partition] = min(reached, ends[partition])
                records = [record for record in found if record.offset < at[partition]]
                yield Batch(records, {partition: at[partition]})

    async def subscribe(
        self, projection: str, start_offsets: StartOffsets, settled: Settled | None = None
    ) -> MemorySubscription:
        self._reach()
        joined = MemorySubscription(self, projection, start_offsets)
        self.members.append(joined)
        self.rebalance(projection)
        return joined

    async def damage(self) -> Sequence[str]:
        return ()

    async def committed(self, projection: str) -> Mapping[int, tuple[int, str]]:
        self._reach()
        return dict(self.groups.get(projection, {}))

    async def show(self, projection: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        self._reach()
        if any(member.projection == projection for member in self.members):
            return False
        self.groups.setdefault(projection, {}).update({p: (offset, metadata) for p, offset in next_offsets.items()})
        return True

    async def lag(self, projection: str) -> Mapping[int, int]:
        done = self.groups.get(projection, {})
        return {p: end - done.get(p, (0, ""))[0] for p, end in enumerate(self._ends)}

    async def migrate(self) -> None:
        """Nothing to make."""

    async def check(self) -> None:
        self._reach()

    async def close(self) -> None:
        """Nothing to release."""

    def rebalance(self, projection: str) -> None:
        """Spread the partitions anew; every member asks again where to begin."""
        members = [member for member in self.members if member.projection == projection]
        for i, member in enumerate(members):
            member.assign([p for p in range(len(self._records)) if p % len(members) == i])
        self._changed.set()

    def take(self, partition: int, start: int, most: int) -> tuple[list[Record], int]:
        """Records from an offset on, and the offset behind them, over a hole at the end."""
        if start > self._ends[partition]:
            raise CorruptError(f"offset {start} lies outside the log")
        found = [record for record in self._records[partition] if record.offset >= start]
        sizes = accumulate(len(record.value) for record in found)
        most = min(most, sum(size < _POLL_BYTES for size in sizes) + 1)  # as every log bounds what it has at hand
        if len(found) > most:
            return found[:most], found[most].offset
        return found, self._ends[partition]

    async def wait_for_change(self, seconds: float) -> None:
        """Return when something was appended or rebalanced, or the time is over."""
        self._changed.clear()
        try:
            async with asyncio.timeout(seconds):
                await self._changed.wait()
        except TimeoutError:
            return

    def _reach(self) -> None:
        if self.unavailable:
            raise UnavailableError("the log cannot be reached")


class MemorySubscription:
    """See `Subscription`."""

    def __init__(self, log: MemoryLog, projection: str, start_offsets: StartOffsets) -> None:
        self.projection = projection
        self._log = log
        self._start_offsets = start_offsets
        self._fresh: Sequence[int] | None = None
        self._next: dict[int, int] = {}

    @property
    def assigned(self) -> frozenset[int]:
        return frozenset(self._next)

    def assign(self, partitions: Sequence[int]) -> None:
        """Take effect at the next poll."""
        self._fresh = partitions

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        for last in (False, True):
            if self._log.unavailable:
                raise UnavailableError("the log cannot be reached")
            if self._fresh is not None:
                partitions, self._fresh = self._fresh, None
                self._next = dict(await self._start_offsets(partitions))
            records: list[Record] = []
            moved: dict[int, int] = {}
            for partition, start in self._next.items():
                found, behind = self._log.take(partition, start, max_records - len(records))
                records += found
                if behind != start:
                    moved[partition] = behind
            self._next.update(moved)
            if moved or last or not timeout_seconds:
                return Batch(records, moved)
            await self._log.wait_for_change(timeout_seconds)
        raise AssertionError("unreachable")

    async def commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        if self._log.unavailable:
            raise UnavailableError("the log cannot be reached")
        committed = self._log.groups.setdefault(self.projection, {})
        committed.update({p: (offset, metadata) for p, offset in next_offsets.items() if p in self._next})

    async def close(self) -> None:
        if self in self._log.members:
            self._log.members.remove(self)
            self._log.rebalance(self.projection)
