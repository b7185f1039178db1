"""Writing what a source has read into a view, each batch in one transaction with the checkpoint.

`apply` writes a batch into any generation; projectors, replays and catch-ups all call it. `fold` applies to the live
view, and then retries the parked packages that may continue. `catch_up` brings a view up to the log's end in the
caller's process, for the embedded parts and for replays. Any number of processes may run it at once, beside
projectors: the checkpoint's guard lets one fold of a batch through, and the others continue from the new checkpoint.

`retry` folds the events that wait in the log for a parked package. It begins at the mark and moves it, each batch in
one transaction with the mark, so nothing is folded twice. It reads the log before it locks the view, so that folds of
the package's partition wait only for the database, however slow the log is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection
from contextlib import aclosing
from dataclasses import dataclass, replace
from uuid import UUID

from sqlalchemy import select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError, UnavailableError
from artifact_store.position import Position
from services.log.port import Log, Record
from services.log.records import Skips
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
from services.views.engine.parking import (
    Mark,
    Parking,
    TooManyParkedError,
    forget_mark,
    key_name,
    list_marks,
    read_marks,
)
from services.views.engine.source import BATCH_EVENTS, EventBatch, read_range
from services.views.projections import Projection, projection_named
from services.views.tables import projection_checkpoints


async def apply(views: Views, projection: Projection, batch: EventBatch) -> Checkpoint:
    """Fold the batch and move the checkpoint, in one transaction; returns the checkpoint after it.

    The generation may be the live one or a build. An event that cannot be read or applied parks its package, up to
    `views.max_parked` packages.

    Raises:
        StaleCheckpointError: in one of the batch's partitions the view does not stand where the batch begins, or the
            generation is gone; nothing was changed.
        CorruptError: too many packages would be parked; nothing was changed.
        UnavailableError: the transaction may or may not have been committed; the checkpoint tells.
    """
    most = views.max_parked
    try:
        async with views.writing() as connection:
            return await apply_within(connection, projection, batch, max_parked=most, whole=True)
    except (LogIdentityError, DamagedDatabaseError, TooManyParkedError):
        raise
    except CorruptError:
        pass
    # Savepoints cost time, and only a batch with a bad event needs them.
    async with views.writing() as connection:
        return await apply_within(connection, projection, batch, max_parked=most)


async def apply_within(
    connection: AsyncConnection,
    projection: Projection,
    batch: EventBatch,
    *,
    max_parked: int,
    whole: bool = False,
) -> Checkpoint:
    """Do what `apply` does within the caller's transaction, which must be rolled back if this raises.

    With `whole`, which is faster, one event that cannot be applied fails the batch with CorruptError. Unreadable
    records are parked either way.
    """
    generation = batch.since.generation
    tables = await tables_of(connection, projection, batch.since)
    last = batch.last_records()
    for partition in sorted(batch.ends):  # the same order in all folds, so that they cannot deadlock
        await _advance(connection, projection, batch, partition, last.get(partition))
    # Read the marks after the guard, which waits for a running retry, so that its changes are seen.
    parking = Parking(connection, projection, tables, generation, max_parked, await read_marks(connection, generation))
    await parking.fold(batch, whole=whole)
    await parking.save()
    return batch.after


async def _advance(
    connection: AsyncConnection,
    projection: Projection,
    batch: EventBatch,
    partition: int,
    record: Record | None,
) -> None:
    """The guard: move one partition's offset from the batch's start to its end, if the view stands at the start.

    `record` is the partition's last one in the batch. Raises StaleCheckpointError: the view is at another offset.
    """
    table, generation = projection_checkpoints, batch.since.generation
    expected = batch.since.position.offsets.get(partition, 0)
    changed: dict[str, object] = {"next_offset": batch.ends[partition]}
    if record is not None:
        last = LastRecord.of(record)
        changed |= {"last_offset": last.offset, "last_digest": last.digest}
    if expected == 0:  # an absent row means 0 too
        row = {"generation": generation, "partition": partition, "projection": projection.name, **changed}
        put = upsert(connection, table).values(row)
        moved = await connection.execute(
            put.on_conflict_do_update(
                index_elements=[table.c.generation, table.c.partition], set_=changed, where=table.c.next_offset == 0
            )
        )
    else:
        mine = (table.c.generation == generation, table.c.partition == partition)
        moved = await connection.execute(update(table).where(*mine, table.c.next_offset == expected).values(changed))
    if moved.rowcount != 1:
        raise StaleCheckpointError(f"the view {projection.name} is not at {expected} of partition {partition}")


async def fold(views: Views, log: Log, projection: Projection, batch: EventBatch) -> Checkpoint:
    """Apply a batch to the live view. Then retry the parked packages that may continue after a confirmation in it.

    Raises as `apply` and `retry`.
    """
    at = await apply(views, projection, batch)
    if batch.confirmed:
        await _retry_confirmed(views, log, projection, batch.confirmed)
    return at


Progress = Callable[[int, Position], None]
"""Called after each batch with the number of events folded so far and the view's position."""


async def catch_up(
    views: Views,
    log: Log,
    projection: Projection,
    *,
    until: Position | None = None,
    batch_events: int = BATCH_EVENTS,
    progress: Progress | None = None,
) -> int:
    """Fold until the view covers `until` (None: the log's end at the call). Returns how many events this call folded.

    Raises:
        LogIdentityError: the view was folded from another log.
        CorruptError: the log does not continue from what the view has folded, or too many packages would be parked.
        UnavailableError: the log or the database cannot be reached; nothing is lost, call again.
    """
    identity = await log.identity()
    total = 0
    async with views.folding[projection.name]:
        while True:
            checkpoint = await load_checkpoint(views, projection, identity)
            end = await log.end(checkpoint.position)  # after the checkpoint: an end read earlier could lie before it
            require_same_log(projection, identity, end.log)
            until = until or end
            check_within(checkpoint.position, end, projection.name)
            if checkpoint.position.covers(until):
                return total
            await check_continues(log, projection.name, checkpoint, end.offsets, end=end)
            try:
                async with aclosing(read_range(log, checkpoint, end.offsets, batch_events=batch_events)) as batches:
                    async for batch in batches:
                        after = await fold(views, log, projection, batch)
                        total += len(batch)
                        if progress is not None:
                            progress(total, after.position)
            except StaleCheckpointError:
                continue  # another process folds too: continue from its checkpoint


_CHASES = 3
"""How often `retry` reads newly arrived events without a lock, before it makes folds wait while it reads the last."""

_LOCKED_SECONDS = 5.0
"""How long folds wait at most while the last events are read."""


@dataclass(frozen=True, slots=True)
class Retried:
    """The result of a retry: how many events were folded, and the mark if the package is parked again."""

    package: str
    projection: str
    events: int
    mark: Mark | None


async def retry(views: Views, log: Log, mark: Mark) -> Retried:
    """Fold the package's events from the mark to the view's position. Retry the marks of a partition in log order.

    Blocks until the package is followed again, or is parked at its next bad event. If this raises, the events folded so
    far remain, and the mark has moved past them.

    Raises:
        StaleCheckpointError: the mark is gone or has moved, or the view has been folded again since.
        CorruptError, LogIdentityError: the log is not the one that the view was folded from.
        UnavailableError: the log or the database cannot be reached.
    """
    projection = projection_named(mark.projection)
    identity = await log.identity()
    checkpoint = await load_checkpoint(views, projection, identity)
    await check_continues(log, projection.name, checkpoint, [mark.partition])
    skips = Skips(log)
    folded, chases = 0, 0
    batch = EventBatch(_at(mark, identity), {mark.partition: mark.offset})
    while True:
        end = (await load_checkpoint(views, projection, identity)).position.offsets.get(mark.partition, 0)
        batch = await _read_waiting(log, mark, batch.after, end, skips)
        at = batch.ends[mark.partition]
        chases += at == end
        async with views.writing() as connection:
            tables = await tables_of(connection, projection, batch.since)
            end = await _hold_partition(connection, mark)
            marks = await read_marks(connection, mark.generation)
            found = marks.pop(mark.key, None)
            if found is None or not await forget_mark(connection, mark):
                raise StaleCheckpointError(
                    f"{mark.package} is not parked in {mark.projection} at offset {mark.offset} any more"
                )
            most = max(views.max_parked, len(marks) + 1)  # a projector with a higher limit may have parked more
            parking = Parking(connection, projection, tables, mark.generation, most, marks)
            await parking.fold(batch)
            done = len(batch)
            if at < end and found.events > done and chases > _CHASES:
                batch = await _read_locked(log, mark, batch.after, end, skips)
                at = batch.ends[mark.partition]
                await parking.fold(batch)
                done += len(batch)
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
    """Block folds of the mark's partition until the transaction ends. Returns the view's offset in the partition."""
    table = projection_checkpoints.c
    query = select(table.next_offset).where(table.generation == mark.generation, table.partition == mark.partition)
    end: int = (await connection.execute(query.with_for_update())).scalar_one()
    return end


def _at(mark: Mark, log: UUID) -> Checkpoint:
    return Checkpoint(mark.generation, Position(log, {mark.partition: mark.offset}))


async def _read_waiting(log: Log, mark: Mark, since: Checkpoint, end: int, skips: Skips) -> EventBatch:
    """Read the records of the mark's package from `since` up to `end`, or only the first batch if they are many."""

    def waits(record: Record) -> bool:
        return key_name(record.key)[0] == mark.package

    reading = read_range(log, since, {mark.partition: end}, batch_events=BATCH_EVENTS, only=waits, skips=skips)
    async with aclosing(reading) as batches:
        return await anext(batches, EventBatch(since, since.position.offsets))


async def _read_locked(log: Log, mark: Mark, since: Checkpoint, end: int, skips: Skips) -> EventBatch:
    """Do what `_read_waiting` does for the few records that arrived since. Raises UnavailableError after too long."""
    try:
        async with asyncio.timeout(_LOCKED_SECONDS):
            return await _read_waiting(log, mark, since, end, skips)
    except TimeoutError:
        raise UnavailableError(
            f"{mark.package} takes events faster than they are read from the log; retry it when it takes fewer"
        ) from None


async def _retry_confirmed(views: Views, log: Log, projection: Projection, partitions: Collection[int]) -> None:
    """Retry the live view's marks if an operator has confirmed that their record is not an event.

    Their packages then continue without another command.
    """
    skips, identity = Skips(log), await log.identity()
    for mark in await list_marks(views, projection.name):
        if mark.partition in partitions:
            batch = await _read_waiting(log, mark, _at(mark, identity), mark.offset + 1, skips)
            if not len(batch):
                await retry(views, log, mark)
