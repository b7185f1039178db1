"""Records on their way into a view: decoded where they can be, and kept, so that a fold can say which they were."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Self

from schemas.batch import EventBatch
from schemas.codec import UndecodableEventError
from schemas.events import Event
from services.log.port import Log, Record
from services.log.position import Position

BATCH_BYTES = 8 << 20
"""A batch ends early when its records have so many bytes, so that memory is bounded: manifests are large."""

_FEW = 20
"""So few records are decoded sooner than a thread takes them."""


@dataclass(frozen=True, slots=True)
class ReadBatch:
    """Records in log order per partition, the events in them in the same order, and what cannot be read.

    `unreadable` tells the cause, by the index of the record.
    """

    records: Sequence[Record] = ()
    events: Sequence[Event] = ()
    unreadable: Mapping[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, records: Sequence[Record]) -> Self:
        """Decode the records. Blocks for as long as that takes.

        An event under a key that is not its package's id is unreadable too: whoever reads by package misses it.
        """
        events = EventBatch()
        unreadable: dict[int, str] = {}
        for i, record in enumerate(records):
            try:
                events.append(record.value, record.key)
            except UndecodableEventError as error:
                unreadable[i] = f"it cannot be read: {error}"
        return cls(records, events, unreadable)

    def __iter__(self) -> Iterator[tuple[Record, Event | str]]:
        """Each record with its event, or with the cause why there is none."""
        events = iter(self.events)
        for i, record in enumerate(self.records):
            yield record, self.unreadable[i] if i in self.unreadable else next(events)

    def last_records(self) -> Mapping[int, Record]:
        """The last record of each partition."""
        return {record.partition: record for record in self.records}


@dataclass(frozen=True, slots=True)
class Stretch:
    """What lies between two positions: a batch, and the offsets behind it in the partitions that it moves."""

    batch: ReadBatch
    next_offsets: Mapping[int, int]


async def read_stretches(
    log: Log, since: Position, ends: Mapping[int, int], *, batch_events: int, batch_bytes: int = BATCH_BYTES
) -> AsyncGenerator[Stretch]:
    """Read on from `since`, in these partitions, exactly to `ends`; each stretch has at most so many events or bytes,
    but one record at least. Decoding takes place in a thread.

    Raises as `Log.scan`.
    """
    starts = {p: since.offsets.get(p, 0) for p, end in ends.items() if since.offsets.get(p, 0) < end}
    records: list[Record] = []
    behind: dict[int, int] = {}
    size = 0
    async with aclosing(log.scan(starts, ends)) as batches:
        async for batch in batches:
            for record in batch.records:
                if records and (len(records) >= batch_events or size + len(record.value) > batch_bytes):
                    yield Stretch(await _decoded(records), {**behind, record.partition: record.offset})
                    records, behind, size = [], {}, 0
                records.append(record)
                behind[record.partition] = record.offset + 1
                size += len(record.value)
            behind.update(batch.next_offsets)
    if behind:
        yield Stretch(await _decoded(records), behind)


async def _decoded(records: Sequence[Record]) -> ReadBatch:
    if len(records) <= _FEW:
        return ReadBatch.of(records)
    return await asyncio.to_thread(ReadBatch.of, records)
