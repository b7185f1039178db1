"""Metrics of a projector for Prometheus: what this process has folded, and the progress of the views.

Lag and parked packages are read from the views themselves, so all projectors of a view show the same numbers.
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
from services.views.engine.apply import list_marks
from services.views.engine.generations import is_being_built, read_build
from services.views.projections import projection_named
from services.views.queries import Queries

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_MICROS = 1_000_000
_LOOK_SECONDS = 5.0
_ANSWER_SECONDS = 8.0
"""How long log and database may take to answer. Together with a second in which the event loop may be busy, this is
less than Prometheus waits for a scrape (10 s)."""


class _Standing(NamedTuple):
    """The progress of a view."""

    position: Position | None
    parked: int
    """How many packages are parked."""
    replayed_to: Position | None
    """The position of its replay; None if there is none."""
    replaying: bool
    """Whether a process runs the replay."""


class _Found(NamedTuple):
    """The answers of log and database; None for one that did not answer."""

    since: float
    """When they were asked, in seconds since 1970."""
    end: Position | None
    """The log's end."""
    views: Mapping[str, _Standing] | None
    """The progress of the views, by projection."""


class ProjectorMetrics(Collector):
    """The metrics of the projections that one process runs."""

    def __init__(self, views: Views, log: Log, names: Iterable[str], *, alone: bool = True) -> None:
        """Construct it on the event loop on which log and database are to be asked.

        With `alone`, they are asked at each scrape, which runs in another thread. Otherwise the process is a gateway
        too: the gateway shows whether components are up, and the views' progress is what `looking_regularly` saw last.
        """
        self._alone = alone
        self._seen = _Found(0.0, None, None)
        self._ending: set[asyncio.Future[Any]] = set()
        """Questions that were cancelled and have not ended yet."""
        self._views = views
        self._queries = Queries(views)
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._events = dict.fromkeys(names, 0)
        self._running = dict.fromkeys(self._events, True)
        self._times: dict[str, dict[int, float]] = {name: {} for name in self._events}

    def folded(self, name: str, events: int, last_times: Mapping[int, int]) -> None:
        """Note that this many more events are in the view; `last_times` is as in `EventBatch`."""
        self._events[name] += events
        for partition, micros in last_times.items():
            self._came_to(name, partition, micros / _MICROS)
        self.goes_on(name)

    def _came_to(self, name: str, partition: int, moment: float) -> None:
        """Note that the view has all events of the partition from before `moment` (s since 1970)."""
        times = self._times[name]
        times[partition] = max(moment, times.get(partition, moment))

    def goes_on(self, name: str) -> None:
        """Note that the projection has folded, or has had nothing to fold for a while."""
        self._running[name] = True

    def stopped(self, name: str) -> None:
        """Note that the projection cannot continue, for ever or until `goes_on` is called."""
        self._running[name] = False

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client, whose server calls it in a thread. Blocks for _ANSWER_SECONDS and a second at most."""
        progress = list(self._progress())  # first, so that the other numbers include what happens while this waits
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
        """The views' progress. Leaves out what cannot be found out now, because an old number would look like a new."""
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
            except TimeoutError:  # the event loop itself was busy for that long
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
        """Within the block, read the views' progress every 5 s, unless each scrape does."""
        if self._alone:
            yield
            return

        stop = asyncio.Event()

        async def look() -> None:
            while not stop.is_set():
                try:
                    self._seen = await self._ask()
                except Exception:  # a bug is logged, and outdated numbers are not shown
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
        """Ask for the log's end and for the views' progress."""
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
        """The component's answer; None if it fails, or takes longer than _ANSWER_SECONDS.

        A question that takes longer is cancelled, and may take some time to end after that.
        """
        asking = asyncio.ensure_future(asked)
        try:
            # A connection to a frozen database takes seconds to close, which is too long for a scrape.
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
