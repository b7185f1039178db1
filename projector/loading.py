"""Loading: folding a long stretch of the log into one generation, faster than a member of a group could.

Reads given partitions by plain consumers; while one batch is written, the next one is read and decoded in a thread. The
checkpoint's guard is that of every other fold, so that a crash, or another who loads the same, can do no harm.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Mapping
from contextlib import aclosing

from projector.pace import Pace
from services.log.port import Log
from services.log.position import Position
from services.views.checkpoints import Checkpoint, apply
from services.views.engine import Views
from services.views.projections import Projection
from services.views.reading import ReadBatch, Stretch, read_stretches

Told = Callable[[int, Mapping[int, int]], None]
"""Called behind each batch with how many events it had, and with the offsets behind it by partition."""


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
        CorruptError: too many packages would be parked; the generation holds what came before that.
        UnavailableError: the log or the database cannot be reached.
    """
    at = since
    applying: asyncio.Task[Checkpoint] | None = None
    # SQLite has one writer: whoever never stops writing lets nobody else in.
    overlaps = views.dialect != "sqlite"
    try:
        async with aclosing(read_stretches(log, since.position, ends, batch_events=pace.batch_events)) as stretches:
            async for stretch in stretches:
                if applying is not None:
                    at = await applying
                await pace.wait(len(stretch.batch.records))
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
    everything = read_stretches(log, since, ends, batch_events=sys.maxsize, batch_bytes=sys.maxsize)
    async with aclosing(everything) as stretches:
        async for stretch in stretches:
            return stretch
    return Stretch(ReadBatch(), {})


async def _apply(views: Views, projection: Projection, stretch: Stretch, at: Checkpoint, told: Told) -> Checkpoint:
    behind = await apply(views, projection, stretch.batch, since=at, next_offsets=stretch.next_offsets)
    told(len(stretch.batch.records), stretch.next_offsets)
    return behind
