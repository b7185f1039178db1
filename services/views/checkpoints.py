"""Checkpoints: how far a view has come, moved in one transaction with its rows, under a guard.

Two things fence a fold that is behind the times. The offsets that it starts from must be those of the checkpoint, so
that of two folds of one batch one alone is applied; and the generation must still be there, live or being built, so
that a fold that began before a reset or a switch cannot write into what has taken its place.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID, uuid4

from blake3 import blake3
from sqlalchemy import Row, delete, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.events import Event
from services.errors import CorruptError, LogIdentityError, UnavailableError
from services.log.port import Record
from services.log.position import Position
from services.views.attempts import Attempts
from services.views.building import building_tables, hold_off_vacuums, live_tables, lock_live_tables
from services.views.bulk import on_postgresql, upsert
from services.views.engine import Views, check_layouts
from services.views.failures import DamagedDatabaseError, LockedError, TablesError
from services.views.inheritance import inherit, inheritance_of
from services.views.parked import Parking, TooManyParkedError, forget_marks, read_marks
from services.views.projections import Projection, Tables
from services.views.reading import ReadBatch
from services.views.tables import metadata, projection_builds, projection_checkpoints, projection_generations

logger = logging.getLogger(__name__)

_FOLDS_SECONDS = 10
"""How long folds that are under way are waited for; no other begins meanwhile."""

_RESET_SECONDS = 600.0
"""How long a reset looks for a moment in which nobody reads and no fold takes long."""


class StaleCheckpointError(UnavailableError):
    """The view does not stand where the batch begins: another has moved it. Nothing was applied; read it again."""

    problem = "stale-checkpoint"


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last record that was folded from a partition: its offset and the BLAKE3 of its bytes."""

    offset: int
    digest: bytes

    @classmethod
    def of(cls, record: Record) -> LastRecord:
        """What is kept of this record."""
        return cls(record.offset, blake3(record.value).digest())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Where one generation of a view stands in the log, and which records it folded last, by partition."""

    generation: UUID
    position: Position
    last: Mapping[int, LastRecord] = field(default_factory=dict)


async def load_checkpoint(views: Views, projection: Projection, log: UUID) -> Checkpoint:
    """Where the view stands in `log`; a view that has folded nothing yet belongs to that log from now on.

    Raises LogIdentityError (it was folded from another log), UnavailableError, TablesError (its tables are missing or
    of another layout).
    """
    async with views.reading(snapshot=True) as connection:
        await check_layouts(connection, [projection])
        live = await live_row(connection, projection)
        offsets, last = await read_progress(connection, live.generation)
        generation, owner = live.generation, live.log
    if owner is None:
        async with views.writing() as connection:
            await connection.execute(
                update(projection_generations)
                .where(projection_generations.c.generation == generation, projection_generations.c.log.is_(None))
                .values(log=log)
            )
        return await load_checkpoint(views, projection, log)
    require_same_log(projection, owner, log)
    return Checkpoint(generation, Position(log, offsets), last)


def require_same_log(projection: Projection, folded: UUID, now: UUID) -> None:
    """Raise LogIdentityError unless the log that is there `now` is the one that the projection was folded from."""
    if now != folded:
        raise LogIdentityError(
            f"{projection.name} was folded from log {folded}, this is log {now}: it was made anew, or the URLs are "
            "those of a log and views that do not belong together; bring that log back, or "
            f"`artifact-store replay {projection.name}` to fold this one"
        )


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


async def reset(
    views: Views, projection: Projection, *, expected: UUID | None = None, patience_seconds: float = _RESET_SECONDS
) -> UUID:
    """Empty the projection's tables and begin a new generation at the log's start; returns its id.

    One transaction, in a moment in which nobody reads the tables: readers find them empty behind it, on PostgreSQL also
    those whose snapshot is older. Folds that are under way come to their end, later ones of the old generation fail at
    their guard. Tables of another layout are made anew.

    Raises:
        StaleCheckpointError: `expected` is not the live generation; nothing was changed.
        UnavailableError: there was no such moment for so long, or the database cannot be reached.
        ConfigurationError: tables of another layout cannot be dropped, for what others have put on them.
    """
    attempts = Attempts(patience_seconds)
    while True:
        try:
            async with views.writing() as connection:
                return await _reset(connection, projection, expected)
        except LockedError as error:
            logger.info("%s: not emptied yet: %s", projection.name, error.detail)
            if not await attempts.another():
                raise UnavailableError(
                    f"{projection.name} could not be emptied in {patience_seconds:.0f} s: {error.detail}"
                ) from error


async def _reset(connection: AsyncConnection, projection: Projection, expected: UUID | None) -> UUID:
    generation = uuid4()
    await hold_off_vacuums(connection, live_tables(projection))
    # The row is updated, never replaced: a fold that waits for its lock must find it again.
    before = await hold_all_folds(connection, projection)
    if expected not in (None, before.generation):
        raise StaleCheckpointError(f"the view {projection.name} was reset meanwhile")
    await lock_live_tables(connection, projection)
    fresh = {"generation": generation, "layout": projection.layout, "log": None}
    mine = projection_generations.c.projection == projection.name
    await connection.execute(update(projection_generations).where(mine).values(fresh))
    await forget_progress(connection, before.generation)
    if before.layout != projection.layout:
        inherited = [await inheritance_of(connection, table) for table in projection.tables]
        await connection.run_sync(metadata.drop_all, tables=projection.tables)
        await connection.run_sync(metadata.create_all, tables=projection.tables)
        for table, statements in zip(projection.tables, inherited, strict=True):
            await inherit(connection, table, statements)
    elif on_postgresql(connection):
        names = ", ".join(table.name for table in projection.tables)  # our own names, not anyone's input
        await connection.execute(text(f"TRUNCATE {names}"))
    else:
        for table in projection.tables:
            await connection.execute(delete(table))
    return generation


async def read_position(connection: AsyncConnection, projection: Projection) -> Position | None:
    """Where the view stands; None before it has folded from any log."""
    live = await live_row(connection, projection)
    return None if live.log is None else Position(live.log, await read_offsets(connection, live.generation))


async def read_offsets(connection: AsyncConnection, generation: UUID) -> dict[int, int]:
    """From partition to the offset of the next record, for one generation."""
    offsets, _ = await read_progress(connection, generation)
    return offsets


async def read_progress(connection: AsyncConnection, generation: UUID) -> tuple[dict[int, int], dict[int, LastRecord]]:
    """From partition to the offset of the next record, and to the record that was folded last, for one generation."""
    table = projection_checkpoints.c
    query = select(table.partition, table.next_offset, table.last_offset, table.last_digest)
    offsets: dict[int, int] = {}
    last: dict[int, LastRecord] = {}
    for row in await connection.execute(query.where(table.generation == generation).order_by(table.partition)):
        offsets[row.partition] = row.next_offset
        if row.last_offset is not None:
            last[row.partition] = LastRecord(row.last_offset, row.last_digest)
    return offsets, last


async def forget_progress(connection: AsyncConnection, generation: UUID) -> None:
    """Remove checkpoints and marks of a generation that is given up."""
    await connection.execute(delete(projection_checkpoints).where(projection_checkpoints.c.generation == generation))
    await forget_marks(connection, generation)


async def hold_live(connection: AsyncConnection, projection: Projection) -> Row[Any]:
    """Wait for folds into the live generation and let no other begin until the transaction ends; a build's go on.

    Returns the row of the live generation. Neither readers nor other projections wait. Raises LockedError through
    `Views.writing` when the folds take too long; TablesError when there is no live generation yet.
    """
    if on_postgresql(connection):
        await _bound_waiting(connection)
    return await live_row(connection, projection, lock=True)


async def hold_all_folds(connection: AsyncConnection, projection: Projection) -> Row[Any]:
    """As `hold_live`, for folds into a build too."""
    if on_postgresql(connection):
        await _bound_waiting(connection)
        # Folds hold the live row together and may follow each other without a gap; this lock has a queue.
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({_FOLDING})"), _folding(projection))
    return await live_row(connection, projection, lock=True)


async def _bound_waiting(connection: AsyncConnection) -> None:
    await connection.execute(text(f"SET LOCAL lock_timeout = '{_FOLDS_SECONDS}s'"))


async def live_row(connection: AsyncConnection, projection: Projection, *, lock: bool = False) -> Row[Any]:
    """The row of the live generation. With `lock` it stands still until the transaction ends.

    Raises TablesError when there is none yet.
    """
    query = select(projection_generations).where(projection_generations.c.projection == projection.name)
    row = (await connection.execute(query.with_for_update() if lock else query)).one_or_none()
    if row is None:
        raise TablesError(f"the views have no {projection.name}: `artifact-store migrate` creates it")
    return row


_FOLDING = "hashtextextended(:folding, 0)"


def _folding(projection: Projection) -> dict[str, str]:
    return {"folding": f"artifact-store folding {projection.name}"}


async def tables_of(connection: AsyncConnection, projection: Projection, since: Checkpoint) -> Tables:
    """The tables of the checkpoint's generation; it stays what it is, live or being built, until the transaction ends.

    Raises StaleCheckpointError when there is no such generation any more.
    """
    if on_postgresql(connection):
        await connection.execute(text(f"SELECT pg_advisory_xact_lock_shared({_FOLDING})"), _folding(projection))
    for table, tables in ((projection_generations, live_tables), (projection_builds, building_tables)):
        mine = (table.c.projection == projection.name, table.c.generation == since.generation)
        query = select(table.c.log).where(*mine, table.c.log == since.position.log).with_for_update(read=True)
        if (await connection.execute(query)).one_or_none() is not None:
            if table is projection_builds and on_postgresql(connection):
                # Nobody sees a build: a server that dies may lose its last batches, whole, with their checkpoint.
                await connection.execute(text("SET LOCAL synchronous_commit TO off"))
            return tables(projection)
    raise StaleCheckpointError(f"the view {projection.name} was reset: this fold is of an older generation")


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
