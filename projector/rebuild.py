"""Replay: folding a projection again from the log's start, beside the live view (a rebuild) or in place.

A rebuild makes a new generation: it loads tables that have almost no index, builds the indexes, catches up, compares
if asked to, and switches. Each step can be repeated and takes into account what exists, so after a crash the next
replay continues where the last one ended.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Mapping
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import ArtifactStoreError, CorruptError, InvalidRequestError, PushBackError, UnavailableError
from artifact_store.manifest import ContentAddress
from artifact_store.position import Position
from projector.loading import Pace, load, load_in_processes
from services.config import Settings
from services.log.port import Log
from services.views.database import Views
from services.views.digest import ViewDigest, digest_tables, digest_view, keep_tables
from services.views.engine.apply import apply_within, catch_up
from services.views.engine.build_tables import analyze, create_index, index_statements
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    building_tables,
    check_continues,
    check_within,
    live_tables,
    require_same_log,
)
from services.views.engine.generations import (
    Attempts,
    Build,
    Live,
    adopt_build,
    ahead,
    begin_build,
    building,
    drop_build,
    gone,
    held,
    read_build,
    read_live,
    reset,
    switch,
)
from services.views.engine.source import read_range
from services.views.projections import Projection, projection_named
from services.wiring import open_log, open_views

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """The result of a replay. `events` were folded by this replay; other processes may have folded more.

    `seconds` is the time until the view was complete. The digest is computed after that, so it and `position` may be
    those of a later state. `matches` is the result of the comparison with the previous view; None without one.
    """

    projection: str
    events: int
    rows: int
    digest: ContentAddress
    position: Position
    seconds: float
    matches: bool | None = None


async def replay(
    settings: Settings,
    projection: str,
    *,
    in_place: bool = False,
    options: RebuildOptions | None = None,
    max_parked: int | None = None,
    progress: Progress | None = None,
) -> ReplayResult:
    """Fold the projection again from the log's start. Returns when the view covers the log's end as of the call.

    By default, a new generation is built beside the live view, which is read and kept current meanwhile. When the new
    one has caught up in every partition, it replaces the live view. A crash costs nothing: the next call continues.
    `in_place` empties the view first: until it is folded again, it shows less than the log has. `max_parked` is how
    many packages it may park.

    Both ways work beside running projectors: the view refuses their outdated batches, and they continue from its new
    checkpoint.

    Raises:
        InvalidRequestError: there is no such projection (the text lists the known ones), or nothing to compare with.
        PushBackError: another process builds this projection; the text says which.
        DigestMismatchError: the live view differs from the one built from the log; nothing was switched, both are kept.
        CorruptError: too many packages would be parked; with `in_place` the view holds the events before that.
        UnavailableError: the log or the database cannot be reached; call again.
        ConfigurationError: the settings cannot work.
    """
    known = projection_named(projection)
    log, views = open_log(settings), open_views(settings)
    if max_parked is not None:
        views.max_parked = max_parked
    try:
        return await replay_view(
            views, log, known, in_place=in_place, options=options, progress=progress, settings=settings
        )
    finally:
        await views.close()
        await log.close()


async def replay_view(
    views: Views,
    log: Log,
    projection: Projection,
    *,
    in_place: bool = False,
    options: RebuildOptions | None = None,
    progress: Progress | None = None,
    settings: Settings | None = None,
) -> ReplayResult:
    """As `replay`, on open parts. Without `settings`, only this process loads."""
    began = time.monotonic()
    meter = Meter(progress)
    matches = None
    logger.info("%s: a replay begins, %s", projection.name, "in place" if in_place else "beside the view")
    try:
        await _take_group_over(log, projection)
        if in_place:
            await _fold_in_place(views, log, projection, meter)
        else:
            matches = await rebuild(views, log, projection, options or RebuildOptions(), meter, settings)
    except Exception as error:
        why = error.detail if isinstance(error, ArtifactStoreError) else type(error).__name__
        took = time.monotonic() - began
        logger.info("%s: the replay ended after %.1f s and %d events: %s", projection.name, took, meter.events, why)
        raise
    seconds = time.monotonic() - began
    meter.begin("digest")
    digest = await digest_view(views, projection)
    logger.info("%s: folded again in %.1f s, %d rows, %s", projection.name, seconds, digest.rows, digest.digest)
    position = digest.position or await log.end()
    return ReplayResult(projection.name, meter.events, digest.rows, digest.digest, position, seconds, matches)


async def abandon(settings: Settings, projection: str) -> bool:
    """Remove the build of an unfinished replay. Returns whether there was one. The live view is not touched.

    Raises InvalidRequestError: there is no such projection. PushBackError: another process builds it. UnavailableError.
    """
    known = projection_named(projection)
    views = open_views(settings)
    try:
        async with building(views, known):
            return await drop_build(views, known)
    finally:
        await views.close()


async def _take_group_over(log: Log, projection: Projection) -> None:
    """Commit the offsets that other tools have set for the group as ours: otherwise projectors would stop at them."""
    name = projection.name
    foreign = {p: offset for p, (offset, metadata) in (await log.committed(name)).items() if not metadata}
    if foreign and await log.show(name, foreign, "replay"):
        logger.info("%s: the offsets that other tools have set for the group no longer matter", name)


async def _fold_in_place(views: Views, log: Log, projection: Projection, meter: Meter) -> None:
    end = await log.end()  # a log that cannot be reached must not cost the view its rows
    await views.create_missing()
    generation = await reset(views, projection)
    logger.info("%s: generation %s begins at the log's start", projection.name, generation)
    meter.begin("load", {}, end.offsets)

    def note(folded: int, position: Position) -> None:
        meter.note(folded - meter.events, position.offsets)

    await catch_up(views, log, projection, until=end, progress=note)


_MANY_EVENTS = 20_000
"""Fewer events are loaded here in less time than other processes take to start."""

_NEAR_EVENTS = 1_000
"""A build this close to the log's end has caught up: so few events may be left to fold while the live view is held."""

_INDEX_MEMORY_MIB = 256
_PATIENCE_SECONDS = 60.0
"""How long log or database may be down while nothing is folded."""

_SWITCH_SECONDS = 600.0
"""How long a comparison waits until both generations are at one position, and a switch until nobody reads."""


class DigestMismatchError(CorruptError):
    """The live view and the one that was built from the log differ. Both are kept, and a person decides."""

    problem = "digest-mismatch"


@dataclass(frozen=True, slots=True)
class RebuildOptions:
    """The options of a rebuild. Without `processes`, it loads in one process per core, if several help."""

    verify: bool = False
    even_if_different: bool = False
    restart: bool = False
    processes: int | None = None
    max_rate: float | None = None


async def rebuild(
    views: Views, log: Log, projection: Projection, options: RebuildOptions, meter: Meter, settings: Settings | None
) -> bool | None:
    """Build and switch. Returns whether the comparison found both views equal; None without a comparison.

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
            # A row violates a key. Its package cannot be found any more, but a fold into tables with keys parks it.
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
        logger.info("%s: continuing the build that %s left", projection.name, found.builder)
        return found
    if found is not None:
        logger.info("%s: the build that %s left is dropped", projection.name, found.builder)
    return await begin_build(views, projection, await log.identity())


async def _fits(build: Build, log: Log, projection: Projection, end: Position) -> bool:
    """Whether a build has this layout, was folded from this log, and has no events that the log has lost."""
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
            f"the live {projection.name} has layout {live.layout}, a build has {projection.layout}: their digests "
            "cannot be equal; replay without comparing"
        )
    end = await log.end(live.position)  # after the view's position was read, which moves
    if live.position is None or live.position.log != end.log:
        raise InvalidRequestError(f"the live {projection.name} was not folded from this log: replay without comparing")
    check_within(live.position, end, projection.name)


async def _together(work: Iterable[Coroutine[Any, Any, None]]) -> None:
    """Do all of it concurrently. If one part fails, its error is raised when the others have ended too."""
    try:
        async with asyncio.TaskGroup() as tasks:
            for part in work:
                tasks.create_task(part)
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None  # the first failure cancelled the others


class _Rebuild:
    """One attempt to finish a build, from its present position to the switch."""

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
        """Fold up to `end` into tables that have almost no index yet."""
        self._meter.begin("load", self._build.position.offsets, end.offsets)
        await self._fold_to(end.offsets, self._processes(end))

    async def index(self) -> None:
        """Build the indexes, several at a time unless the rate is limited, and analyze each table after its indexes."""
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
        """Digest both generations at one position. Returns whether they are equal.

        Raises DigestMismatchError if they differ, unless the options ask for the switch even then.
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
        """Make the build the live generation when it has caught up and nobody reads the live tables."""
        attempts = Attempts(_SWITCH_SECONDS)
        while True:
            await self._catch_up()
            self._meter.begin("switch")
            try:
                await switch(self._views, self._projection, self._build.generation, self._end, self._fold_within)
                return
            except (UnavailableError, PushBackError) as error:
                # The transaction may have been committed nevertheless.
                if await self._is_live():
                    return
                if isinstance(error, StaleCheckpointError):
                    raise
                logger.info("%s: not switched yet: %s", self._projection.name, error.detail)
                if not await attempts.another():
                    raise UnavailableError(
                        f"{self._projection.name} could not be switched in {_SWITCH_SECONDS:.0f} s: {error.detail}; "
                        "the build is kept, and the next replay continues it"
                    ) from error

    async def _catch_up(self) -> None:
        """Fold until at most _NEAR_EVENTS are left; more may arrive meanwhile."""
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
            f"{self._projection.name} moved too fast to be compared for {_SWITCH_SECONDS:.0f} s; the build is kept"
        )

    async def _digests_if_level(self) -> tuple[ViewDigest, ViewDigest] | None:
        """Both digests; None if the two generations were not at one position, because the live one has moved on."""
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
        """Fold exactly up to these offsets; temporary failures are tried again."""
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
        """Fold what the live view is ahead by, while it is held. Raises UnavailableError if that is too much."""
        missing = sum(end - at.position.offsets.get(p, 0) for p, end in ends.items())
        if missing > 2 * _NEAR_EVENTS:
            raise UnavailableError(f"the live view is {missing} offsets ahead")
        if not missing:
            return
        async with aclosing(read_range(self._log, at, ends)) as batches:
            async for batch in batches:
                await apply_within(connection, self._projection, batch, max_parked=self._views.max_parked)
                self._meter.note(len(batch), batch.ends)

    def _processes(self, end: Position) -> int:
        """How many processes to load in: several only if that helps."""
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
            raise InvalidRequestError(
                f"the build of {self._projection.name} was dropped or begun again by another process"
            )
        return found

    async def _positions(self) -> tuple[Build, Live]:
        async with self._views.reading(snapshot=True) as connection:
            live = await read_live(connection, self._projection)
        return await self._current(), live

    async def _live_offsets(self) -> Mapping[int, int]:
        """The live view's offsets in the partitions where it is ahead of the build."""
        build, live = await self._positions()
        return ahead(live, build.position, await self._end())

    async def _is_live(self) -> bool:
        async with self._views.reading(snapshot=True) as connection:
            return (await read_live(connection, self._projection)).generation == self._build.generation

    async def _end(self) -> Position:
        """The log's end. Raises LogIdentityError if the log was created again since the build began."""
        end = await self._log.end()
        require_same_log(self._projection, self._build.position.log, end.log)
        return end


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """`events` were folded by this replay so far; `done` and `total` count offsets in the phase, or are 0.

    `rate` is the recent rate in events per second. `outrun`: at least as much arrived while the last range was folded
    as it contained, so at this rate the replay never ends.
    """

    phase: str
    events: int
    done: int = 0
    total: int = 0
    rate: float = 0.0
    seconds_left: float | None = None
    outrun: bool = False


Progress = Callable[[ReplayProgress], None]


class Meter:
    """Counts folded events and offsets, and reports the progress."""

    def __init__(self, tell: Progress | None) -> None:
        self.events = 0
        self._tell = tell
        self._phase = ""
        self._reached: dict[int, int] = {}
        self._start = 0
        self._total = 0
        self._outrun = False
        self._seen: deque[tuple[float, int, int]] = deque()

    def begin(self, phase: str, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None) -> None:
        """Begin a phase, or the next range of the same phase. `starts` and `ends` are the range's offsets, if any."""
        before = self._total if phase == self._phase else 0
        self._phase = phase
        self._reached = {p: (starts or {}).get(p, 0) for p in ends or {}}
        self._start = sum(self._reached.values())
        self._total = sum(max(end, self._reached[p]) for p, end in (ends or {}).items()) - self._start
        self._outrun = 0 < before <= self._total
        self._seen.clear()
        self.note(0, {})

    def note(self, events: int, next_offsets: Mapping[int, int]) -> None:
        """Note that this many more events were folded, and that these offsets were reached."""
        self.events += events
        self._reached.update(next_offsets)
        done = sum(self._reached.values()) - self._start
        now = time.monotonic()
        self._seen.append((now, self.events, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()
        if self._tell is None:
            return
        then, events_then, done_then = self._seen[0]
        passed = max(now - then, 1e-9)
        speed = (done - done_then) / passed
        left = (self._total - done) / speed if speed > 0 else None
        rate = (self.events - events_then) / passed if len(self._seen) > 1 else 0.0
        self._tell(ReplayProgress(self._phase, self.events, done, self._total, rate, left, self._outrun))
