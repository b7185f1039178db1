"""Applying: one batch in one transaction, one batch into the live view, a range of the log, and all that the log holds.

`apply` folds a batch and moves the checkpoint in one transaction; everything else here calls it. `catch_up` brings a
view up to the log's end in the caller's own process, for the embedded parts and for replays. Any number of processes
may do it at once, beside projectors: the checkpoint's guard lets one fold of a batch through, and the others find that
the view has moved and go on from there.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Mapping
from contextlib import aclosing
from typing import Any

from sqlalchemy import update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError
from artifact_store.position import Position
from services.log.port import Log
from services.views.bulk import upsert
from services.views.database import DamagedDatabaseError, Views
from services.views.engine.checkpoints import (
    Checkpoint,
    LastRecord,
    StaleCheckpointError,
    check_continues,
    check_within,
    load_checkpoint,
    require_same_log,
    tables_of,
)
from services.views.engine.parking import Parking, TooManyParkedError, read_marks, retry_confirmed
from services.views.engine.source import DecodedBatch, read_range
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


BATCH_EVENTS = 2000

Progress = Callable[[int, Position], None]
"""Called after each batch with how many events were folded so far, and where the view stands."""

Put = Callable[[DecodedBatch, Checkpoint], Coroutine[Any, Any, Checkpoint]]
"""Applies a batch that was read from this checkpoint; returns the checkpoint after it."""


async def fold(views: Views, log: Log, projection: Projection, batch: DecodedBatch, *, since: Checkpoint) -> Checkpoint:
    """Apply a batch to the live view, then retry the packages that its confirmations let go on.

    Raises as `apply` and `retry_confirmed`.
    """
    at = await apply(views, projection, batch, since=since)
    if batch.confirmed:
        await retry_confirmed(views, log, projection, batch.confirmed)
    return at


async def fold_range(
    log: Log,
    since: Checkpoint,
    ends: Mapping[int, int],
    put: Put,
    *,
    batch_events: int = BATCH_EVENTS,
    read_ahead: bool = False,
) -> Checkpoint:
    """Read what lies between a checkpoint and `ends`, exactly that, and `put` it batch by batch.

    Returns the checkpoint after the last batch. With `read_ahead` the next batch is read and decoded while one is being
    put. A failure to read it waits for that: the checkpoint tells how far the view has come.

    Raises as `put` and `Log.scan`.
    """
    at = since
    putting: asyncio.Task[Checkpoint] | None = None
    try:
        async with aclosing(read_range(log, since.position, ends, batch_events=batch_events)) as batches:
            async for batch in batches:
                if putting is not None:
                    at = await putting
                if read_ahead:
                    putting = asyncio.create_task(put(batch, at))
                else:
                    at = await put(batch, at)
        return at if putting is None else await putting
    finally:
        if putting is not None and not putting.done():
            await asyncio.wait([putting])


async def catch_up(
    views: Views,
    log: Log,
    projection: Projection,
    *,
    until: Position | None = None,
    batch_events: int = BATCH_EVENTS,
    progress: Progress | None = None,
) -> int:
    """Return when the view covers `until` (None: the log's end as of the call); how many events were folded here.

    Raises:
        LogIdentityError: the view was folded from another log.
        CorruptError: the log does not go on from what the view has folded, or too many packages would be parked.
        UnavailableError: the log or the database cannot be reached; nothing is lost, call again.
    """
    identity = await log.identity()
    total = 0

    async def put(batch: DecodedBatch, at: Checkpoint) -> Checkpoint:
        nonlocal total
        after = await fold(views, log, projection, batch, since=at)
        total += len(batch.records)
        if progress is not None:
            progress(total, after.position)
        return after

    async with views.folding[projection.name]:
        while True:
            checkpoint = await load_checkpoint(views, projection, identity)
            end = await log.end(checkpoint.position)  # after the checkpoint, which others may move on meanwhile
            require_same_log(projection, identity, end.log)
            until = until or end
            check_within(checkpoint.position, end, projection.name)
            if checkpoint.position.covers(until):
                return total
            await check_continues(log, projection.name, checkpoint, end.offsets, end=end)
            try:
                await fold_range(log, checkpoint, end.offsets, put, batch_events=batch_events)
            except StaleCheckpointError:
                continue  # another folds as well: go on from where it has come to
