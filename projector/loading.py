"""Loading: folding a long stretch of the log into one generation, faster than a member of a group could.

Reads given partitions by plain consumers; while one batch is written, the next one is read and decoded in a thread. The
checkpoint's guard is that of every other fold, so that a crash, or another who loads the same, can do no harm.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass

from projector.decoding import decode_records
from projector.pace import Pace
from schemas.events import Event
from services.log.port import Log, Record
from services.log.position import Position
from services.views.checkpoints import Checkpoint, apply
from services.views.engine import Views
from services.views.projections import Projection

_BATCH_BYTES = 8 << 20

Told = Callable[[int, Mapping[int, int]], None]
"""Called behind each batch with how many events it had, and with the offsets behind it by partition."""


@dataclass(frozen=True, slots=True)
class Stretch:
    """Decoded events and the offsets behind them."""

    events: Sequence[Event]
    next_offsets: Mapping[int, int]


async def load(
    views: Views,
    log: Log,
    projection: Projection,
    since: Checkpoint,
    ends: Mapping[int, int],
    *,
    pace: Pace,
    told: Told,
) -> Checkpoint:
    """Fold what lies between the generation's checkpoint and `ends`, exactly that; returns the checkpoint behind it.

    Raises:
        StaleCheckpointError: another has moved the generation, or it is not there any more.
        CorruptError: an event cannot be read or does not follow; the generation holds what came before it.
        UnavailableError: the log or the database cannot be reached.
    """
    at = since
    applying: asyncio.Task[Checkpoint] | None = None
    # SQLite has one writer: whoever never stops writing lets nobody else in.
    overlaps = views.dialect != "sqlite"
    try:
        async with aclosing(_stretches(log, since.position, ends, pace.batch_events)) as stretches:
            async for stretch in stretches:
                if applying is not None:
                    at = await applying
                await pace.wait(len(stretch.events))
                applying = asyncio.create_task(_apply(views, projection, stretch, at, told))
                if not overlaps:
                    at, applying = await applying, None
                    await asyncio.sleep(0)
        if applying is not None:
            at = await applying
    finally:
        if applying is not None and not applying.done():
            await asyncio.wait([applying])  # its end is seen in the checkpoint
    return at


async def read_stretch(log: Log, since: Position, ends: Mapping[int, int]) -> Stretch:
    """Everything between a position and `ends` at once: for stretches that are known to be short."""
    events: list[Event] = []
    behind: dict[int, int] = {}
    async with aclosing(_stretches(log, since, ends, None)) as stretches:
        async for stretch in stretches:
            events += stretch.events
            behind.update(stretch.next_offsets)
    return Stretch(events, behind)


async def _stretches(
    log: Log, since: Position, ends: Mapping[int, int], batch_events: int | None
) -> AsyncGenerator[Stretch, None]:
    starts = {p: since.offsets.get(p, 0) for p, end in ends.items() if since.offsets.get(p, 0) < end}
    records: list[Record] = []
    behind: dict[int, int] = {}
    size = 0
    async with aclosing(log.scan(starts, ends)) as batches:  # type: ignore[type-var] # every adapter's is a generator
        async for batch in batches:
            for record in batch.records:
                if records and batch_events is not None and (len(records) >= batch_events or size >= _BATCH_BYTES):
                    yield await _decoded(records, {**behind, record.partition: record.offset})
                    records, behind, size = [], {}, 0
                records.append(record)
                behind[record.partition] = record.offset + 1
                size += len(record.value)
            behind.update(batch.next_offsets)
    if behind:
        yield await _decoded(records, behind)


async def _apply(views: Views, projection: Projection, stretch: Stretch, at: Checkpoint, told: Told) -> Checkpoint:
    behind = await apply(views, projection, stretch.events, since=at, next_offsets=stretch.next_offsets)
    told(len(stretch.events), stretch.next_offsets)
    return behind


async def _decoded(records: Sequence[Record], behind: Mapping[int, int]) -> Stretch:
    return Stretch(await asyncio.to_thread(decode_records, records), behind)
