"""Running a projection: read, fold and show the progress, in a loop, until told to stop.

Each batch takes effect exactly once, however often it is read: rows and checkpoint are written in one transaction, and
the checkpoint's guard refuses a repeated batch. While one batch is written, the next one is read and decoded.

A temporary failure ends the membership in the group, and after a pause another one begins. Meanwhile others can take
the partitions over, and the view's checkpoint says where to continue. A permanent failure is raised: log and view do
not belong together, or one of them is damaged. Three kinds of failures are shown to people and tried again, without
skipping anything: settings that worked before, tables that are missing or have another layout, and a bug in a fold.

`run_processes` runs several projectors. Each is a member of the groups, so the partitions are spread over them. If one
dies, it is started again. If one reports that it cannot continue, it is not, and its partitions go to the others.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
import time
from collections.abc import Iterable, Sequence
from contextlib import aclosing

from prometheus_client import CollectorRegistry

from artifact_store.errors import ArtifactStoreError, CorruptError, PushBackError, UnavailableError
from projector.projection_metrics import ProjectorMetrics
from services.config import Settings
from services.log.port import Log, Record
from services.runtime import tracing
from services.runtime.addresses import ListenAddress
from services.runtime.metrics import new_registry, served
from services.runtime.processes import PYTHON, Command, RestartRule, wait_for_stop
from services.runtime.processes import run_processes as run_all
from services.views.database import TablesError, Views
from services.views.engine.apply import fold
from services.views.engine.checkpoints import StaleCheckpointError
from services.views.engine.source import Assignment, EventBatch, read_ahead
from services.views.projections import PROJECTIONS, Projection, projection_named
from services.wiring import open_log, open_views

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.1
_LONGEST_PAUSE = 10.0
_STUCK_SECONDS = 10.0
"""A batch that takes longer than this to fold is reported: a frozen database may not answer for minutes."""


async def run_projectors(
    settings: Settings,
    names: Iterable[str],
    stop: asyncio.Event,
    *,
    max_parked: int | None = None,
    metrics_at: ListenAddress | None = None,
    metrics_in: CollectorRegistry | None = None,
) -> dict[str, ArtifactStoreError]:
    """Run several projections (without names, all) until `stop` is set. Blocks until they have left their groups.

    `max_parked` is how many packages each may park. Their metrics are served to Prometheus at `metrics_at`, or added to
    `metrics_in`, which shows those of the rest of the process. Returns the projections that could not continue, with
    the reason. Each of these is logged at once, and the others continue.

    Raises InvalidRequestError: there is no projection with that name. ConfigurationError: settings that cannot work,
    or an address that cannot be listened on.
    """
    projections = [projection_named(name) for name in dict.fromkeys(names)] or list(PROJECTIONS.values())
    log, views = open_log(settings), open_views(settings)
    if max_parked is not None:
        views.max_parked = max_parked
    try:
        alone = metrics_in is None
        metrics = ProjectorMetrics(views, log, [projection.name for projection in projections], alone=alone)
        runs = [_reported(views, log, projection, stop, metrics) for projection in projections]
        shown = metrics_in or new_registry(settings.certificates())
        shown.register(metrics)
        async with served(shown, metrics_at), metrics.looking_regularly():
            outcomes = zip(projections, await asyncio.gather(*runs), strict=True)
        return {projection.name: error for projection, error in outcomes if error is not None}
    finally:
        await views.close()
        await log.close()


async def run_projection(
    views: Views, log: Log, projection: Projection, stop: asyncio.Event, metrics: ProjectorMetrics | None = None
) -> None:
    """Project until `stop` is set, through failures of log and database. Blocks until the group is left.

    Refusals and unexpected errors are shown in the log and the metrics, and tried again every 10 s.

    Raises:
        CorruptError: the log does not continue from what the view has folded, or too many packages would be parked.
        LogIdentityError: the view was folded from another log.
        ConfigurationError: the settings were refused before it had ever joined the group.
    """
    pause = _FIRST_PAUSE
    joined = False
    while not stop.is_set():
        run = _Run(views, log, projection, metrics)
        try:
            await run.work(stop)
        except StaleCheckpointError as error:
            logger.info("%s: %s; reading on from the view's checkpoint", projection.name, error.detail)
            await wait_for_stop(stop, random.uniform(0, _FIRST_PAUSE))
        except (UnavailableError, PushBackError) as error:
            if metrics is not None and isinstance(error, UnavailableError):
                metrics.stopped(projection.name)
            pause = _FIRST_PAUSE if run.progressed else min(2 * pause, _LONGEST_PAUSE)
            logger.warning("%s: %s; trying again in %.1f s", projection.name, error.detail, pause)
            await wait_for_stop(stop, pause)
        except ArtifactStoreError as error:
            may_pass = joined or run.joined or isinstance(error, TablesError)
            if isinstance(error, CorruptError) or not may_pass:
                raise
            logger.error("%s: %s; trying again in %.1f s", projection.name, error.detail, _LONGEST_PAUSE)
            await _in_trouble(projection, stop, metrics)
        except Exception:  # a bug in one fold must not stop the others, nor this one if it passes
            logger.exception("%s: a bug in this program; trying again in %.1f s", projection.name, _LONGEST_PAUSE)
            await _in_trouble(projection, stop, metrics)
        joined = joined or run.joined


async def _in_trouble(projection: Projection, stop: asyncio.Event, metrics: ProjectorMetrics | None) -> None:
    if metrics is not None:
        metrics.stopped(projection.name)
    await wait_for_stop(stop, _LONGEST_PAUSE)


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
        self._events = 0
        self._views = views
        self._log = log
        self._projection = projection
        self._metrics = metrics
        self._applying = asyncio.Lock()
        self._assignment = Assignment(views, log, projection, self._settled)

    async def work(self, stop: asyncio.Event) -> None:
        """Read and fold until `stop` is set; everything that was read by then is folded."""
        name, began, why = self._projection.name, time.monotonic(), "it was cancelled"
        try:
            await self._assignment.join()
            self.joined = True
            logger.info("%s: following the log", name)
            async with aclosing(read_ahead(self._assignment.batches(stop))) as batches:
                async for batch in batches:
                    if batch.ends:
                        await self._apply(batch)
                    elif self._metrics is not None and self._assignment.idle:
                        self._metrics.goes_on(self._projection.name)  # nothing is left to fold, so all is well
            await self._assignment.show()
            why = "it was told to stop"
        except ArtifactStoreError as error:
            why = error.detail
            raise
        except Exception as error:
            why = f"an unexpected {type(error).__name__}"
            raise
        finally:
            await self._assignment.leave()
            if self.joined:
                seconds = time.monotonic() - began
                logger.info("%s: stopped following after %.1f s and %d events: %s", name, seconds, self._events, why)

    async def _apply(self, batch: EventBatch) -> None:
        async with self._applying:
            tracer = tracing.tracer
            began = 0 if tracer is None else time.time_ns()
            report = asyncio.get_running_loop().call_later(_STUCK_SECONDS, self._report_stuck, len(batch))
            try:
                await fold(self._views, self._log, self._projection, batch)
            finally:
                report.cancel()
        if tracer is not None:
            self._make_spans(tracer, batch, began)
        self._assignment.applied(batch)
        self.progressed = True
        self._events += len(batch)
        if self._metrics is not None:
            self._metrics.folded(self._projection.name, len(batch), batch.last_times())

    def _report_stuck(self, events: int) -> None:
        name = self._projection.name
        if self._metrics is not None:
            self._metrics.stopped(name)
        logger.warning(
            "%s: folding %d events has taken more than %g s and goes on: the database is frozen or slow, or another "
            "transaction holds a lock on the view's tables",
            *(name, events, _STUCK_SECONDS),
        )

    def _make_spans(self, tracer: tracing.Tracer, batch: EventBatch, began: int) -> None:
        """Make a span of the fold for each traced command in the batch, as a child of the span that appended it."""
        commands: dict[str, list[Record]] = {}
        for record in batch.records:
            parent = next((value for name, value in record.headers if name == "traceparent"), None)
            if isinstance(parent, bytes) and tracing.sampled(known := parent.decode("ascii", "replace")):
                commands.setdefault(known, []).append(record)
        topic = self._log.topic or ""
        for parent, records in commands.items():
            attributes: dict[str, str | int] = {
                "messaging.system": "kafka",
                "messaging.operation.name": "process",
                "messaging.operation.type": "process",
                "messaging.destination.name": topic,
                "messaging.destination.partition.id": str(records[0].partition),
                "messaging.kafka.message.key": records[0].key.decode("ascii", "replace"),
                "messaging.kafka.offset": records[0].offset,
                "messaging.batch.message_count": len(records),
                "messaging.consumer.group.name": f"{topic.removesuffix('.events')}.projector.{self._projection.name}",
                "artifact_store.projection": self._projection.name,
            }
            tracer.begin(f"process {topic}", "consumer", parent, attributes, since=began).end()

    async def _settled(self) -> None:
        async with self._applying:
            return


_RULE = RestartRule(final=frozenset({1, 2}), all_or_none=False)
"""These are the exit codes of a projector that has logged what is wrong: a projection failed, or the settings are
wrong."""


async def run_processes(
    settings: Settings,
    names: Sequence[str],
    processes: int,
    stop: asyncio.Event,
    *,
    max_parked: int | None = None,
    metrics_at: ListenAddress | None = None,
) -> int:
    """Run this many projectors of these projections until `stop` is set, then tell them to stop. Returns the exit code.

    Blocks until all have ended, which is earlier if none of them can continue. The code is 0 if they ended as they were
    told to, else that of the first that could not continue. Each serves its metrics on its own port, from `metrics_at`
    on.
    """
    limit = [] if max_parked is None else ["--max-parked", str(max_parked)]
    arguments = [*PYTHON, "-m", "services.cli", "projector", "--until-input-ends", *limit]
    environment = {**os.environ, **settings.environment()}
    commands = []
    for number in range(processes):
        listen = [] if metrics_at is None else ["--metrics-listen", str(metrics_at.of_process(number))]
        commands.append(Command([*arguments, *listen, *names], environment))
    return await run_all(commands, _RULE, stop)
