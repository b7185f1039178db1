"""Running a projection: read, fold, show the progress; again and again, until told to stop.

Each batch takes effect exactly once, however often it is read: rows and checkpoint are one transaction, whose guard
refuses a batch that comes again. While one batch is written, the next one is read and decoded.

A failure that may pass ends the membership in the group, and after a pause another begins. Meanwhile others can take
the partitions over, and the view's checkpoint says where to go on. A failure that does not pass is raised: log and
view do not belong together, or one of them is damaged. Three kinds are tried again where people see them, and nothing
is skipped: settings that worked before, tables that are missing or have another layout, and a mistake in a fold.

`run_processes` runs several projectors. Each is a member of the groups, so that the partitions are spread over them.
One that dies is started again. One that reports that it cannot go on is not: its partitions go to the others.

`Assignment` is one membership in the group. The view's own checkpoint says where reading begins; what is committed to
the log's group is only for people to see. They may reset it to the log's start as a whole: then the view is folded
again. Any other change of theirs stops the projector.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from uuid import UUID

from artifact_store.errors import ArtifactStoreError, CorruptError, PushBackError, UnavailableError
from artifact_store.position import Position
from projector.projection_metrics import ProjectorMetrics, served
from services.config import Settings
from services.log.port import Batch, Log, Record, Subscription
from services.log.records import Skips
from services.runtime.addresses import ListenAddress
from services.runtime.processes import PYTHON, Command, RestartRule
from services.runtime.processes import run_processes as run_all
from services.views.database import TablesError, Views
from services.views.engine.apply import fold
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    check_continues,
    folds_again,
    live_row,
    load_checkpoint,
    require_same_log,
)
from services.views.engine.generations import reset
from services.views.engine.source import DecodedBatch, decode
from services.views.projections import PROJECTIONS, Projection, projection_named
from services.wiring import open_log, open_views

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0


async def run_projectors(
    settings: Settings,
    names: Iterable[str],
    stop: asyncio.Event,
    *,
    max_parked: int | None = None,
    metrics_at: ListenAddress | None = None,
) -> dict[str, ArtifactStoreError]:
    """Run several projections (no names: all) until `stop` is set; blocks until they have left their groups.

    `max_parked` is how many packages each may park; Prometheus finds at `metrics_at` what they do. Returns those that
    could not go on, with the reason; each is logged when it happens, and the others go on.

    Raises InvalidRequestError: there is no projection of that name. ConfigurationError: settings that cannot work,
    or an address that cannot be had.
    """
    projections = [projection_named(name) for name in dict.fromkeys(names)] or list(PROJECTIONS.values())
    log, views = open_log(settings), open_views(settings)
    if max_parked is not None:
        views.max_parked = max_parked
    try:
        metrics = ProjectorMetrics(views, log, [projection.name for projection in projections])
        runs = [_reported(views, log, projection, stop, metrics) for projection in projections]
        async with served(metrics, metrics_at):
            outcomes = zip(projections, await asyncio.gather(*runs), strict=True)
        return {projection.name: error for projection, error in outcomes if error is not None}
    finally:
        await views.close()
        await log.close()


async def run_projection(
    views: Views, log: Log, projection: Projection, stop: asyncio.Event, metrics: ProjectorMetrics | None = None
) -> None:
    """Project until `stop` is set, through failures of log and database; blocks until the group is left.

    What is refused, or goes wrong unforeseen, is shown in the log and the metrics and tried again every 10 s.

    Raises:
        CorruptError: the log does not go on from what the view has folded, or too many packages would be parked.
        LogIdentityError: the view was folded from another log.
        ConfigurationError: the settings are refused before it has joined the group once.
    """
    pause = _FIRST_PAUSE
    joined = False
    while not stop.is_set():
        run = _Run(views, log, projection, metrics)
        try:
            await run.work(stop)
        except StaleCheckpointError as error:
            logger.info("%s: %s; reading on from the view's checkpoint", projection.name, error.detail)
            await _wait(stop, random.uniform(0, _FIRST_PAUSE))
        except (UnavailableError, PushBackError) as error:
            if metrics is not None and isinstance(error, UnavailableError):
                metrics.stopped(projection.name)
            pause = _FIRST_PAUSE if run.progressed else min(2 * pause, _LONGEST_PAUSE)
            logger.warning("%s: %s; trying again in %.1f s", projection.name, error.detail, pause)
            await _wait(stop, pause)
        except ArtifactStoreError as error:
            may_pass = joined or run.joined or isinstance(error, TablesError)
            if isinstance(error, CorruptError) or not may_pass:
                raise
            logger.error("%s: %s; trying again in %.1f s", projection.name, error.detail, _LONGEST_PAUSE)
            await _in_trouble(projection, stop, metrics)
        except Exception:  # a mistake in one fold must not stop the others, nor this one when it passes
            logger.exception("%s: a mistake in this program; trying again in %.1f s", projection.name, _LONGEST_PAUSE)
            await _in_trouble(projection, stop, metrics)
        joined = joined or run.joined


async def _in_trouble(projection: Projection, stop: asyncio.Event, metrics: ProjectorMetrics | None) -> None:
    if metrics is not None:
        metrics.stopped(projection.name)
    await _wait(stop, _LONGEST_PAUSE)


async def _reported(
    views: Views, log: Log, projection: Projection, stop: asyncio.Event, metrics: ProjectorMetrics
) -> ArtifactStoreError | None:
    try:
        await run_projection(views, log, projection, stop, metrics)
    except ArtifactStoreError as error:
        metrics.stopped(projection.name)
        logger.error("%s stops: %s", projection.name, error.detail)
        return error
    return None


class _Run:
    """One membership in the group."""

    def __init__(self, views: Views, log: Log, projection: Projection, metrics: ProjectorMetrics | None) -> None:
        self.joined = False
        self.progressed = False
        self._views = views
        self._log = log
        self._projection = projection
        self._metrics = metrics
        self._assignment = Assignment(views, log, projection, self._settled)
        self._applying: asyncio.Task[Mapping[int, int]] | None = None

    async def work(self, stop: asyncio.Event) -> None:
        """Read and fold until told to stop; what was read by then is folded."""
        try:
            await self._assignment.join()
            self.joined = True
            while not stop.is_set():
                found = await self._assignment.next_batch(_POLL_SECONDS)
                await self._finish()
                if found is not None:
                    self._applying = asyncio.create_task(self._apply(*found))
                elif self._metrics is not None and self._assignment.idle:
                    self._metrics.goes_on(self._projection.name)  # nothing is left to fold: no trouble either
            await self._finish()
        finally:
            await self._abandon()
            await self._assignment.leave()

    async def _apply(self, batch: DecodedBatch, since: Checkpoint) -> Mapping[int, int]:
        await fold(self._views, self._log, self._projection, batch, since=since)
        self.progressed = True
        if self._metrics is not None:
            self._metrics.folded(self._projection.name, len(batch.records), batch.last_times())
        return batch.next_offsets

    async def _finish(self) -> None:
        """Wait for the batch that is on its way, then show how far the view is."""
        applying, self._applying = self._applying, None
        await self._assignment.show(await applying if applying is not None else {})

    async def _abandon(self) -> None:
        """Let a batch that is on its way come to its end, whatever that is: the view's checkpoint will tell."""
        if self._applying is not None:
            await self._settled()
            if not self._applying.cancelled() and (error := self._applying.exception()) is not None:
                logger.info("%s: the last batch was not applied: %s", self._projection.name, type(error).__name__)

    async def _settled(self) -> None:
        if self._applying is not None:
            await asyncio.wait([self._applying])  # how it ended is seen where it is finished


async def _wait(stop: asyncio.Event, seconds: float) -> None:
    try:
        await asyncio.wait_for(stop.wait(), seconds)
    except TimeoutError:
        return


_RULE = RestartRule(final=frozenset({1, 2}), all_or_none=False)
"""The exit codes are those of a projector that has said in its log what is wrong: a projection failed, or the settings
do."""


async def run_processes(
    settings: Settings,
    names: Sequence[str],
    processes: int,
    stop: asyncio.Event,
    *,
    max_parked: int | None = None,
    metrics_at: ListenAddress | None = None,
) -> int:
    """Run so many projectors of these projections until `stop` is set, then tell them to stop; the exit code.

    Blocks until all have ended. The code is 0 when they were told to end and did so, else that of the first which could
    not go on. Returns early when none is left that can. From `metrics_at` on each has its own metrics.
    """
    limit = [] if max_parked is None else ["--max-parked", str(max_parked)]
    arguments = [*PYTHON, "-m", "services.cli", "projector", "--until-input-ends", *limit]
    environment = {**os.environ, **settings.environment()}
    commands = []
    for number in range(processes):
        listen = [] if metrics_at is None else ["--metrics-listen", str(metrics_at.of_process(number))]
        commands.append(Command([*arguments, *listen, *names], environment))
    return await run_all(commands, _RULE, stop)


_BATCH_RECORDS = 10_000
_BATCH_BYTES = 4 << 20
"""A batch ends when it has as many records or bytes as this; the last poll may go over it by what it brings."""

_POLL_RECORDS = 2_500
_FEWEST_RECORDS = 10
"""So many are asked for in one poll; fewer, when those before them were so large that more might not fit."""

_FIRST_SIZE = 16 << 10
"""What a record is taken to have before one was seen, in bytes: little in the first poll costs nothing."""

IDENTITY_SECONDS = 5.0
"""How often the log's identity and the view's generation are asked for when nothing comes."""

_RESET_SECONDS = 10.0
"""How long an assignment may wait for those who read a view that is to be folded again; the next one tries again."""


class Assignment:
    """Reads a projection's share of the log. Used by one task."""

    def __init__(
        self,
        views: Views,
        log: Log,
        projection: Projection,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        """`settled` is waited for before an assignment begins or ends: it returns when no batch is on its way into the
        view.
        """
        self._views = views
        self._log = log
        self._projection = projection
        self._settled = settled
        self._identity: UUID | None = None
        self._generation: UUID | None = None
        self._reset = False
        self._next: dict[int, int] = {}
        self._unclaimed: dict[int, int] = {}
        self._subscription: Subscription | None = None
        self._skips = Skips(log)
        self._unshown: dict[int, int] = {}
        self._usual_size = _FIRST_SIZE
        self._looked = time.monotonic()
        self._quiet_since: float | None = None

    @property
    def idle(self) -> bool:
        """Whether partitions were assigned, be it none, and nothing has come from them for IDENTITY_SECONDS.

        Before that nobody can tell: what is assigned has yet to arrive.
        """
        return self._quiet_since is not None and time.monotonic() > self._quiet_since + IDENTITY_SECONDS

    async def join(self) -> None:
        """Join the group; partitions are assigned while polling.

        Raises LogIdentityError, UnavailableError, ConfigurationError.
        """
        self._identity = await self._log.identity()
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        self._generation = checkpoint.generation
        self._subscription = await self._log.subscribe(self._projection.name, self._start_offsets, self._settled)

    async def next_batch(self, timeout_seconds: float) -> tuple[DecodedBatch, Checkpoint] | None:
        """Wait until there is something to apply; None when there is nothing within the time.

        With the batch comes the checkpoint that it was read from, in the partitions that the batch moves.

        Raises:
            StaleCheckpointError: what is assigned cannot be read on from here, or the view has another generation by
                now; join again.
            CorruptError: the log does not go on from what the view has folded.
            LogIdentityError: the log was made anew since the membership began.
            UnavailableError: the log or the database cannot be reached.
        """
        records: list[Record] = []
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        size = 0
        while True:
            async with self._of_one_log():
                batch = await self._joined().poll(self._most(size), 0.0 if ends else timeout_seconds)
            self._check(batch, ends)
            if gone := ends.keys() - self._joined().assigned:  # for whoever has them now to read
                records = [record for record in records if record.partition not in gone]
                for partition in gone:
                    del starts[partition], ends[partition]
            if self._unclaimed:
                await self._claim()
            for partition, offset in batch.next_offsets.items():
                starts.setdefault(partition, self._next[partition])
                ends[partition] = self._next[partition] = offset
            records += batch.records
            if batch.records:
                brought = sum(len(record.value) for record in batch.records)
                size += brought
                self._usual_size = brought // len(batch.records)
            if not batch.next_offsets or len(records) >= _BATCH_RECORDS or size >= _BATCH_BYTES:
                break
        if not ends:
            # A client that misses that its topic was deleted and made anew may wait for minutes without a word.
            if time.monotonic() > self._looked + IDENTITY_SECONDS:
                await self._require_same_log()
                await self._require_same_generation()
            return None
        self._quiet_since = time.monotonic()
        decoded = await decode(self._log, records, self._skips, ends)
        await self._require_same_log()
        return decoded, self._checkpoint(starts)

    async def show(self, next_offsets: Mapping[int, int]) -> None:
        """Commit what the view holds to the group, with the view's generation, for the log's own tools.

        Also what could not be shown before, and where an assignment began when another went without showing it.
        """
        assigned = self._joined().assigned
        self._unshown = {p: offset for p, offset in {**self._unshown, **next_offsets}.items() if p in assigned}
        if not self._unshown:
            return
        try:
            await self._joined().commit(self._unshown, str(self._generation))
        except (UnavailableError, PushBackError) as error:  # only shown: the view has it, and it is tried again
            logger.info("%s: progress was not shown: %s", self._projection.name, error.detail)
        else:
            self._unshown = {}

    async def leave(self) -> None:
        """Leave the group at once."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _start_offsets(self, partitions: Sequence[int]) -> Mapping[int, int]:
        await self._settled()
        if self._identity is None:
            raise StaleCheckpointError("asked for offsets before joining")
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        if checkpoint.generation != self._generation:
            self._reset = True  # partitions that are held already stand in the older generation: join anew for all
        name = self._projection.name
        if partitions:
            await check_continues(self._log, name, checkpoint, partitions)
        # Asked for after the checkpoint: what another member claims and folds meanwhile must not look like a reset.
        committed = await self._log.committed(name)
        if not self._reset and folds_again(name, committed, checkpoint.position, range(await self._log.partitions())):
            await self._begin_anew(checkpoint.generation)
        starts = {p: checkpoint.position.offsets.get(p, 0) for p in partitions}
        self._unclaimed.update({p: offset for p, offset in starts.items() if p in committed and not committed[p][1]})
        self._next.update(starts)
        self._unshown.update({p: offset for p, offset in starts.items() if committed.get(p, (0, ""))[0] != offset})
        self._quiet_since = time.monotonic()
        if starts:
            logger.info("%s: assigned partitions %s", self._projection.name, starts)
        return starts

    async def _begin_anew(self, generation: UUID) -> None:
        """Empty the view, because an operator has reset the whole group to the log's start.

        Of several members that see this one resets the view, which is still of the generation that was looked at; the
        others, and the next assignment of all of them, find a view that stands at the start. Always raises
        StaleCheckpointError.
        """
        name = self._projection.name
        logger.warning(
            "%s: the group was reset to the log's start with other tools: the view is emptied and folded again", name
        )
        await reset(self._views, self._projection, expected=generation, patience_seconds=_RESET_SECONDS)
        raise StaleCheckpointError(f"the view {name} begins anew")

    async def _claim(self) -> None:
        """Commit, under the view's generation, where reading begins in partitions whose offset somebody else has set.

        Before anything is folded there: whoever is assigned them next must not take that offset for a fresh rewind.
        """
        assigned = self._joined().assigned
        claimed = {p: offset for p, offset in self._unclaimed.items() if p in assigned}
        self._unclaimed.clear()
        if claimed:
            await self._joined().commit(claimed, str(self._generation))

    def _most(self, size: int) -> int:
        """How many records to ask for when a batch has this many bytes, going by the size of the last ones."""
        fitting = (_BATCH_BYTES - size) // max(1, self._usual_size)
        return max(_FEWEST_RECORDS, min(_POLL_RECORDS, fitting))

    def _check(self, batch: Batch, ends: Mapping[int, int]) -> None:
        """Refuse what does not go on from where reading stands: a rebalance came between."""
        moved = any(self._next[p] != offset for p, offset in ends.items())
        firsts = {record.partition: record.offset for record in reversed(batch.records)}
        early = any(offset < self._next.get(p, 0) for p, offset in firsts.items())
        if self._reset or moved or early:
            raise StaleCheckpointError(f"the partitions of {self._projection.name} were assigned anew")

    @asynccontextmanager
    async def _of_one_log(self) -> AsyncIterator[None]:
        """What looks like a log that was cut may be another one: LogIdentityError then, instead of CorruptError."""
        try:
            yield
        except CorruptError:
            await self._require_same_log()
            raise

    async def _require_same_log(self) -> None:
        """Asked behind the reading: a log that is still the same was so while it was read, since no identity returns.

        A client goes on at its offset when a topic was deleted and made anew under its feet, as if nothing had been.
        """
        if self._identity is None:
            raise StaleCheckpointError("read before joining")
        require_same_log(self._projection, self._identity, await self._log.identity())
        self._looked = time.monotonic()

    async def _require_same_generation(self) -> None:
        """Without a batch there is no guard that would tell: what a reset has emptied might stay so until one comes."""
        async with self._views.reading() as connection:
            live = await live_row(connection, self._projection)
        if live.generation != self._generation:
            raise StaleCheckpointError(f"the view {self._projection.name} has another generation by now")

    def _checkpoint(self, starts: Mapping[int, int]) -> Checkpoint:
        if self._generation is None or self._identity is None:
            raise StaleCheckpointError("read before joining")
        return Checkpoint(self._generation, Position(self._identity, starts))

    def _joined(self) -> Subscription:
        if self._subscription is None:
            raise StaleCheckpointError("read before joining")
        return self._subscription
