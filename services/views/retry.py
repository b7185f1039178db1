"""Retrying parked packages: fold what waits in the log, a batch at a time, each in one transaction with the mark.

What the view holds of a parked package is what its events up to the mark make, so folding goes on at the mark and moves
it; nothing is folded twice. The log is read before the view is locked: folds of the package's partition wait for the
database alone, however long the log takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass, replace

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from services.errors import UnavailableError
from services.log.port import Log, Record
from services.log.position import Position
from services.log.records import Skips
from services.views.checkpoints import Checkpoint, StaleCheckpointError, load_checkpoint, tables_of
from services.views.engine import Views
from services.views.guard import check_continues
from services.views.parked import Mark, Parking, forget_mark, list_marks, package_of, read_marks
from services.views.projections import Projection, projection_named
from services.views.reading import BATCH_BYTES, ReadBatch, read_batch
from services.views.tables import projection_checkpoints

_BATCH_EVENTS = 2000

_CHASES = 3
"""How often what came meanwhile is read without a lock, before folds wait for the last of it."""

_LOCKED_SECONDS = 5.0
"""How long folds wait at most while that is read."""


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to: how many events were folded, and the mark of a package that is parked again."""

    package: str
    projection: str
    events: int
    mark: Mark | None


async def retry(views: Views, log: Log, mark: Mark) -> Retried:
    """Fold what waits behind the mark, up to where the view stands. Marks of one partition: the earliest first.

    Blocks until the package is followed again or parked at its next bad event. When it fails, what was folded by then
    stays, and the mark has moved behind it.

    Raises:
        StaleCheckpointError: the mark is not there any more or has moved, or the view was folded again since.
        CorruptError, LogIdentityError: the log is not the one that the view was folded from.
        UnavailableError: the log or the database cannot be reached.
    """
    projection = projection_named(mark.projection)
    identity = await log.identity()
    checkpoint = await load_checkpoint(views, projection, identity)
    await check_continues(log, projection.name, checkpoint, [mark.partition])
    here = Checkpoint(mark.generation, Position(identity, {}))
    skips = Skips(log)
    folded, chases, at = 0, 0, mark.offset
    while True:
        end = (await load_checkpoint(views, projection, identity)).position.offsets.get(mark.partition, 0)
        batch, at = await _read(log, mark, at, end, skips)
        chases += at == end
        async with views.writing() as connection:
            tables = await tables_of(connection, projection, here)
            end = await _hold_partition(connection, mark)
            marks = await read_marks(connection, mark.generation)
            found = marks.pop(mark.key, None)
            if found is None or not await forget_mark(connection, mark):
                raise StaleCheckpointError(
                    f"{mark.package} is not parked in {mark.projection} at offset {mark.offset} any more"
                )
            most = max(views.max_parked, len(marks) + 1)  # a projector was allowed as many as there are
            parking = Parking(connection, projection, tables, mark.generation, most, marks)
            await parking.fold(batch)
            done = len(batch.records)
            if at < end and found.events > done and chases > _CHASES:
                batch, at = await _read_locked(log, mark, at, end, skips)
                await parking.fold(batch)
                done += len(batch.records)
            again = parking.marks.get(mark.key)
            done -= 0 if again is None else again.events
            folded, left = folded + done, found.events - done
            if again is not None:
                parking.marks[mark.key] = replace(again, events=left)
            elif at < end and left:
                parking.marks[mark.key] = replace(found, offset=at, events=left)
            await parking.save()
        if again is not None or mark.key not in parking.marks:
            return Retried(mark.package, mark.projection, folded, parking.marks.get(mark.key))
        mark = parking.marks[mark.key]


async def _hold_partition(connection: AsyncConnection, mark: Mark) -> int:
    """Let no fold of the mark's partition begin until the transaction ends; where the view stands in it."""
    table = projection_checkpoints.c
    query = select(table.next_offset).where(table.generation == mark.generation, table.partition == mark.partition)
    end: int = (await connection.execute(query.with_for_update())).scalar_one()
    return end


async def _read(log: Log, mark: Mark, start: int, end: int, skips: Skips) -> tuple[ReadBatch, int]:
    """What waits between these offsets, or the first of it, and the offset behind what was read."""
    waiting: list[Record] = []
    size, at = 0, start
    async with aclosing(log.scan({mark.partition: start}, {mark.partition: end})) as batches:
        async for batch in batches:
            for record, event in await read_batch(log, batch.records, skips):
                if package_of(record, event)[0] == mark.package:
                    waiting.append(record)
                    size += len(record.value)
            at = batch.next_offsets.get(mark.partition, at)
            if len(waiting) >= _BATCH_EVENTS or size >= BATCH_BYTES:
                break
    return await read_batch(log, waiting, skips), at


async def _read_locked(log: Log, mark: Mark, start: int, end: int, skips: Skips) -> tuple[ReadBatch, int]:
    """As `_read`, for the little that came since. Raises UnavailableError when the log takes too long."""
    try:
        async with asyncio.timeout(_LOCKED_SECONDS):
            return await _read(log, mark, start, end, skips)
    except TimeoutError:
        raise UnavailableError(
            f"{mark.package} takes events faster than they are read from the log; retry it when it takes fewer"
        ) from None


async def retry_confirmed(views: Views, log: Log, projection: Projection, partitions: Collection[int]) -> None:
    """Retry the marks of the live view that stand on a record which an operator has confirmed to be no event.

    To be called once confirmations in these partitions were read: what waits behind such a record goes on by itself.
    Raises as `retry`.
    """
    skips = Skips(log)
    marks = [mark for mark in await list_marks(views, projection.name) if mark.partition in partitions]
    for mark in marks:
        async with aclosing(log.scan({mark.partition: mark.offset}, {mark.partition: mark.offset + 1})) as batches:
            records = [record async for batch in batches for record in batch.records]
        if ReadBatch.of(records, log.partition_of).unreadable and not (await read_batch(log, records, skips)).records:
            await retry(views, log, mark)
