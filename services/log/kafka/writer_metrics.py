"""Metrics of a process's writers for Prometheus, collected whenever somebody looks; nothing is asked of the cluster."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from services.log.kafka.writer import KafkaWriter

_MICROS = 1_000_000
_IRREGULAR = {
    "skipped": (
        "artifact_store_partition_skipped",
        "Records of the partition that are no events and are passed over, as an operator confirmed",
    ),
    "repeated": (
        "artifact_store_partition_repeated",
        "Events of the partition that their packages had already, and that are passed over",
    ),
    "quarantined": (
        "artifact_store_partition_quarantined",
        "Packages of the partition whose history is contradicted: nothing is added to them",
    ),
}
"""By the field of `PartitionStatus` that it shows."""


class WriterCollector(Collector):
    """What one `KafkaWriter` says of itself. Partitions that others own are others' to tell."""

    def __init__(self, writer: KafkaWriter) -> None:
        self._writer = writer

    def collect(self) -> Iterator[Metric]:
        """See prometheus_client."""
        owned = GaugeMetricFamily(
            "artifact_store_partition_owned", "1 while this process takes writes to the partition", labels=["partition"]
        )
        since = GaugeMetricFamily(
            "artifact_store_partition_owned_since_seconds",
            "When this process took the partition over, in seconds since 1970",
            labels=["partition"],
        )
        took = GaugeMetricFamily(
            "artifact_store_partition_takeover_seconds",
            "How long the last take-over of the partition took",
            labels=["partition", "restored_from"],
        )
        waiting = GaugeMetricFamily(
            "artifact_store_partition_waiting", "Requests that wait for the writer's next turn", labels=["partition"]
        )
        memory_only = GaugeMetricFamily(
            "artifact_store_partition_memory_only",
            "1 while the disk has no room for the partition's state file, and what changes is in memory alone",
            labels=["partition"],
        )
        bad = GaugeMetricFamily(
            "artifact_store_partition_bad_record_offset",
            "Offset of the record that is no event, before which the partition stands until `artifact-store log skip`",
            labels=["partition", "digest"],
        )
        lost = GaugeMetricFamily(
            "artifact_store_partition_lost_record_offset",
            "Offset of an acknowledged record that the partition lacks; it takes no writes until the loss is accepted",
            labels=["partition", "digest"],
        )
        passed = {
            field: GaugeMetricFamily(name, text, labels=["partition"]) for field, (name, text) in _IRREGULAR.items()
        }
        for found in self._writer.status_here():
            label = str(found.partition)
            owned.add_metric([label], float(found.since is not None))
            waiting.add_metric([label], found.waiting)
            memory_only.add_metric([label], float(found.memory_only is not None))
            if found.bad_offset is not None:
                bad.add_metric([label, found.bad_digest or ""], found.bad_offset)
            if found.lost_offset is not None:
                lost.add_metric([label, found.lost_digest or ""], found.lost_offset)
            for name, family in passed.items():
                family.add_metric([label], getattr(found, name))
            if found.since is not None:
                since.add_metric([label], found.since / _MICROS)
            if found.takeover_seconds is not None:
                took.add_metric([label, found.restored_from or ""], found.takeover_seconds)
        yield from (owned, since, took, waiting, memory_only, bad, lost, *passed.values())
        if (skew := self._writer.clock_skew_seconds) is not None:
            yield GaugeMetricFamily(
                "artifact_store_clock_skew_seconds",
                "How far this machine's clock is ahead of the blob store's; negative when it is behind",
                value=skew,
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
            "artifact_store_pushed_back", "Requests that were told to come again later", value=counts.pushed_back
        )
