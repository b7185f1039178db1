"""Writing what a source has read into a view, each batch in one transaction with the checkpoint.

`apply` writes a batch into any generation; projectors, replays and catch-ups all call it. `fold` applies to the live
view, and then retries the parked packages that may continue. `catch_up` brings a view up to the log's end in the
caller's process, for the embedded parts and for replays. Any number of processes may run it at once, beside
projectors: the checkpoint's guard lets one fold of a batch through, and the others continue from the new checkpoint.

One event that a projection cannot read or apply parks its package, and no other. A `Mark` says where the package
stopped and why; the log keeps the bytes. The view holds the package as its events before the mark have left it. Which
event is to blame does not depend on how batches were cut: a batch that fails is halved until the event is found at
which a fold in log order would have stopped.

`retry` folds the events that wait in the log for a parked package. It begins at the mark and moves it, each batch in
one transaction with the mark, so nothing is folded twice. It reads the log before it locks the view, so that folds of
the package's partition wait only for the database, however slow the log is.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from uuid import UUID

from blake3 import blake3
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError, UnavailableError
from artifact_store.position import Position
from schemas.runs import Entry
from services.log.port import Log, Record
from services.log.records import Skips
from services.views.bulk import upsert
from services.views.database import DamagedDatabaseError, Views, database_errors
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
from services.views.engine.source import BATCH_EVENTS, EventBatch, read_range
from services.views.projections import Projection, Tables, projection_named
from services.views.tables import parked_packages, projection_checkpoints, projection_generations

_CAUSE_CHARACTERS = 500
_KEY_BYTES = 64


class TooManyParkedError(CorruptError, problem="too-many-parked"):
    """A projection would park more packages than it may. The cause is probably not a few bad events."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One parked package: from the record at `offset` of `partition` on, `events` of its events wait in the log.

    `package_id` is None if the record's key is not a package id; `package` is then a text that stands for the key.
    """

    projection: str
    generation: UUID
    partition: int
    package: str
    package_id: UUID | None
    offset: int
    events: int
    cause: str

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the mark within its generation."""
        return self.partition, self.package


def key_name(key: bytes) -> tuple[str, UUID | None]:
    """The package id in a record's key, as text and UUID; for another key, a text that stands for it, and None.

    Every decoded event has its package's id as its key.
    """
    try:
        text = key.decode("ascii")
        package_id = UUID(text)
    except ValueError:
        pass
    else:
        if str(package_id) == text:
            return text, package_id
    return f"key {key.hex()}" if len(key) <= _KEY_BYTES else f"key of blake3:{blake3(key).hexdigest()}", None


async def read_marks(connection: AsyncConnection, generation: UUID) -> dict[tuple[int, str], Mark]:
    """The marks of one generation, by partition and package."""
    rows = await connection.execute(select(parked_packages).where(parked_packages.c.generation == generation))
    marks = (_mark(row._asdict()) for row in rows)
    return {mark.key: mark for mark in marks}


async def list_marks(views: Views, projection: str | None = None) -> list[Mark]:
    """The marks of the live views, of one projection or of all, sorted by projection and position in the log."""
    live = projection_generations.c
    table = parked_packages.c
    query = select(parked_packages).join(projection_generations, live.generation == table.generation)
    if projection is not None:
        query = query.where(table.projection == projection)
    async with views.reading() as connection:
        rows = await connection.execute(query.order_by(table.projection, table.partition, table.offset, table.package))
        return [_mark(row._asdict()) for row in rows]


async def forget_mark(connection: AsyncConnection, mark: Mark) -> bool:
    """Remove one mark, unless another retry has removed or moved it. Returns whether this removed it."""
    table = parked_packages.c
    mine = (
        table.generation == mark.generation,
        table.partition == mark.partition,
        table.package == mark.package,
        table.offset == mark.offset,
    )
    return (await connection.execute(delete(parked_packages).where(*mine))).rowcount == 1


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


class Parking:
    """Folds batches within one transaction, parks packages whose events cannot be applied, and updates the marks."""

    def __init__(
        self,
        connection: AsyncConnection,
        projection: Projection,
        tables: Tables,
        generation: UUID,
        most: int,
        marks: Mapping[tuple[int, str], Mark],
    ) -> None:
        """At most `most` packages may be parked. `marks` are the generation's marks in the database."""
        self._connection = connection
        self._projection = projection
        self._tables = tables
        self._generation = generation
        self._most = most
        self.marks = dict(marks)
        """By partition and package. `save` writes them."""
        self._before = dict(marks)

    async def fold(self, batch: EventBatch, *, whole: bool = False) -> None:
        """Fold what can be folded and park the rest. With `whole`, park only unreadable records.

        Raises TooManyParkedError, after which the transaction must not be committed; UnavailableError. With `whole`
        also CorruptError, when an event cannot be applied.
        """
        for record, cause in batch.unreadable:
            self._park(record, cause)
        if whole:
            _, events = self._following(batch.records, batch.events)
            if events:
                await self._projection.fold(self._connection, self._tables, events)
        else:
            await self._fold(batch.records, batch.events)

    async def save(self) -> None:
        """Write the changed marks. May follow several calls of `fold`."""
        changed = [mark for key, mark in self.marks.items() if self._before.get(key) != mark]
        table = parked_packages
        for mark in changed:
            mine = (table.c.partition == mark.partition, table.c.package == mark.package)
            await self._connection.execute(delete(table).where(table.c.generation == self._generation, *mine))
        if changed:
            await self._connection.execute(insert(table), [_row(mark) for mark in changed])
        self._before = dict(self.marks)

    async def _fold(self, records: Sequence[Record], events: Sequence[Entry]) -> None:
        records, events = self._following(records, events)
        if not events:
            return
        cause = await self._try(events)
        if cause is None:
            return
        if len(events) == 1:
            self._park(records[0], cause)
            return
        middle = len(events) // 2
        await self._fold(records[:middle], events[:middle])
        await self._fold(records[middle:], events[middle:])

    async def _try(self, events: Sequence[Entry]) -> str | None:
        """Fold all of the events or none. Returns why they were refused, or None."""
        try:
            async with self._connection.begin_nested():
                with database_errors():
                    await self._projection.fold(self._connection, self._tables, events)
        except DamagedDatabaseError:
            raise
        except CorruptError as error:
            return error.detail
        return None

    def _following(
        self, records: Sequence[Record], events: Sequence[Entry]
    ) -> tuple[Sequence[Record], Sequence[Entry]]:
        """Leave out the events after their package's mark, and count them in the mark."""
        parked = {mark.package_id for mark in self.marks.values()}
        if not parked or not any(event.package_id in parked for event in events):
            return records, events
        left = [i for i, record in enumerate(records) if not self._waits(record, events[i].package_id)]
        return [records[i] for i in left], [events[i] for i in left]

    def _waits(self, record: Record, package_id: UUID) -> bool:
        """Whether the event lies after its package's mark. If so, the mark counts it."""
        key = (record.partition, str(package_id))
        mark = self.marks.get(key)
        if mark is None or record.offset < mark.offset:
            return False
        self.marks[key] = replace(mark, events=mark.events + 1)
        return True

    def _park(self, record: Record, cause: str) -> None:
        package, package_id = key_name(record.key)
        key = (record.partition, package)
        mark = self.marks.get(key)
        if mark is not None:
            mark = replace(mark, events=mark.events + 1)
            if record.offset < mark.offset:
                mark = replace(mark, offset=record.offset, cause=cause[:_CAUSE_CHARACTERS])
            self.marks[key] = mark
            return
        if len(self.marks) >= self._most:
            raise TooManyParkedError(
                f"the view {self._projection.name} has parked {len(self.marks)} packages and may not park more; the "
                f"next is {package} at offset {record.offset} of partition {record.partition}: {cause}. "
                "`artifact-store parked` lists them; mend the cause and retry them, or allow more with --max-parked"
            )
        self.marks[key] = Mark(
            projection=self._projection.name,
            generation=self._generation,
            partition=record.partition,
            package=package,
            package_id=package_id,
            offset=record.offset,
            events=1,
            cause=cause[:_CAUSE_CHARACTERS],
        )


def _row(mark: Mark) -> dict[str, object]:
    return {column.name: getattr(mark, column.name) for column in parked_packages.columns}


def _mark(row: Mapping[str, object]) -> Mark:
    return Mark(**row)  # type: ignore[arg-type]  # the columns are the fields


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
