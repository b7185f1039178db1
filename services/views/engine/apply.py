"""Applying a batch: fold its events and move the checkpoint, in one transaction."""

from __future__ import annotations

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError
from artifact_store.position import Position
from services.views.bulk import upsert
from services.views.database import DamagedDatabaseError, Views
from services.views.engine.checkpoints import Checkpoint, LastRecord, StaleCheckpointError, tables_of
from services.views.engine.parking import Parking, TooManyParkedError, read_marks
from services.views.engine.source import DecodedBatch
from services.views.projections import Projection
from services.views.tables import projection_checkpoints


async def apply(views: Views, projection: Projection, batch: DecodedBatch, *, since: Checkpoint) -> Checkpoint:
    """Fold the batch and move the checkpoint, in one transaction; returns the checkpoint after it.

    The batch was read from `since`, in the partitions that its `next_offsets` name. The generation may be the live one
    or one that is being built. An event that cannot be read or applied parks its package, up to `views.max_parked`
    packages. In a batch without records, which only tests make, it is an error.

    Raises:
        StaleCheckpointError: the view does not stand at `since` in one of these partitions, or there is no such
            generation any more; nothing was changed.
        CorruptError: too many packages would be parked; nothing was changed.
        UnavailableError: the transaction may or may not be there; the checkpoint tells.
    """
    most = views.max_parked
    try:
        async with views.writing() as connection:
            return await apply_within(connection, projection, batch, since=since, max_parked=most, whole=True)
    except (LogIdentityError, DamagedDatabaseError, TooManyParkedError):
        raise
    except CorruptError:
        if not batch.records:
            raise
    # Good batches never pay for this: after a failure, PostgreSQL's transactions only go on from a savepoint.
    async with views.writing() as connection:
        return await apply_within(connection, projection, batch, since=since, max_parked=most)


async def apply_within(
    connection: AsyncConnection,
    projection: Projection,
    batch: DecodedBatch,
    *,
    since: Checkpoint,
    max_parked: int,
    whole: bool = False,
) -> Checkpoint:
    """As `apply`, in a transaction of the caller's, which must not go on when this raises.

    With `whole`, which is the fast way, one event that cannot be applied fails the batch with CorruptError.
    """
    tables = await tables_of(connection, projection, since)
    last = {p: LastRecord.of(record) for p, record in batch.last_records().items()}
    for partition in sorted(batch.next_offsets):  # one order for all, so that no two wait for each other
        await _advance(connection, projection, since, partition, batch.next_offsets[partition], last.get(partition))
    # After the guard, which waits for a retry that is under way: the marks are those that it leaves.
    marks = await read_marks(connection, since.generation)
    parking = Parking(connection, projection, tables, since.generation, max_parked, marks)
    if not whole:
        await parking.fold(batch)
    elif events := parking.pass_over(batch) if batch.records else batch.events:
        await projection.fold(connection, tables, events)
    await parking.save()
    position = Position(since.position.log, {**since.position.offsets, **batch.next_offsets})
    return Checkpoint(since.generation, position, {**since.last, **last})


async def _advance(
    connection: AsyncConnection,
    projection: Projection,
    since: Checkpoint,
    partition: int,
    following: int,
    last: LastRecord | None,
) -> None:
    """Move one partition's offset from where the batch begins. Raises StaleCheckpointError when it is not there."""
    table, expected = projection_checkpoints, since.position.offsets.get(partition, 0)
    changed: dict[str, object] = {"next_offset": following}
    if last is not None:
        changed |= {"last_offset": last.offset, "last_digest": last.digest}
    if expected == 0:  # which an absent row means as well
        row = {"generation": since.generation, "partition": partition, "projection": projection.name, **changed}
        put = upsert(connection, table).values(row)
        moved = await connection.execute(
            put.on_conflict_do_update(
                index_elements=[table.c.generation, table.c.partition], set_=changed, where=table.c.next_offset == 0
            )
        )
    else:
        mine = (table.c.generation == since.generation, table.c.partition == partition)
        moved = await connection.execute(update(table).where(*mine, table.c.next_offset == expected).values(changed))
    if moved.rowcount != 1:
        raise StaleCheckpointError(f"the view {projection.name} is not at {expected} of partition {partition}")
