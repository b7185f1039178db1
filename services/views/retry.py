"""Retrying parked packages: fold what waits in the log, in one transaction with the removal of the mark.

What the view holds of a parked package is what its events up to the mark make, so folding goes on at the mark; nothing
is folded twice. Folds of the package's partition wait meanwhile.
"""

from __future__ import annotations

from collections.abc import Collection
from contextlib import aclosing
from dataclasses import dataclass

from sqlalchemy import select

from services.log.port import Log, Record
from services.log.position import Position
from services.log.records import Skips
from services.views.checkpoints import Checkpoint, StaleCheckpointError, load_checkpoint, tables_of
from services.views.engine import Views
from services.views.guard import check_continues
from services.views.parked import Mark, Parking, forget_mark, list_marks, package_of, read_marks
from services.views.projections import Projection, projection_named
from services.views.reading import ReadBatch, read_batch
from services.views.tables import projection_checkpoints

_BATCH_EVENTS = 2000


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to: how many events were folded, and the mark of a package that is parked again."""

    package: str
    projection: str
    events: int
    mark: Mark | None


async def retry(views: Views, log: Log, mark: Mark) -> Retried:
    """Fold what waits behind the mark, up to where the view stands. Marks of one partition: the earliest first.

    Raises:
        StaleCheckpointError: the mark is not there any more or has moved, or the view was folded again since.
        CorruptError, LogIdentityError: the log is not the one that the view was folded from.
        UnavailableError: the log or the database cannot be reached.
    """
    projection = projection_named(mark.projection)
    checkpoint = await load_checkpoint(views, projection, await log.identity())
    await check_continues(log, projection.name, checkpoint, [mark.partition])
    async with views.writing() as connection:
        here = Checkpoint(mark.generation, Position(checkpoint.position.log, {}))
        tables = await tables_of(connection, projection, here)
        table = projection_checkpoints.c
        query = select(table.next_offset).where(table.generation == mark.generation, table.partition == mark.partition)
        end = (await connection.execute(query.with_for_update())).scalar_one()
        if not await forget_mark(connection, mark):
            raise StaleCheckpointError(
                f"{mark.package} is not parked in {mark.projection} at offset {mark.offset} any more"
            )
        marks = await read_marks(connection, mark.generation)
        most = max(views.max_parked, len(marks) + 1)  # a projector was allowed as many as there are
        parking = Parking(connection, projection, tables, mark.generation, most, marks)
        skips = Skips(log)
        seen = 0
        waiting: list[Record] = []
        batches = log.scan({mark.partition: mark.offset}, {mark.partition: end})
        async with aclosing(batches):
            async for batch in batches:
                found = await read_batch(log, batch.records, skips)
                waiting += [record for record, event in found if package_of(record, event)[0] == mark.package]
                if len(waiting) >= _BATCH_EVENTS:
                    await parking.fold(await read_batch(log, waiting, skips))
                    seen, waiting = seen + len(waiting), []
        await parking.fold(await read_batch(log, waiting, skips))
        await parking.save()
        again = parking.marks.get(mark.key)
    folded = seen + len(waiting) - (0 if again is None else again.events)
    return Retried(mark.package, mark.projection, folded, again)


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
