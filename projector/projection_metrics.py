"""Metrics of a projector for Prometheus: what this process folded, and, asked when somebody looks, how far views are.

Lag and parked packages are those of the view itself, the same whichever of its projectors is asked.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, NamedTuple, TypeVar

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from artifact_store.errors import ArtifactStoreError
from artifact_store.position import Position
from services.log.port import Log
from services.runtime.processes import wait_for_stop
from services.views.database import Views
from services.views.engine.generations import is_being_built, read_build
from services.views.engine.parking import list_marks
from services.views.projections import projection_named
from services.views.queries import Queries

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_MICROS = 1_000_000
_LOOK_SECONDS = 5.0
_ANSWER_SECONDS = 8.0
"""How long log and database may take to answer; with the second in which the event
loop may be busy, less than Prometheus waits for a scrape (10 s)."""


class _Standing(NamedTuple):
    """How far a view is."""

    position: Position | None
    parked: int
    """Packages that are parked."""
    replayed_to: Position | None
    """Where its replay is; None without one."""
    replaying: bool
    """Whether a process runs it."""


class _Found(NamedTuple):
    """What log and database said; None for what gave no answer."""

    since: float
    """When they were asked, in seconds since 1970."""
    end: Position | None
    """The log's end."""
    views: Mapping[str, _Standing] | None
    """How far each view is, by projection."""


class ProjectorMetrics(Collector):
    """What the projections of one process have done, and what they have yet to do."""

    def __init__(self, views: Views, log: Log, names: Iterable[str], *, alone: bool = True) -> None:
        """Must be made on the event loop, which log and database are asked on.

        `alone`: at each scrape, which does not run on that loop. Otherwise the process is a gateway too: it shows the
        components itself, and how far views are is what `looking_regularly` saw last.
        """
        self._alone = alone
        self._seen = _Found(0.0, None, None)
        self._ending: set[asyncio.Future[Any]] = set()
        """Questions that were cut off and have not ended yet."""
        self._views = views
        self._queries = Queries(views)
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._events = dict.fromkeys(names, 0)
        self._running = dict.fromkeys(self._events, True)
        self._times: dict[str, dict[int, float]] = {name: {} for name in self._events}

    def folded(self, name: str, events: int, last_times: Mapping[int, int]) -> None:
        """So many events more are in the view; `last_times` as in `EventBatch`."""
        self._events[name] += events
        for partition, micros in last_times.items():
            self._came_to(name, partition, micros / _MICROS)
        self.goes_on(name)

    def _came_to(self, name: str, partition: int, moment: float) -> None:
        """The view holds all that was recorded in the partition before `moment`, in seconds since 1970."""
        times = self._times[name]
        times[partition] = max(moment, times.get(partition, moment))

    def goes_on(self, name: str) -> None:
        """The projection has folded, or has had nothing to fold for a while."""
        self._running[name] = True

    def stopped(self, name: str) -> None:
        """The projection could not go on, for good or until it goes on again."""
        self._running[name] = False

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client, which calls it in a thread of its server's; blocks for _ANSWER_SECONDS at most."""
        progress = list(self._progress())  # first: what happens while it waits for answers is shown at once
        events = CounterMetricFamily(
            "artifact_store_projection_events", "Events that this process folded", labels=["projection"]
        )
        running = GaugeMetricFamily(
            "artifact_store_projection_running",
            "1 while this process runs the projection. 0 when it could not go on, or a batch takes longer than 10 s, "
            "until it folds again or has had nothing to fold for 5 s",
            labels=["projection"],
        )
        for name, number in self._events.items():
            events.add_metric([name], number)
            running.add_metric([name], float(self._running[name]))
        yield from (events, running, *progress)

    def _progress(self) -> Iterator[Metric]:
        """Nothing of what cannot be found out now: an old number would look like a good one."""
        up = GaugeMetricFamily(
            "artifact_store_component_up",
            "Projector: 1 if a component answered this scrape",
            labels=["component"],
        )
        seconds = GaugeMetricFamily(
            "artifact_store_projection_lag_seconds",
            "Age of the oldest event that the view may lack, 0 at the log's end. Absent until this process has seen "
            "the view's progress. Take the lowest of several processes",
            labels=["projection", "partition"],
        )
        lag = GaugeMetricFamily(
            "artifact_store_projection_lag",
            "How many offsets the view is behind the end of a partition. Take the highest of several processes",
            labels=["projection", "partition"],
        )
        parked = GaugeMetricFamily(
            "artifact_store_projection_parked_packages",
            "Packages that are parked in the view",
            labels=["projection"],
        )
        replay = GaugeMetricFamily(
            "artifact_store_projection_replay_lag",
            "Offsets that a replay still has to fold. Absent if there is no replay",
            labels=["projection"],
        )
        building = GaugeMetricFamily(
            "artifact_store_projection_replay_running",
            "1 while a process runs a replay, 0 if the replay ended early and left its build. Absent if there is none",
            labels=["projection"],
        )
        if self._alone:
            asked = asyncio.run_coroutine_threadsafe(self._ask(), self._loop)
            try:
                now, end, views = asked.result(_ANSWER_SECONDS + 1)
            except TimeoutError:  # the event loop itself is busy for so long
                asked.cancel()
                logger.info("the metrics lack the progress of projections, because the process is overloaded")
                return
            up.add_metric(["log"], float(end is not None))
            up.add_metric(["views"], float(views is not None))
            yield up
        else:
            now, end, views = self._seen
        if views is None:
            return
        for name, standing in views.items():
            parked.add_metric([name], standing.parked)
            if end is None:
                continue
            if standing.replayed_to is not None:
                replay.add_metric([name], sum(end.left_behind(standing.replayed_to).values()))
                building.add_metric([name], float(standing.replaying))
            for partition, behind in end.left_behind(standing.position).items():
                labels = [name, str(partition)]
                lag.add_metric(labels, behind)
                if not behind:
                    self._came_to(name, partition, now)
                if (moment := self._times[name].get(partition)) is not None:
                    seconds.add_metric(labels, max(0.0, now - moment) if behind else 0.0)
        yield from (lag, seconds, parked, replay, building)

    @asynccontextmanager
    async def looking_regularly(self) -> AsyncIterator[None]:
        """Within the block, look every 5 s how far views are, unless each scrape does."""
        if self._alone:
            yield
            return

        stop = asyncio.Event()

        async def look() -> None:
            while not stop.is_set():
                try:
                    self._seen = await self._ask()
                except Exception:  # a mistake is logged, and numbers that grow old are not shown
                    logger.exception("the progress of projections could not be determined")
                    self._seen = _Found(0.0, None, None)
                await wait_for_stop(stop, _LOOK_SECONDS)

        looking = asyncio.create_task(look())
        try:
            yield
        finally:
            stop.set()
            await looking

    async def _ask(self) -> _Found:
        """The log's end, and by projection where its view stands and how many packages are parked."""
        since = time.time()
        return _Found(
            since, *await asyncio.gather(self._within("log", self._log.end()), self._within("views", self._of_views()))
        )

    async def _of_views(self) -> Mapping[str, _Standing]:
        return {name: await self._standing(name) for name in self._events}

    async def _standing(self, name: str) -> _Standing:
        projection = projection_named(name)
        async with self._views.reading() as connection:
            build = await read_build(connection, projection)
        parked = len(await list_marks(self._views, name))
        position = await self._queries.checkpoint(name)
        replaying = build is not None and await is_being_built(self._views, projection)
        return _Standing(position, parked, None if build is None else build.position, replaying)

    async def _within(self, component: str, asked: Awaitable[Answer]) -> Answer | None:
        """What it says, None if it does not within _ANSWER_SECONDS. Then it is cut off, and may take longer to end."""
        asking = asyncio.ensure_future(asked)
        try:
            # A connection to a database that is frozen takes seconds to close, for which no scrape has time.
            done, _ = await asyncio.wait((asking,), timeout=_ANSWER_SECONDS)
        finally:
            if not asking.done():
                asking.cancel()
                self._ending.add(asking)
                asking.add_done_callback(self._ended)
        cause = f"no answer within {_ANSWER_SECONDS:g} s"
        if done:
            try:
                return asking.result()
            except ArtifactStoreError as error:
                cause = error.detail
        logger.info("the metrics lack the progress of projections, because the %s failed: %s", component, cause)
        return None

    def _ended(self, asking: asyncio.Future[Any]) -> None:
        self._ending.discard(asking)
        if not asking.cancelled():
            asking.exception()  # nobody waits for it
