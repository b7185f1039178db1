"""Reading for the engine: records from the log, decoded where they can be, each kept with what it was."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Self
from uuid import UUID

from artifact_store.events import AdministrativePayload, Event, LogSkipped
from artifact_store.position import Position
from schemas.codec import UndecodableEventError
from schemas.runs import EventBatch
from services.log.port import Log, Record
from services.log.records import BadRecord, PartitionOf, Skips, misplacement

BATCH_BYTES = 8 << 20
"""A batch ends early when its records have so many bytes, so that memory is bounded: manifests are large."""

_FEW = 20
"""So few records are decoded sooner than a thread takes them."""


@dataclass(frozen=True, slots=True)
class DecodedBatch:
    """Records in log order per partition, the events in them in the same order, and the offsets to go on from.

    `next_offsets` names the partitions that the batch moves, also those of which it has no record. `unreadable` tells
    the cause, by the index of the record. Administrative records are left out, and so are records that an operator
    confirmed to be no events. `confirmed` are the partitions in which such a confirmation was read.
    """

    records: Sequence[Record] = ()
    events: Sequence[Event] = ()
    next_offsets: Mapping[int, int] = field(default_factory=dict)
    unreadable: Mapping[int, str] = field(default_factory=dict)
    confirmed: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, records: Sequence[Record], partition_of: PartitionOf, next_offsets: Mapping[int, int] | None = None
    ) -> Self:
        """Decode the records. Blocks for as long as that takes.

        An event under a key that is not its package's id, or in another partition than its package's, is unreadable.
        """
        events = EventBatch()
        kept: list[Record] = []
        unreadable: dict[int, str] = {}
        confirmed: set[int] = set()
        belongs: set[tuple[int, UUID]] = set()
        for record in records:
            try:
                entry = events.append(record.value, record.key)
            except UndecodableEventError as error:
                unreadable[len(kept)] = f"it cannot be read: {error}"
                kept.append(record)
                continue
            payload = entry.payload if isinstance(entry, Event) else None
            administrative = isinstance(payload, AdministrativePayload)
            place = record.partition, entry.package_id
            if administrative or place not in belongs:
                cause = misplacement(record, entry.package_id, payload, partition_of)
                if cause is not None:
                    if not administrative:
                        events.drop_last()
                    unreadable[len(kept)] = cause
                elif administrative:
                    if isinstance(payload, LogSkipped):
                        confirmed.add(record.partition)
                    continue
                else:
                    belongs.add(place)
            kept.append(record)
        return cls(kept, events, next_offsets or {}, unreadable, frozenset(confirmed))

    async def passing_over(self, skips: Skips) -> Self:
        """Without the records that an operator has confirmed to be no events. Raises as `Skips.covers`."""
        bad = {i: BadRecord.of(self.records[i], cause) for i, cause in self.unreadable.items()}
        passed = {i for i, record in bad.items() if await skips.covers(record)}
        if not passed:
            return self
        kept = [i for i in range(len(self.records)) if i not in passed]
        unreadable = {at: self.unreadable[i] for at, i in enumerate(kept) if i in self.unreadable}
        return replace(self, records=[self.records[i] for i in kept], unreadable=unreadable)

    def __iter__(self) -> Iterator[tuple[Record, Event | str]]:
        """Each record with its event, or with the cause why there is none."""
        events = iter(self.events)
        for i, record in enumerate(self.records):
            yield record, self.unreadable[i] if i in self.unreadable else next(events)

    def last_times(self) -> Mapping[int, int]:
        """When the last event of each partition was recorded, in µs since 1970."""
        times: dict[int, int] = {}
        at = len(self.events)
        for i in range(len(self.records) - 1, -1, -1):
            if i not in self.unreadable:
                at -= 1
                times.setdefault(self.records[i].partition, self.events[at].created_at)
            if len(times) == len(self.next_offsets):
                break
        return times

    def last_records(self) -> Mapping[int, Record]:
        """The last record of each partition."""
        return {record.partition: record for record in self.records}


async def read_range(
    log: Log, since: Position, ends: Mapping[int, int], *, batch_events: int, batch_bytes: int = BATCH_BYTES
) -> AsyncGenerator[DecodedBatch]:
    """Read on from `since`, in these partitions, exactly to `ends`: offsets without events lie there as well.

    A batch has at most so many events or bytes, but at least one record. Decoding takes place in a thread.

    Raises as `Log.scan`.
    """
    skips = Skips(log)
    starts = {p: since.offsets.get(p, 0) for p, end in ends.items() if since.offsets.get(p, 0) < end}
    records: list[Record] = []
    behind: dict[int, int] = {}
    size = 0
    async with aclosing(log.scan(starts, ends)) as batches:
        async for batch in batches:
            for record in batch.records:
                if records and (len(records) >= batch_events or size + len(record.value) > batch_bytes):
                    yield await decode(log, records, skips, {**behind, record.partition: record.offset})
                    records, behind, size = [], {}, 0
                records.append(record)
                behind[record.partition] = record.offset + 1
                size += len(record.value)
            behind.update(batch.next_offsets)
    if behind:
        yield await decode(log, records, skips, behind)


async def decode(
    log: Log, records: Sequence[Record], skips: Skips, next_offsets: Mapping[int, int] | None = None
) -> DecodedBatch:
    """Decode the records, in a thread if they are many, and leave out those that an operator confirmed to be no events.

    Raises as `Skips.covers`.
    """
    if len(records) <= _FEW:
        batch = DecodedBatch.of(records, log.partition_of, next_offsets)
    else:
        batch = await asyncio.to_thread(DecodedBatch.of, records, log.partition_of, next_offsets)
    return await batch.passing_over(skips) if batch.unreadable else batch
