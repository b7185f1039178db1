"""Checkpoints: how far a view has come, and whether the log still continues from there.

Two checks keep an outdated fold from writing. The offsets that it starts from must be those of the checkpoint: this is
the guard (`apply`), so of two folds of one batch only one is applied. And its generation must still exist, live or as
a build (`tables_of`), so a fold that began before a reset or a switch cannot write into the new tables.

Before anything is folded, the checkpoint is compared with the log. Another log has another identity
(`require_same_log`). A log that was restored from an older copy keeps its identity. But it ends before the checkpoint
or, if it was written to since, holds another record where the view folded its last one (`check_continues`). All of
these are refused, because the view would mix two histories. A view is never reset automatically for this.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from uuid import UUID

from blake3 import blake3
from sqlalchemy import MetaData, Row, Table, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, LogIdentityError, UnavailableError
from artifact_store.position import Position
from services.log.port import Log, Record
from services.views.bulk import on_postgresql
from services.views.database import TablesError, Views, check_layouts
from services.views.projections import Projection, Tables
from services.views.tables import projection_builds, projection_checkpoints, projection_generations

_FOLDS_SECONDS = 10
"""How long to wait for running folds; no new one begins meanwhile."""


class StaleCheckpointError(UnavailableError):
    """The view does not stand where the batch begins: another fold has moved it. Nothing was applied; read again."""

    problem = "stale-checkpoint"


@dataclass(frozen=True, slots=True)
class LastRecord:
    """The last record that was folded from a partition: its offset and the BLAKE3 of its bytes."""

    offset: int
    digest: bytes

    @classmethod
    def of(cls, record: Record) -> LastRecord:
        """The offset and digest of this record."""
        return cls(record.offset, blake3(record.value).digest())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The position of one generation of a view in the log, and the last record that it folded from each partition."""

    generation: UUID
    position: Position
    last: Mapping[int, LastRecord] = field(default_factory=dict)


async def load_checkpoint(views: Views, projection: Projection, log: UUID) -> Checkpoint:
    """The view's checkpoint in `log`. A view that has folded nothing yet is bound to that log from now on.

    Raises LogIdentityError (it was folded from another log), UnavailableError, TablesError (its tables are missing or
    have another layout).
    """
    generation, owner, offsets, last = await _read_live(views, projection)
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


async def _read_live(
    views: Views, projection: Projection
) -> tuple[UUID, UUID | None, dict[int, int], dict[int, LastRecord]]:
    """The live generation, the log that it was folded from, and its progress. Raises UnavailableError, TablesError."""
    async with views.reading(snapshot=True) as connection:
        await check_layouts(connection, [projection])
        live = await live_row(connection, projection)
        return live.generation, live.log, *await read_progress(connection, live.generation)


def require_same_log(projection: Projection, folded: UUID, now: UUID) -> None:
    """Raise LogIdentityError unless the present log, `now`, is the one that the projection was folded from."""
    if now != folded:
        raise LogIdentityError(
            f"{projection.name} was folded from log {folded}, but this is log {now}: the log was created again, or the "
            "URLs name a log and views that do not belong together. Bring that log back, or run "
            f"`artifact-store replay {projection.name}` to fold this one"
        )


async def check_follows(log: Log, views: Views, projection: Projection) -> None:
    """Return if a projector could continue the view from this log. Changes nothing.

    Raises as `load_checkpoint` and `check_continues`.
    """
    generation, owner, offsets, last = await _read_live(views, projection)
    if owner is not None:
        now = await log.identity()
        require_same_log(projection, owner, now)
        await check_continues(log, projection.name, Checkpoint(generation, Position(now, offsets), last), offsets)


async def read_position(connection: AsyncConnection, projection: Projection) -> Position | None:
    """The view's position; None before it has folded from any log."""
    live = await live_row(connection, projection)
    return None if live.log is None else Position(live.log, await read_offsets(connection, live.generation))


async def read_offsets(connection: AsyncConnection, generation: UUID) -> dict[int, int]:
    """The offset of the next record to fold by partition, for one generation."""
    offsets, _ = await read_progress(connection, generation)
    return offsets


async def read_progress(connection: AsyncConnection, generation: UUID) -> tuple[dict[int, int], dict[int, LastRecord]]:
    """The offset of the next record to fold and the last folded record, both by partition, for one generation."""
    table = projection_checkpoints.c
    query = select(table.partition, table.next_offset, table.last_offset, table.last_digest)
    offsets: dict[int, int] = {}
    last: dict[int, LastRecord] = {}
    for row in await connection.execute(query.where(table.generation == generation).order_by(table.partition)):
        offsets[row.partition] = row.next_offset
        if row.last_offset is not None:
            last[row.partition] = LastRecord(row.last_offset, row.last_digest)
    return offsets, last


async def hold_live(connection: AsyncConnection, projection: Projection) -> Row[Any]:
    """Wait for running folds into the live generation, and keep new ones from beginning until the transaction ends.

    Returns the row of the live generation. Folds into a build continue, and neither readers nor other projections wait.
    Raises LockedError through `Views.writing` if the folds take too long; TablesError if there is no live generation
    yet.
    """
    if on_postgresql(connection):
        await _bound_waiting(connection)
    return await live_row(connection, projection, lock=True)


async def hold_all_folds(connection: AsyncConnection, projection: Projection) -> Row[Any]:
    """As `hold_live`, but also for folds into a build."""
    if on_postgresql(connection):
        await _bound_waiting(connection)
        # Folds share the lock of the live row and may follow each other without a gap. Waiters for this lock queue up.
        await connection.execute(text(f"SELECT pg_advisory_xact_lock({_FOLDING})"), _folding(projection))
    return await live_row(connection, projection, lock=True)


async def _bound_waiting(connection: AsyncConnection) -> None:
    await connection.execute(text(f"SET LOCAL lock_timeout = '{_FOLDS_SECONDS}s'"))


async def live_row(connection: AsyncConnection, projection: Projection, *, lock: bool = False) -> Row[Any]:
    """The row of the live generation. With `lock`, nobody else can change it until the transaction ends.

    Raises TablesError if there is none yet.
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
    """The tables of the checkpoint's generation. It stays what it is, live or a build, until the transaction ends.

    Raises StaleCheckpointError if the generation no longer exists.
    """
    if on_postgresql(connection):
        await connection.execute(text(f"SELECT pg_advisory_xact_lock_shared({_FOLDING})"), _folding(projection))
    for table, tables in ((projection_generations, live_tables), (projection_builds, building_tables)):
        mine = (table.c.projection == projection.name, table.c.generation == since.generation)
        query = select(table.c.log).where(*mine, table.c.log == since.position.log).with_for_update(read=True)
        if (await connection.execute(query)).one_or_none() is not None:
            if table is projection_builds and on_postgresql(connection):
                # Nobody reads a build. If the server crashes, it may lose the last batches, each with its checkpoint.
                await connection.execute(text("SET LOCAL synchronous_commit TO off"))
            return tables(projection)
    raise StaleCheckpointError(f"the view {projection.name} was reset: this fold is of an older generation")


async def check_continues(
    log: Log, name: str, checkpoint: Checkpoint, partitions: Iterable[int], *, end: Position | None = None
) -> None:
    """Return if the log continues, in these partitions, what the view `name` has folded. Reads a record of each.

    `end` is the log's end, read after the checkpoint; if None, it is read here. Raises CorruptError, which names the
    replay that would accept the log as it is; UnavailableError.
    """
    wanted = sorted(set(partitions))
    offsets = {p: checkpoint.position.offsets[p] for p in wanted if p in checkpoint.position.offsets}
    position = Position(checkpoint.position.log, offsets)
    check_within(position, end or await log.end(position), name)
    last = {p: checkpoint.last[p] for p in wanted if p in checkpoint.last}
    if not last:
        return
    try:
        found = await _records_at(log, {p: record.offset for p, record in last.items()})
    except CorruptError as error:
        raise CorruptError(f"the view {name} cannot go on: {error.detail}. {_mend(name)}") from error
    for partition, record in last.items():
        if partition not in found or LastRecord.of(found[partition]) != record:
            raise CorruptError(
                f"the view {name} folded a record at offset {record.offset} of partition {partition} that the log "
                f"no longer holds: it was restored from an older copy and written to since. {_mend(name)}"
            )


def check_within(position: Position, end: Position, name: str) -> None:
    """Raise CorruptError if the position is beyond the log's end: the log has lost records that the view has folded."""
    for partition, offset in position.offsets.items():
        if offset > end.offsets.get(partition, 0):
            raise CorruptError(
                f"the view {name} stands at offset {offset} of partition {partition}, beyond the log's end at "
                f"{end.offsets.get(partition, 0)}: the log was truncated or restored from an older copy. {_mend(name)}"
            )


def folds_again(
    name: str, committed: Mapping[int, tuple[int, str]], stands: Position, partitions: Iterable[int]
) -> bool:
    """Whether an operator has reset the group of the view `name` to the log's start with the log's own tools.

    `committed` are the group's offsets with their metadata, read after `stands`, the view's position. Our commits have
    metadata; those of other tools have none. An offset that equals the view's, and a missing one (deleted or expired),
    do not count as a reset.

    Raises CorruptError: some offsets were set, but not those of all partitions to the start. The view cannot follow
    that: it cannot take one partition out of its totals, and it never skips an event.
    """
    set_by_others = {p: offset for p, (offset, metadata) in committed.items() if not metadata}
    foreign = {p: offset for p, offset in set_by_others.items() if offset != stands.offsets.get(p, 0)}
    if not foreign:
        return False

    def at_start(partition: int) -> bool:
        if partition in committed:
            return committed[partition] == (0, "")
        return not stands.offsets.get(partition)  # if the view has folded nothing, there may be no commit to reset

    if all(at_start(partition) for partition in partitions):
        return True
    partition, offset = min(foreign.items())
    raise CorruptError(
        f"the group of the view {name} was set to offset {offset} of partition {partition} with other tools, and the "
        f"view stands at {stands.offsets.get(partition, 0)}. Only a reset of all partitions to the earliest offset is "
        f"followed. To fold the view again, run `artifact-store replay {name}`; to go on from where it stands, delete "
        "the group's offsets"
    )


def _mend(name: str) -> str:
    return f"Bring the whole log back, or accept the loss and fold again with `artifact-store replay {name}`"


async def _records_at(log: Log, offsets: dict[int, int]) -> dict[int, Record]:
    """The records at these offsets, by partition, as far as they exist."""
    found: dict[int, Record] = {}
    batches = log.scan(offsets, {p: offset + 1 for p, offset in offsets.items()})
    async with aclosing(batches):
        async for batch in batches:
            found |= {record.partition: record for record in batch.records}
    return found


SUFFIX = "__building"


def live_tables(projection: Projection) -> Tables:
    """The tables of the live generation, by their names."""
    return {table.name: table for table in projection.tables}


def building_tables(projection: Projection) -> Tables:
    """The tables of the build, by their live names. The database may lack indexes and constraints that these show."""
    return _aside(tuple(projection.tables))


@lru_cache(maxsize=64)
def _aside(tables: tuple[Table, ...]) -> Tables:
    """Cached, because SQLAlchemy caches compiled statements by these objects."""
    aside = MetaData()
    return {table.name: table.to_metadata(aside, name=table.name + SUFFIX) for table in tables}
