"""Metrics of a process's writers for Prometheus, collected whenever somebody looks; nothing is asked of the cluster."""

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
        "Requests that wait for the writer's next turn",
        (),
        lambda of: (of.waiting, ""),
    ),
    (
        "artifact_store_partition_memory_only",
        "1 while the disk has no room for the partition's state file, and what changes is in memory alone",
        (),
        lambda of: (float(of.memory_only is not None), ""),
    ),
    (
        "artifact_store_partition_bad_record_offset",
        "Offset of the record that is no event and stops the partition until `artifact-store log skip`; absent if none",
        ("digest",),
        lambda of: (of.bad_offset, of.bad_digest or ""),
    ),
    (
        "artifact_store_partition_lost_record_offset",
        "Offset of an acknowledged record that is gone; no writes until the loss is accepted. Absent without one",
        ("digest",),
        lambda of: (of.lost_offset, of.lost_digest or ""),
    ),
    (
        "artifact_store_partition_skipped",
        "Records of the partition that are no events and are passed over, as an operator confirmed",
        (),
        lambda of: (of.skipped, ""),
    ),
    (
        "artifact_store_partition_repeated",
        "Events of the partition that their packages had already, and that are passed over",
        (),
        lambda of: (of.repeated, ""),
    ),
    (
        "artifact_store_partition_quarantined",
        "Packages of the partition whose history is contradicted: nothing is added to them",
        (),
        lambda of: (of.quarantined, ""),
    ),
)
"""Name, help text, second label, and what a partition shows."""


class WriterCollector(Collector):
    """What one `KafkaWriter` says of itself. Of partitions that others own it says only that it does not own them."""

    def __init__(self, writer: KafkaWriter) -> None:
        self._writer = writer

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        here = self._writer.status_here()
        serving = {of.partition for of in here if of.since is not None}
        owned = GaugeMetricFamily(
            "artifact_store_partition_owned",
            "1 while this process takes writes to the partition; the sum over all gateways is 1 for each, and 0 while "
            "it is taken over or refuses everything",
            labels=["partition"],
        )
        for partition in range(self._writer.partitions):
            owned.add_metric([str(partition)], float(partition in serving))
        yield owned
        yield GaugeMetricFamily("artifact_store_partitions", "Partitions of the log", value=self._writer.partitions)
        yield GaugeMetricFamily(
            "artifact_store_log_settings_drifted",
            "1 while settings of the topic are others than they should be; `artifact-store doctor` says which",
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
                "How far this machine's clock is ahead of the blob store's, negative when it is behind, 0 while they "
                "agree to the second. Beyond 300 nothing is written. Absent with `file:` blobs",
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
            "artifact_store_takeover_seconds", "What take-overs took together", value=counts.takeover_seconds
        )
        yield CounterMetricFamily(
            "artifact_store_failed_takeovers",
            "Leases and take-overs of partitions that failed, so that a take-over followed",
            value=counts.failed_takeovers,
        )
        yield CounterMetricFamily(
            "artifact_store_events_appended", "Events that this process appended to the log", value=counts.appended
        )
        yield CounterMetricFamily(
            "artifact_store_transactions", "Transactions that appended these events", value=counts.transactions
        )
        yield CounterMetricFamily(
            "artifact_store_pushed_back", "Requests that were told to come again later", value=counts.pushed_back
        )
