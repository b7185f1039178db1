"""Metrics of a process's writers for Prometheus, collected at each scrape, without requests to the cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.log.kafka.writer import KafkaWriter
from services.log.port import PartitionStatus

_MICROS = 1_000_000
_Shown = tuple[float | None, str]
"""A partition's value, None if it has none, and that of the metric's second label, if it has one."""

_GAUGES: Sequence[tuple[str, str, Sequence[str], Callable[[PartitionStatus], _Shown]]] = (
    (
        "artifact_store_partition_owned_since_seconds",
        "When this process took the partition over, in seconds since 1970",
        (),
        lambda of: (None if of.since is None else of.since / _MICROS, ""),
    ),
    (
        "artifact_store_partition_takeover_seconds",
        "How long the last take-over of the partition took",
        ("restored_from",),
        lambda of: (of.takeover_seconds, of.restored_from or ""),
    ),
    (
        "artifact_store_partition_waiting",
        "Requests in the queue of the partition's writer",
        (),
        lambda of: (of.waiting, ""),
    ),
    (
        "artifact_store_partition_memory_only",
        "1 while the disk has no room for the partition's state file, so that changes are only in memory",
        (),
        lambda of: (float(of.memory_only is not None), ""),
    ),
    (
        "artifact_store_partition_bad_record_offset",
        "Offset of a record that is no event and stops the partition until `artifact-store log skip`. Absent if none",
        ("digest",),
        lambda of: (of.bad_offset, of.bad_digest or ""),
    ),
    (
        "artifact_store_partition_lost_record_offset",
        "Offset of an acknowledged record that is gone; no writes until the loss is accepted. Absent if none",
        ("digest",),
        lambda of: (of.lost_offset, of.lost_digest or ""),
    ),
    (
        "artifact_store_partition_skipped",
        "Records of the partition that are not events and are skipped, as an operator confirmed",
        (),
        lambda of: (of.skipped, ""),
    ),
    (
        "artifact_store_partition_repeated",
        "Repeated events of the partition, which are skipped",
        (),
        lambda of: (of.repeated, ""),
    ),
    (
        "artifact_store_partition_quarantined",
        "Packages of the partition whose history the log contradicts: they take no more events",
        (),
        lambda of: (of.quarantined, ""),
    ),
)
"""Name, help text, second label, and what a partition shows."""


class WriterCollector(Collector):
    """The metrics of one `KafkaWriter`. For partitions that others own it only shows that it does not own them."""

    def __init__(self, writer: KafkaWriter) -> None:
        self._writer = writer

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        here = self._writer.status_here()
        serving = {of.partition for of in here if of.since is not None}
        owned = GaugeMetricFamily(
            "artifact_store_partition_owned",
            "1 while this process takes writes to the partition. The sum over all gateways is 1 per partition, and 0 "
            "while it is taken over or refuses all writes",
            labels=["partition"],
        )
        for partition in range(self._writer.partitions):
            owned.add_metric([str(partition)], float(partition in serving))
        yield owned
        yield GaugeMetricFamily("artifact_store_partitions", "Partitions of the log", value=self._writer.partitions)
        yield GaugeMetricFamily(
            "artifact_store_log_settings_drifted",
            "1 while settings of the topic are not as they should be; `artifact-store doctor` says which",
            value=float(self._writer.drifted),
        )
        for name, text, further, shown in _GAUGES:
            gauge = GaugeMetricFamily(name, text, labels=["partition", *further])
            for of in here:
                value, label = shown(of)
                if value is not None:
                    gauge.add_metric([str(of.partition), label][: 1 + len(further)], value)
            yield gauge
        if (skew := self._writer.clock_skew_seconds) is not None:
            yield GaugeMetricFamily(
                "artifact_store_clock_skew_seconds",
                "How many seconds this machine's clock is ahead of the blob store's, negative if behind, 0 if they "
                "agree to the second. Nothing is written beyond 300. Absent with `file:` blobs",
                value=skew,
            )
        if (free := self._writer.state_free_bytes) is not None:
            yield GaugeMetricFamily(
                "artifact_store_state_free_bytes", "Free space on the disk of the writers' state", value=free
            )
        yield from self._totals()

    def _totals(self) -> Iterator[Metric]:
        counts = self._writer.counts
        takeovers = CounterMetricFamily(
            "artifact_store_takeovers", "Partitions that this process took over", labels=["restored_from"]
        )
        for source, number in sorted(counts.takeovers.items()):
            takeovers.add_metric([source], number)
        yield takeovers
        yield CounterMetricFamily(
            "artifact_store_takeover_seconds",
            "Seconds that all take-overs took together",
            value=counts.takeover_seconds,
        )
        yield CounterMetricFamily(
            "artifact_store_failed_takeovers",
            "Leases and take-overs of partitions that failed; each is followed by another take-over",
            value=counts.failed_takeovers,
        )
        yield CounterMetricFamily(
            "artifact_store_events_appended", "Events that this process appended to the log", value=counts.appended
        )
        yield CounterMetricFamily(
            "artifact_store_transactions", "Transactions that appended these events", value=counts.transactions
        )
        yield CounterMetricFamily(
            "artifact_store_pushed_back", "Requests that were told to retry later", value=counts.pushed_back
        )
