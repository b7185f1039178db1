"""Metrics of a projector for Prometheus: what this process folded, and, asked when somebody looks, how far views are.

Lag and parked packages are those of the view itself, the same whichever of its projectors is asked.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from artifact_store.errors import ArtifactStoreError, ConfigurationError
from services.log.port import Log
from services.runtime.addresses import ListenAddress
from services.views.database import Views
from services.views.engine.parking import list_marks
from services.views.queries import Queries

logger = logging.getLogger(__name__)

_ANSWER_SECONDS = 8.0
"""How long log and database may take to answer; less than Prometheus waits for a scrape (10 s)."""


class ProjectorMetrics(Collector):
    """What the projections of one process have done, and what they have yet to do."""

    def __init__(self, views: Views, log: Log, names: Iterable[str]) -> None:
        """Must be made on the event loop, which log and database are asked on."""
        self._views = views
        self._queries = Queries(views)
        self._log = log
        self._loop = asyncio.get_running_loop()
        self._events = dict.fromkeys(names, 0)
        self._running = dict.fromkeys(self._events, True)

    def folded(self, name: str, events: int) -> None:
        """So many events more are in the view."""
        self._events[name] += events
        self.goes_on(name)

    def goes_on(self, name: str) -> None:
        """The projection has folded, or has had nothing to fold for a while."""
        self._running[name] = True

    def stopped(self, name: str) -> None:
        """The projection could not go on, for good or until it goes on again."""
        self._running[name] = False

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client, which calls it in a thread of its server's; blocks for _ANSWER_SECONDS at most."""
        events = CounterMetricFamily(
            "artifact_store_projection_events", "Events that this process folded", labels=["projection"]
        )
        running = GaugeMetricFamily(
            "artifact_store_projection_running",
            "1 while this process runs the projection, 0 when it could not go on, until it has folded again",
            labels=["projection"],
        )
        for name, number in self._events.items():
            events.add_metric([name], number)
            running.add_metric([name], float(self._running[name]))
        yield from (events, running)
        yield from self._progress()

    def _progress(self) -> Iterator[Metric]:
        """Nothing of what cannot be found out now: an old number would look like a good one."""
        lag = GaugeMetricFamily(
            "artifact_store_projection_lag",
            "Offsets between where the view stands in a partition and its end",
            labels=["projection", "partition"],
        )
        parked = GaugeMetricFamily(
            "artifact_store_projection_parked_packages",
            "Packages that the view could not follow",
            labels=["projection"],
        )
        asked = asyncio.run_coroutine_threadsafe(self._ask(), self._loop)
        try:
            lags, marks = asked.result(_ANSWER_SECONDS)
        except (ArtifactStoreError, TimeoutError) as error:
            asked.cancel()
            logger.info("metrics without progress: %s", error)
            return
        for name, partitions in lags.items():
            parked.add_metric([name], marks[name])
            for partition, behind in partitions.items():
                lag.add_metric([name, str(partition)], behind)
        yield from (lag, parked)

    async def _ask(self) -> tuple[Mapping[str, Mapping[int, int]], Mapping[str, int]]:
        end = await self._log.end()
        lags = {name: end.left_behind(await self._queries.checkpoint(name)) for name in self._events}
        return lags, {name: len(await list_marks(self._views, name)) for name in self._events}


@asynccontextmanager
async def served(metrics: ProjectorMetrics, address: ListenAddress | None) -> AsyncIterator[None]:
    """Serve the metrics over HTTP inside the block, in threads; not at all without an address.

    Raises ConfigurationError: the address cannot be had.
    """
    if address is None:
        yield
        return
    registry = CollectorRegistry()
    registry.register(metrics)
    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise ConfigurationError(f"--metrics-listen: cannot listen on {address}: {error.strerror}") from error
    logger.info("metrics at http://%s/metrics", ListenAddress(address.host, server.server_port))
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)
