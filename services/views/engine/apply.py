"""Applying a batch: fold its events and move the checkpoint, in one transaction."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from uuid import UUID

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError
from artifact_store.events import Event
from artifact_store.position import Position
from services.views.bulk import upsert
from services.views.database import DamagedDatabaseError, Views
from services.views.engine.checkpoints import Checkpoint, LastRecord, StaleCheckpointError, tables_of
from services.views.engine.parking import Parking, TooManyParkedError, read_marks
from services.views.engine.source import ReadBatch
from services.views.projections import Projection
from services.views.tables import projection_checkpoints


async def apply(
    views: Views,
    projection: Projection,
    events: ReadBatch | Sequence[Event],
    *,
    since: Checkpoint,
    next_offsets: Mapping[int, int],
) -> Checkpoint:
    """Fold the events and move the checkpoint, in one transaction; returns the checkpoint behind them.

    `events` are what lies between `since` and `next_offsets` in the partitions that the latter names. The
    generation may be the live one or one that is being built. What a ReadBatch holds that cannot be read or applied
    parks its package, up to `views.max_parked` packages; plain events that do not follow are an error.

    Raises:
        StaleCheckpointError: the view does not stand at `since` in one of these partitions, or there is no such
            generation any more; nothing was changed.
        CorruptError: an event does not follow what was folded before, or too many packages would be parked; nothing was
            changed.
        UnavailableError: the transaction may or may not be there; the checkpoint tells.
    """
    batch = events if isinstance(events, ReadBatch) else ReadBatch((), events)
    try:
        async with views.writing() as connection:
            fold = _Fold(connection, projection, views.max_parked, since)
            return await fold.run(batch, next_offsets, whole=True)
    except (LogIdentityError, DamagedDatabaseError, TooManyParkedError):
        raise
    except CorruptError:
        if not batch.records:
            raise
    # Good batches never pay for this: a failure in a transaction of PostgreSQL's can only be got over with savepoints.
    async with views.writing() as connection:
        fold = _Fold(connection, projection, views.max_parked, since)
        return await fold.run(batch, next_offsets, whole=False)


async def apply_within(
    views: Views,
    connection: AsyncConnection,
    projection: Projection,
    batch: ReadBatch,
    *,
    since: Checkpoint,
    next_offsets: Mapping[int, int],
) -> Checkpoint:
    """As `apply`, in a transaction of the caller's, which must not go on when this raises."""
    return await _Fold(connection, projection, views.max_parked, since).run(batch, next_offsets, whole=False)


class _Fold:
    """One batch into one generation, within one transaction."""

    def __init__(self, connection: AsyncConnection, projection: Projection, max_parked: int, since: Checkpoint) -> None:
        self._connection = connection
        self._projection = projection
        self._max_parked = max_parked
        self._since = since

    async def run(self, batch: ReadBatch, next_offsets: Mapping[int, int], *, whole: bool) -> Checkpoint:
        """Move the checkpoint and fold the batch: as a `whole`, so that one event that cannot be applied fails it."""
        connection, since = self._connection, self._since
        tables = await tables_of(connection, self._projection, since)
        last = {p: LastRecord.of(record) for p, record in batch.last_records().items()}
        await self._advance(next_offsets, last)
        # Behind the guard, which waits for a retry that is under way: the marks are those that it leaves.
        marks = await read_marks(connection, since.generation)
        parking = Parking(connection, self._projection, tables, since.generation, self._max_parked, marks)
        if not whole:
            await parking.fold(batch)
        elif events := parking.pass_over(batch) if batch.records else batch.events:
            await self._projection.fold(connection, tables, events)
        await parking.save()
        position = Position(since.position.log, {**since.position.offsets, **next_offsets})
        return Checkpoint(since.generation, position, {**since.last, **last})

    async def _advance(self, next_offsets: Mapping[int, int], last: Mapping[int, LastRecord]) -> None:
        name, before = self._projection.name, self._since.position.offsets
        for partition in sorted(next_offsets):  # one order for all, so that no two wait for each other
            expected, following = before.get(partition, 0), next_offsets[partition]
            generation = self._since.generation
            if not await _advance(
                self._connection, name, generation, partition, expected, following, last.get(partition)
            ):
                raise StaleCheckpointError(f"the view {name} is not at {expected} of partition {partition}")


async def _advance(
    connection: AsyncConnection,
    projection: str,
    generation: UUID,
    partition: int,
    expected: int,
    following: int,
    last: LastRecord | None,
) -> bool:
    """Move one partition's offset from `expected`; whether it stood there. An absent row stands at 0."""
    table = projection_checkpoints
    changed: dict[str, object] = {"next_offset": following}
    if last is not None:
        changed |= {"last_offset": last.offset, "last_digest": last.digest}
    if expected == 0:
        row = {"generation": generation, "partition": partition, "projection": projection, **changed}
        put = upsert(connection, table).values(row)
        moved = await connection.execute(
            put.on_conflict_do_update(
                index_elements=[table.c.generation, table.c.partition], set_=changed, where=table.c.next_offset == 0
            )
        )
    else:
        moved = await connection.execute(
            update(table)
            .where(table.c.generation == generation, table.c.partition == partition, table.c.next_offset == expected)
            .values(changed)
        )
    return moved.rowcount == 1
