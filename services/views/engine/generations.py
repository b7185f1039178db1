"""Generations: a view is emptied (`reset`), or a new one is built beside the live one and replaces it (`switch`).

A build has a row in `projection_builds`; `apply` writes its rows and checkpoint as it does for the live generation.
The live generation's row is updated and never replaced: a transaction that waited for its lock sees the change.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from uuid import UUID, uuid4

from sqlalchemy import delete, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import PushBackError, UnavailableError
from artifact_store.position import Position
from services.runtime.file_system import FileLock
from services.views.bulk import on_postgresql
from services.views.database import (
    LockedError,
    Views,
    database_errors,
)
from services.views.engine.build_tables import (
    create_tables,
    drop_tables,
    hold_off_vacuums,
    index_statements,
    inherit,
    inheritance_of,
    lock_live_tables,
    replace_live_tables,
)
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    building_tables,
    hold_all_folds,
    hold_live,
    live_row,
    live_tables,
    read_offsets,
    read_progress,
)
from services.views.projections import Projection
from services.views.tables import (
    metadata,
    parked_packages,
    projection_builds,
    projection_checkpoints,
    projection_generations,
)

logger = logging.getLogger(__name__)

_GONE_SECONDS = 3.0
"""How long a server may take to notice that a builder was killed."""


@dataclass(frozen=True, slots=True)
class Build:
    """A generation that is not live yet, with its checkpoint; `builder` names the process that began or resumed it."""

    projection: str
    generation: UUID
    layout: int
    builder: str
    checkpoint: Checkpoint

    @property
    def position(self) -> Position:
        """Its position in the log that it is folded from."""
        return self.checkpoint.position


@dataclass(frozen=True, slots=True)
class Live:
    """The live generation; `position` is None before it has folded from any log."""

    generation: UUID
    layout: int
    position: Position | None


async def read_build(connection: AsyncConnection, projection: Projection) -> Build | None:
    """The projection's build, if there is one."""
    query = select(projection_builds).where(projection_builds.c.projection == projection.name)
    row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    offsets, last = await read_progress(connection, row.generation)
    checkpoint = Checkpoint(row.generation, Position(row.log, offsets), last)
    return Build(row.projection, row.generation, row.layout, row.builder, checkpoint)


async def read_live(connection: AsyncConnection, projection: Projection) -> Live:
    """The projection's live generation."""
    row = await live_row(connection, projection)
    position = None if row.log is None else Position(row.log, await read_offsets(connection, row.generation))
    return Live(row.generation, row.layout, position)


@asynccontextmanager
async def building(
    views: Views, projection: Projection, *, patience_seconds: float = _GONE_SECONDS
) -> AsyncIterator[None]:
    """Hold the lock for building this projection, among all processes.

    Raises PushBackError, which names the holder, if another still holds it after `patience_seconds`. The lock only
    avoids double work: two builders at once would do no harm, because of the checkpoint's guard.
    """
    if views.dialect == "sqlite":
        path = Path(str(views.engine.url.database))
        lock = FileLock(path.with_name(f"{path.name}.{projection.name}.building.lock"))
        with database_errors():
            taken = await asyncio.to_thread(lock.take, patience_seconds)
        if not taken:
            raise await _busy(views, projection)
        try:
            yield
        finally:
            lock.release()
        return
    async with AsyncExitStack() as stack:
        with database_errors():  # only around the lock: errors inside the block have other causes
            connection = await stack.enter_async_context(views.engine.connect())
            # A lock of the session, not of a transaction.
            await connection.execution_options(isolation_level="AUTOCOMMIT")
            key = {"name": f"artifact-store building {projection.name}"}
            locked = text("SELECT pg_try_advisory_lock(hashtextextended(:name, 0))")
            deadline = time.monotonic() + patience_seconds
            while not (await connection.execute(locked, key)).scalar_one():
                if time.monotonic() > deadline:
                    raise await _busy(views, projection)
                await asyncio.sleep(0.1)
        try:
            yield
        finally:
            # Closing the connection would unlock too, but it goes back to a pool.
            try:
                with database_errors():
                    await connection.execute(text("SELECT pg_advisory_unlock(hashtextextended(:name, 0))"), key)
            except UnavailableError as error:  # the lock ended with its connection; the work done meanwhile counts
                logger.info("%s: the lock of its builder was lost: %s", projection.name, error.detail)


async def is_being_built(views: Views, projection: Projection) -> bool:
    """Whether a process is building this projection now. If not, a build was left by a replay that ended early.

    Raises UnavailableError.
    """
    try:
        async with building(views, projection, patience_seconds=0.0):
            return False
    except PushBackError:
        return True


async def begin_build(views: Views, projection: Projection, log: UUID, *, bare: bool = True) -> Build:
    """Create the empty tables of a new generation. They replace those of an earlier build.

    A `bare` build gets its indexes last. With all indexes from the start, a row that violates a key fails while it is
    folded, when its package is still known.
    """
    generation = uuid4()
    row = {"projection": projection.name, "generation": generation, "layout": projection.layout, "log": log}
    async with views.writing() as connection:
        await _forget(connection, projection)
        await create_tables(connection, projection, generation)
        if not bare:
            for statement in chain.from_iterable(
                index_statements(table, generation, views.engine.dialect) for table in projection.tables
            ):
                await connection.execute(text(statement))
        await connection.execute(insert(projection_builds).values(**row, builder=this_process()))
    start = Checkpoint(generation, Position(log, {}))
    return Build(projection.name, generation, projection.layout, this_process(), start)


async def adopt_build(views: Views, build: Build) -> None:
    """Record that this process continues the build. Raises StaleCheckpointError if the build is gone."""
    async with views.writing() as connection:
        mine = projection_builds.c.generation == build.generation
        if (
            await connection.execute(update(projection_builds).where(mine).values(builder=this_process()))
        ).rowcount == 0:
            raise gone(build)


async def drop_build(views: Views, projection: Projection) -> bool:
    """Remove the projection's build; waits for running folds into it. Returns whether there was one."""
    async with views.writing() as connection:
        return await _forget(connection, projection)


@asynccontextmanager
async def held(views: Views, projection: Projection) -> AsyncIterator[None]:
    """Keep folds from moving the live view within the block. Does nothing on SQLite, which has only one writer."""
    if views.dialect == "sqlite":
        yield
        return
    async with views.writing() as connection:
        await hold_live(connection, projection)
        yield


FoldTo = Callable[[AsyncConnection, Checkpoint, Mapping[int, int]], Awaitable[None]]
"""Folds a generation from its checkpoint exactly to these offsets, within the connection's transaction."""


LogEnd = Callable[[], Awaitable[Position]]
"""Reads the log's end."""


async def switch(views: Views, projection: Projection, generation: UUID, log_end: LogEnd, fold_to: FoldTo) -> None:
    """Make the build the live generation and drop the previous one, in one transaction.

    Holds off all folds of the projection, lets `fold_to` fold what the live view is ahead by, and replaces the tables
    when nobody reads them. `log_end` is called when the live view can no longer move, so that all it has folded lies
    before that end. If the live view is beyond that end, the build follows only up to the end; if it is of another
    log, not at all.

    Raises:
        UnavailableError: folds or readers took too long, or the live view is still ahead of the build; nothing was
            changed, and nobody waited long. Try again.
        StaleCheckpointError: the build no longer exists.
        ConfigurationError: the live tables cannot be dropped, because others have attached something to them.
    """
    async with views.writing() as connection:
        of_build = [table.name for table in building_tables(projection).values()]
        await hold_off_vacuums(connection, [*live_tables(projection), *of_build])
        await hold_all_folds(connection, projection)
        live = await read_live(connection, projection)
        mine = projection_builds.c.generation == generation
        row = (await connection.execute(select(projection_builds).where(mine).with_for_update())).one_or_none()
        if row is None:
            raise StaleCheckpointError(f"the build of {projection.name} that was to become the live one is gone")
        at = Checkpoint(generation, Position(row.log, await read_offsets(connection, generation)))
        end = await log_end()
        await fold_to(connection, at, ahead(live, at.position, end))
        reached = Position(row.log, await read_offsets(connection, generation))
        if missing := ahead(live, reached, end):
            raise UnavailableError(f"the live {projection.name} is ahead of the build, at {missing}")
        if views.dialect == "postgresql":  # readers rely on the build from now on: this commit makes it durable
            await connection.execute(text("SET LOCAL synchronous_commit TO DEFAULT"))
        await lock_live_tables(connection, projection)
        await replace_live_tables(connection, projection, generation)
        await connection.execute(delete(projection_builds).where(mine))
        fresh = {"generation": generation, "layout": row.layout, "log": row.log}
        known = projection_generations.c.projection == projection.name
        await connection.execute(update(projection_generations).where(known).values(fresh))
        await forget_progress(connection, live.generation)


def ahead(live: Live, position: Position, end: Position) -> dict[int, int]:
    """Where the live view is ahead of a build's position: offsets, by partition."""
    if live.position is None or live.position.log != position.log or end.log != position.log:
        return {}
    stands = {p: min(offset, end.offsets.get(p, 0)) for p, offset in live.position.offsets.items()}
    return {p: offset for p, offset in stands.items() if offset > position.offsets.get(p, 0)}


def this_process() -> str:
    """The name of this process as a builder, for people."""
    return f"process {os.getpid()} on {socket.gethostname()}"


def gone(build: Build) -> StaleCheckpointError:
    """The error for a build that somebody dropped."""
    return StaleCheckpointError(f"the build of {build.projection} was dropped meanwhile: begin again")


async def _busy(views: Views, projection: Projection) -> PushBackError:
    async with views.reading() as connection:
        build = await read_build(connection, projection)
    who = "another process" if build is None else build.builder
    return PushBackError(f"{who} is building {projection.name} already; wait for it, or end it")


async def _forget(connection: AsyncConnection, projection: Projection) -> bool:
    mine = projection_builds.c.projection == projection.name
    known = (await connection.execute(select(projection_builds).where(mine).with_for_update())).one_or_none()
    await drop_tables(connection, projection)
    if known is not None:
        await forget_progress(connection, known.generation)
        await connection.execute(delete(projection_builds).where(mine))
    return known is not None


_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


class Attempts:
    """The time limit for repeated attempts, and the pauses between them."""

    def __init__(self, seconds: float) -> None:
        """The `seconds` begin now."""
        self._until = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE

    async def another(self) -> bool:
        """Pause, longer each time, and return True. Returns False at once if the time is over."""
        if time.monotonic() > self._until:
            return False
        await asyncio.sleep(random.uniform(0, self._pause))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True


_RESET_SECONDS = 600.0
"""How long a reset waits for a moment in which nobody reads the tables and no fold takes long."""


async def reset(
    views: Views, projection: Projection, *, expected: UUID | None = None, patience_seconds: float = _RESET_SECONDS
) -> UUID:
    """Empty the projection's tables and begin a new generation at the log's start; returns its id.

    Runs in one transaction, at a moment when nobody reads the tables. Afterwards readers find them empty, on PostgreSQL
    even readers with an older snapshot. Running folds end first; later folds of the old generation are refused as
    stale. Tables of another layout are created again.

    Raises:
        StaleCheckpointError: `expected` is not the live generation; nothing was changed.
        UnavailableError: there was no such moment within `patience_seconds`, or the database cannot be reached.
        ConfigurationError: tables of another layout cannot be dropped, because others have attached something to them.
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


async def forget_progress(connection: AsyncConnection, generation: UUID) -> None:
    """Remove the checkpoints and marks of a generation that is no longer used."""
    for table in (projection_checkpoints, parked_packages):
        await connection.execute(delete(table).where(table.c.generation == generation))
