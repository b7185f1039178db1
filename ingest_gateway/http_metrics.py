"""Metrics of the gateway, in their own registry, for Prometheus."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import NamedTuple

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from services.blobs.verified_reads import BAD_READS
from services.runtime.metrics import new_registry

CONTENT_TYPE = CONTENT_TYPE_LATEST

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_LAG_INTERVAL = 1.0


class _Series(NamedTuple):
    """The counters for answers with the same labels, kept because looking them up costs more than counting."""

    requests: Counter
    seconds: Histogram | None
    received: Counter
    sent: Counter


class _Deliveries(Collector):
    """Shows no number while it is unknown, because an old number would look like a new one."""

    unserved: int | None = None

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "artifact_store_webhook_unserved_subscriptions",
            "Active subscriptions while no process delivers to them, 0 while one does; absent while the database does "
            "not answer",
        )
        if self.unserved is not None:
            gauge.add_metric([], self.unserved)
        yield gauge


class Metrics:
    """The gateway's metrics. Labels are route templates, never paths, so their number is bounded."""

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        """`registry` may already hold the metrics of other parts; all are exposed together."""
        self.registry = registry or new_registry()
        self._series: dict[tuple[str, str, int], _Series] = {}
        """By route, method and status."""
        self._requests = Counter(
            "artifact_store_http_requests",
            "Requests by route, method and status; status 0 is an answer that was cut off",
            ("route", "method", "status"),
            registry=self.registry,
        )
        self._seconds = Histogram(
            "artifact_store_http_request_seconds",
            "Time from a request's head to the end of its answer. Followers stay long; probes are not counted",
            ("route", "method"),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self._received = Counter(
            "artifact_store_http_received_bytes", "Bytes of request bodies", ("route",), registry=self.registry
        )
        self._sent = Counter(
            "artifact_store_http_sent_bytes", "Bytes of response bodies", ("route",), registry=self.registry
        )
        self._in_flight = Gauge(
            "artifact_store_http_in_flight",
            "Requests in progress, including those of followers",
            registry=self.registry,
        )
        self._followers = Gauge("artifact_store_http_followers", "Clients that follow events", registry=self.registry)
        self._connections = Gauge("artifact_store_http_connections", "Open connections", registry=self.registry)
        self._uploads = Gauge("artifact_store_http_uploads", "Uploads in progress", registry=self.registry)
        self._downloads = Gauge("artifact_store_http_downloads", "Downloads in progress", registry=self.registry)
        self._refused = Counter(
            "artifact_store_http_refused",
            "Connections, uploads, downloads, archives, followers and JSON bodies refused for lack of capacity",
            ("what",),
            registry=self.registry,
        )
        self._up = Gauge(
            "artifact_store_component_up",
            "Gateway: 1 while a component works, as `/readyz` saw it at most 10 s ago. Without `views`, only reads "
            "fail; without any other, nothing is written",
            ("component",),
            registry=self.registry,
        )
        self._deliveries = _Deliveries()
        self.registry.register(self._deliveries)
        self.registry.register(BAD_READS)
        self._lag = Gauge(
            "artifact_store_event_loop_lag_seconds",
            "How late the event loop runs. More than 0.1 s for long means that the process is overloaded",
            registry=self.registry,
        )

    def watch(
        self,
        *,
        in_flight: Callable[[], float],
        followers: Callable[[], float],
        connections: Callable[[], float],
        uploads: Callable[[], float],
        downloads: Callable[[], float],
    ) -> None:
        """Set the functions that give the gauges' values at each scrape."""
        self._in_flight.set_function(in_flight)
        self._followers.set_function(followers)
        self._connections.set_function(connections)
        self._uploads.set_function(uploads)
        self._downloads.set_function(downloads)

    def show_bucket(self, name: str) -> None:
        """Show where the process keeps blobs, as `bucket_of` names it."""
        Gauge(
            "artifact_store_bucket_info",
            "1; the label says in which bucket this process keeps blobs. All gateways must have the same",
            ("bucket",),
            registry=self.registry,
        ).labels(name).set(1)

    def watch_database(self, in_use: Callable[[], float]) -> None:
        """Set the function that gives the number of database connections in use at each scrape."""
        Gauge(
            "artifact_store_database_connections",
            "Connections to the views' database that this process is using, at most 15",
            registry=self.registry,
        ).set_function(in_use)

    def watch_memory(self, in_use: Callable[[], float]) -> None:
        """Set the function that gives how much of the memory for uploads is in use at each scrape."""
        Gauge(
            "artifact_store_upload_memory_bytes",
            "Memory that uploads to a bucket are using, at most 64 MiB; uploads that need more wait",
            registry=self.registry,
        ).set_function(in_use)

    def refused(self, what: str, times: int) -> None:
        """Count refusals for lack of capacity, by kind. A kind is shown once this was called for it, even with 0."""
        self._refused.labels(what).inc(times)

    def component(self, name: str, works: bool) -> None:
        """Show whether a component of the process works."""
        self._up.labels(name).set(works)

    def unserved(self, subscriptions: int | None) -> None:
        """Show the number of subscriptions to which nobody delivers; None hides it."""
        self._deliveries.unserved = subscriptions

    def answered(
        self, route: str, method: str, status: int, seconds: float, received: int, sent: int, *, timed: bool = True
    ) -> None:
        """Count one request, with the bytes of its bodies. Probes are counted but not `timed`."""
        series = self._series.get((route, method, status))
        if series is None:
            series = self._series[route, method, status] = _Series(
                self._requests.labels(route, method, str(status)),
                self._seconds.labels(route, method) if timed else None,
                self._received.labels(route),
                self._sent.labels(route),
            )
        series.requests.inc()
        if series.seconds is not None:
            series.seconds.observe(seconds)
        if received:
            series.received.inc(received)
        if sent:
            series.sent.inc(sent)

    async def watch_loop(self) -> None:
        """Measure the event loop's lag, once a second, until cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _LAG_INTERVAL
            await asyncio.sleep(_LAG_INTERVAL)
            self._lag.set(max(0.0, loop.time() - due))

    def exposition(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return generate_latest(self.registry)
