"""Retrying parked packages: fold what waits in the log, in one transaction with the removal of the mark.

What the view holds of a parked package is what its events up to the mark make, so folding goes on at the mark; nothing
is folded twice. Folds of the package's partition wait meanwhile.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass

from sqlalchemy import select

from services.log.port import Log, Record
from services.log.position import Position
from services.views.checkpoints import Checkpoint, StaleCheckpointError, load_checkpoint, tables_of
from services.views.engine import Views
from services.views.guard import check_continues
from services.views.parked import Mark, Parking, forget_mark, package_of, read_marks
from services.views.projections import projection_named
from services.views.reading import ReadBatch
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
        seen = 0
        waiting: list[Record] = []
        batches = log.scan({mark.partition: mark.offset}, {mark.partition: end})
        async with aclosing(batches):
            async for batch in batches:
                waiting += await asyncio.to_thread(_of_package, batch.records, mark)
                if len(waiting) >= _BATCH_EVENTS:
                    await parking.fold(await asyncio.to_thread(ReadBatch.of, waiting))
                    seen, waiting = seen + len(waiting), []
        await parking.fold(await asyncio.to_thread(ReadBatch.of, waiting))
        await parking.save()
        again = parking.marks.get(mark.key)
    folded = seen + len(waiting) - (0 if again is None else again.events)
    return Retried(mark.package, mark.projection, folded, again)


def _of_package(records: Sequence[Record], mark: Mark) -> list[Record]:
    """Those that wait behind the mark."""
    return [record for record, event in ReadBatch.of(records) if package_of(record, event)[0] == mark.package]
