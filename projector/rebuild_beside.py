"""Rebuild: a new generation of a view beside the live one, from the log's start to the switch.

The order is: load bare tables, build the indexes, catch up, compare when asked, switch. Each step can be repeated and
looks at what is there, so that whoever comes after a crash goes on where it was.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from projector.loading import load, read_stretch
from projector.loading_process import load_in_processes
from projector.pace import Pace
from projector.progress import Meter
from services.config import Settings
from services.errors import CorruptError, InvalidRequestError, PushBackError, UnavailableError
from services.log.port import Log
from services.log.position import Position
from services.views.attempts import Attempts
from services.views.building import analyze, building_tables, create_index, index_statements, live_tables
from services.views.catch_up import catch_up
from services.views.checkpoints import Checkpoint, StaleCheckpointError, apply_within, require_same_log
from services.views.digest import ViewDigest, digest_tables, keep_tables
from services.views.engine import Views
from services.views.generations import (
    Build,
    Live,
    adopt_build,
    ahead,
    begin_build,
    building,
    gone,
    held,
    read_build,
    read_live,
    switch,
)
from services.views.guard import check_continues, check_within
from services.views.projections import Projection

logger = logging.getLogger(__name__)

_MANY_EVENTS = 20_000
"""Fewer are loaded in this process sooner than another has started."""

_NEAR_EVENTS = 1_000
"""So little may be left to fold while the live view is held."""

_INDEX_MEMORY_MIB = 256
_PATIENCE_SECONDS = 60.0
"""How long log or database may be away, as long as nothing is folded."""

_SWITCH_SECONDS = 600.0
"""How long a comparison looks for a moment in which both stand level, a switch for one in which nobody reads."""


class DigestMismatchError(CorruptError):
    """The live view and the one that was built from the log differ. Both are there: a person decides."""

    problem = "digest-mismatch"


@dataclass(frozen=True, slots=True)
class RebuildOptions:
    """What a rebuild is asked for; `processes` None is one a core, where several help."""

    verify: bool = False
    even_if_different: bool = False
    restart: bool = False
    processes: int | None = None
    max_rate: float | None = None


async def rebuild(
    views: Views, log: Log, projection: Projection, options: RebuildOptions, meter: Meter, settings: Settings | None
) -> bool | None:
    """Build and switch; return what a comparison has found: None when none was asked for.

    With `settings`, which must be those of `views` and `log`, other processes may load as well.

    Raises as `replay`.
    """
    end = await log.end()  # a log that cannot be reached must not cost anything
    await views.create_missing()
    async with building(views, projection):
        if options.verify:
            await _require_comparable(views, log, projection)
        build = await _build_to_go_on_with(views, log, projection, end, restart=options.restart)
        run = _Rebuild(views, log, projection, build, options, meter, settings)
        await run.load(end)
        try:
            await run.index()
        except CorruptError as error:
            # Too late to tell which package brought a row that no key allows; a fold that has the keys parks it.
            logger.warning("%s: %s; loading once more, with all indexes from the start", projection.name, error.detail)
            build = await begin_build(views, projection, end.log, bare=False)
            run = _Rebuild(views, log, projection, build, options, meter, settings)
            await run.load(end)
        matches = None
        if options.verify:
            matches = await run.compare()
        await run.switch()
    return matches


async def _build_to_go_on_with(
    views: Views, log: Log, projection: Projection, end: Position, *, restart: bool
) -> Build:
    async with views.reading(snapshot=True) as connection:
        found = await read_build(connection, projection)
    if found is not None and not restart and await _fits(found, log, projection, end):
        await adopt_build(views, found)
        logger.info("%s: going on with the build that %s left", projection.name, found.builder)
        return found
    if found is not None:
        logger.info("%s: the build that %s left is dropped", projection.name, found.builder)
    return await begin_build(views, projection, await log.identity())


async def _fits(build: Build, log: Log, projection: Projection, end: Position) -> bool:
    """Whether a build is one of this layout, of this log, and of nothing that the log has lost."""
    if build.layout != projection.layout or build.position.log != end.log:
        return False
    try:
        await check_continues(log, projection.name, build.checkpoint, build.position.offsets)
    except CorruptError:
        return False
    return True


async def _require_comparable(views: Views, log: Log, projection: Projection) -> None:
    async with views.reading(snapshot=True) as connection:
        live = await read_live(connection, projection)
    if live.layout != projection.layout:
        raise InvalidRequestError(
            f"the live {projection.name} has layout {live.layout}, what is built has {projection.layout}: their "
            "digests cannot be equal; replay without comparing"
        )
    end = await log.end(live.position)  # behind the view's position, which moves
    if live.position is None or live.position.log != end.log:
        raise InvalidRequestError(f"the live {projection.name} was not folded from this log: replay without comparing")
    check_within(live.position, end, projection.name)


async def _together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it at once. When a part fails, the others have ended too before its error is raised."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for part in work:
                tasks.create_task(part)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # what went wrong first ended the others


class _Rebuild:
    """One run of a build, from where it stands to the switch."""

    def __init__(
        self,
        views: Views,
        log: Log,
        projection: Projection,
        build: Build,
        options: RebuildOptions,
        meter: Meter,
        settings: Settings | None,
    ) -> None:
        self._views = views
        self._log = log
        self._projection = projection
        self._build = build
        self._options = options
        self._pace = Pace(options.max_rate)
        self._meter = meter
        self._settings = settings

    async def load(self, end: Position) -> None:
        """Fold up to `end` into tables that have next to no index yet."""
        self._meter.begin("load", self._build.position.offsets, end.offsets)
        await self._fold_to(end.offsets, self._processes(end))

    async def index(self) -> None:
        """Build the indexes, as many at a time as loaded before, and look through each table once it has them."""
        self._meter.begin("index")
        one_at_a_time = self._options.max_rate is not None or self._views.dialect == "sqlite"
        at_once = asyncio.Semaphore(1 if one_at_a_time else _cores())

        async def make(statement: str) -> None:
            async with at_once, self._views.writing() as connection:
                await create_index(connection, statement, memory_mib=_INDEX_MEMORY_MIB, workers=0)

        async def finish(table: Table) -> None:
            statements = index_statements(table, self._build.generation, self._views.engine.dialect)
            await _together(map(make, statements))
            async with at_once, self._views.writing() as connection:
                await analyze(connection, table)

        await _together(map(finish, self._projection.tables))

    async def compare(self) -> bool:
        """Digest both generations at one position; whether they are equal.

        Raises DigestMismatchError when they differ, unless the switch was asked for even then.
        """
        await self._catch_up()
        self._meter.begin("compare")
        live, built = await self._digests()
        if live.digest == built.digest:
            return True
        text = (
            f"the live view {self._projection.name} has digest {live.digest} over {live.rows:,} rows, the one that was "
            f"built from the log {built.digest} over {built.rows:,} rows, both at position {live.position}"
        )
        if self._options.even_if_different:
            logger.warning("%s; switching, as asked for", text)
            return False
        name = self._projection.name
        raise DigestMismatchError(
            f"{text}. Both are kept and nothing was switched: `artifact-store replay {name}` switches to the new one, "
            f"`artifact-store replay {name} --drop` removes it"
        )

    async def switch(self) -> None:
        """Make the build the live generation, as soon as it is nowhere behind and nobody reads the live tables."""
        attempts = Attempts(_SWITCH_SECONDS)
        while True:
            await self._catch_up()
            self._meter.begin("switch")
            try:
                await switch(self._views, self._projection, self._build.generation, self._end, self._fold_within)
                return
            except (UnavailableError, PushBackError) as error:
                # Includes that nobody knows whether the transaction was committed.
                if await self._is_live():
                    return
                if isinstance(error, StaleCheckpointError):
                    raise
                logger.info("%s: not switched yet: %s", self._projection.name, error.detail)
                if not await attempts.another():
                    raise UnavailableError(
                        f"{self._projection.name} could not be switched in {_SWITCH_SECONDS:.0f} s: {error.detail}; "
                        "what was built is kept, and the next replay goes on with it"
                    ) from error

    async def _catch_up(self) -> None:
        """Fold until next to nothing is left; more may arrive meanwhile."""
        while True:
            at, end = (await self._current()).position, await self._end()
            if sum(offset - at.offsets.get(p, 0) for p, offset in end.offsets.items()) <= _NEAR_EVENTS:
                return
            self._meter.begin("catch up", at.offsets, end.offsets)
            await self._fold_to(end.offsets, 1)

    async def _digests(self) -> tuple[ViewDigest, ViewDigest]:
        """The digests of the live generation and of the build, at one position."""
        deadline = time.monotonic() + _SWITCH_SECONDS
        while time.monotonic() < deadline:
            try:
                found = await self._digests_if_level()
            except UnavailableError as error:
                logger.info("%s: not compared yet: %s", self._projection.name, error.detail)
                found = None
            if found is not None:
                return found
            await asyncio.sleep(random.uniform(0, 0.1))
        raise UnavailableError(
            f"{self._projection.name} moved too fast to be compared for {_SWITCH_SECONDS:.0f} s; what was built is kept"
        )

    async def _digests_if_level(self) -> tuple[ViewDigest, ViewDigest] | None:
        """Both digests; None when the two were not found at one position, as may be where the live one moves on."""
        views, projection = self._views, self._projection
        build, live = await self._positions()
        if not (live.position or Position(build.position.log, {})).covers(build.position):
            await catch_up(views, self._log, projection, until=build.position)
        await self._fold_to(await self._live_offsets(), 1)
        async with AsyncExitStack() as reading:
            async with held(views, projection):
                await self._fold_to(await self._live_offsets(), 1)
                connection = await reading.enter_async_context(views.reading(snapshot=True, long=True))
                await keep_tables(connection, live_tables(projection))
                await keep_tables(connection, building_tables(projection))
                at = (await read_live(connection, projection)).position
                found = await read_build(connection, projection)
            if found is None:
                raise gone(self._build)
            if at is None or not (at.covers(found.position) and found.position.covers(at)):
                return None
            of_live = await digest_tables(connection, projection, live_tables(projection), at)
            return of_live, await digest_tables(connection, projection, building_tables(projection), at)

    async def _fold_to(self, ends: Mapping[int, int], processes: int) -> None:
        """Fold exactly up to these offsets, through failures that pass."""
        patient_until = time.monotonic() + _PATIENCE_SECONDS
        folded = self._meter.events
        while True:
            try:
                build = await self._current()
                left = {p: end for p, end in ends.items() if end > build.position.offsets.get(p, 0)}
                if not left:
                    return
                await self._load(build.checkpoint, left, processes)
            except StaleCheckpointError as error:
                logger.info("%s: %s; reading on from the build's checkpoint", self._projection.name, error.detail)
                await asyncio.sleep(random.uniform(0, 0.1))
            except (UnavailableError, PushBackError) as error:
                if self._meter.events > folded:
                    patient_until, folded = time.monotonic() + _PATIENCE_SECONDS, self._meter.events
                if time.monotonic() > patient_until:
                    raise
                logger.warning("%s: %s; trying again", self._projection.name, error.detail)
                await asyncio.sleep(random.uniform(0.5, 1.5))

    async def _load(self, since: Checkpoint, ends: Mapping[int, int], processes: int) -> None:
        told = self._meter.note
        if processes > 1 and self._settings is not None:
            await load_in_processes(
                self._settings,
                self._projection.name,
                since,
                ends,
                processes=processes,
                max_rate=self._options.max_rate,
                max_parked=self._views.max_parked,
                told=told,
            )
        else:
            await load(self._views, self._log, self._projection, since, ends, pace=self._pace, told=told)

    async def _fold_within(self, connection: AsyncConnection, at: Checkpoint, ends: Mapping[int, int]) -> None:
        """What the live view is ahead by, while it is held: little, or it is better done before."""
        missing = sum(end - at.position.offsets.get(p, 0) for p, end in ends.items())
        if missing > 2 * _NEAR_EVENTS:
            raise UnavailableError(f"the live view is {missing} offsets ahead")
        if missing:
            stretch = await read_stretch(self._log, at.position, ends)
            await apply_within(
                self._views,
                connection,
                self._projection,
                stretch.batch,
                since=at,
                next_offsets=stretch.next_offsets,
            )
            self._meter.note(len(stretch.batch.records), stretch.next_offsets)

    def _processes(self, end: Position) -> int:
        """How many processes to load in: several where they do not stand in each other's way."""
        missing = sum(offset - self._build.position.offsets.get(p, 0) for p, offset in end.offsets.items())
        if self._views.dialect == "sqlite" or self._settings is None or missing < _MANY_EVENTS:
            return 1
        if self._options.processes is not None:
            return self._options.processes
        return 1 if self._options.max_rate is not None else _cores()

    async def _current(self) -> Build:
        async with self._views.reading(snapshot=True) as connection:
            found = await read_build(connection, self._projection)
        if found is None or found.generation != self._build.generation:
            raise InvalidRequestError(f"the build of {self._projection.name} was dropped or begun anew by another")
        return found

    async def _positions(self) -> tuple[Build, Live]:
        async with self._views.reading(snapshot=True) as connection:
            live = await read_live(connection, self._projection)
        return await self._current(), live

    async def _live_offsets(self) -> Mapping[int, int]:
        """Where the live view is ahead of the build."""
        build, live = await self._positions()
        return ahead(live, build.position, await self._end())

    async def _is_live(self) -> bool:
        async with self._views.reading(snapshot=True) as connection:
            return (await read_live(connection, self._projection)).generation == self._build.generation

    async def _end(self) -> Position:
        """The log's end. Raises LogIdentityError when the log was made anew since the build began."""
        end = await self._log.end()
        require_same_log(self._projection, self._build.position.log, end.log)
        return end


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
