"""The writers of a process: which are in its table, whatever begins or ends at the same time."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from unittest.mock import AsyncMock

import pytest
from prometheus_client.samples import Sample

from artifact_store.errors import ConflictError, PushBackError
from services.core.access import EVERYTHING
from services.core.decide import IngestCheck, Limits
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka import writer as writers
from services.log.kafka.connection import READS_PRINCIPALS
from services.log.kafka.writer_metrics import WriterCollector
from services.log.port import PartitionStatus
from services.log.sequencer.queue import Counts
from tests.commands import create
from tests.contract.log_stage import no_manifest
from tests.integration.kafka_stage import kafka_settings


class Writer:
    """A partition's writer that never ends in time."""

    def __init__(self, partition: int, _context: object = None) -> None:
        self.partition = partition
        self.stopped = self.disowned = False
        self.leave_to_others: str | None = None
        self.waited: list[float] = []

    def start(self) -> None:
        pass

    def stop(self) -> None:
        self.stopped = True

    def join(self, seconds: float) -> bool:
        self.waited.append(seconds)
        time.sleep(min(seconds, 0.02))
        return False


@pytest.fixture
async def process(tmp_path: Path) -> AsyncIterator[KafkaWriter]:
    """One that has reached nothing yet."""
    settings = kafka_settings("kafka://127.0.0.1:1/none", tmp_path)
    log = KafkaLog(settings)
    made = KafkaWriter(settings, log, limits=Limits(), put_manifest=no_manifest)
    yield made
    made._writers.clear()
    await made.close()
    await log.close()


def table(process: KafkaWriter) -> dict[int, Any]:
    return cast("dict[int, Any]", process._writers)


async def test_a_writer_whose_partition_is_another_s_is_let_go_and_the_group_joined_again(
    process: KafkaWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    rejoined: list[bool] = []
    monkeypatch.setattr(process._group, "rejoin", lambda: rejoined.append(True))
    own, other = Writer(0), Writer(1)
    table(process).update({0: own, 1: other})
    assert process._look_after_writers() is None
    assert (table(process), rejoined) == ({0: own, 1: other}, [])
    other.disowned = True
    assert process._look_after_writers() is None
    assert (table(process), rejoined) == ({0: own}, [True])


async def test_no_command_in_another_s_name_is_taken_while_a_process_cannot_read_its_events(
    process: KafkaWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The release before would take such an event for a foreign record, and stop."""
    answers = AsyncMock()
    monkeypatch.setattr(process, "_partitions", 1)
    monkeypatch.setattr(process._router, "answer", answers)
    old, asked = ["http://old:1/v2"], list[int]()

    def require_readers(interface: int) -> None:
        asked.append(interface)
        if old:
            raise ConflictError(f"the gateway {old[0]} is of a release that cannot read them")

    monkeypatch.setattr(process._group, "require_readers", require_readers)
    made = create()
    delegated = replace(made, principal="ci:bot")
    with pytest.raises(PushBackError, match="http://old:1/v2"):
        await process.submit(delegated)
    with pytest.raises(PushBackError, match="http://old:1/v2"):
        await process.check_ingest(IngestCheck(made.package_id, ["a"], None, EVERYTHING, "ci:bot"))
    assert (answers.await_count, asked) == (0, [READS_PRINCIPALS]), "one answer serves for a while"
    await process.submit(made)
    await process.check_ingest(IngestCheck(made.package_id, ["a"], None))
    assert (answers.await_count, asked) == (2, [READS_PRINCIPALS]), "others are never held up"
    old.clear()
    monkeypatch.setattr(writers, "_READERS_SECONDS", 0.0)
    await process.submit(delegated)
    await process.check_ingest(IngestCheck(made.package_id, ["a"], None, EVERYTHING, "ci:bot"))
    assert answers.await_count == 4


async def test_what_a_writer_complains_of_is_heard_once(process: KafkaWriter) -> None:
    table(process).update({0: Writer(0), 1: Writer(1)})
    table(process)[1].leave_to_others = "partition 1 cannot be written to"
    assert process._look_after_writers() == "partition 1 cannot be written to"
    assert process._look_after_writers() is None


async def test_a_writer_without_a_thread_is_not_in_the_table(
    process: KafkaWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoRoom(Writer):
        def start(self) -> None:
            raise RuntimeError("can't start new thread")

    monkeypatch.setattr(writers, "PartitionWriter", NoRoom)
    process._context = cast("Any", SimpleNamespace())
    with pytest.raises(RuntimeError):
        process._assigned(0)
    assert table(process) == {}
    monkeypatch.setattr(writers, "PartitionWriter", Writer)
    process._assigned(0)
    assert list(table(process)) == [0]


async def test_writers_that_hang_are_waited_for_together(process: KafkaWriter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writers, "_HAND_OVER_SECONDS", 0.05)
    hanging = [Writer(partition) for partition in range(6)]
    table(process).update(enumerate(hanging))
    process._close_threads()
    assert all(writer.stopped for writer in hanging)
    assert sum(min(writer.waited[0], 0.02) for writer in hanging) <= 0.05 + 0.02


def samples_of(*statuses: PartitionStatus, drifted: bool = False) -> list[Sample]:
    """What the metrics of a process with these partitions of six show."""
    writer = SimpleNamespace(
        status_here=lambda: statuses,
        partitions=6,
        drifted=drifted,
        clock_skew_seconds=None,
        state_free_bytes=None,
        counts=Counts(appended=7),
    )
    return [sample for metric in WriterCollector(cast("Any", writer)).collect() for sample in metric.samples]


def test_metrics_have_every_partition_also_while_this_process_writes_to_none() -> None:
    """An alert on a sum of 0 does not see a partition that is absent."""
    owned = "artifact_store_partition_owned"
    for statuses, wanted in (
        ([], [0.0] * 6),
        ([PartitionStatus(1, "this process", since=1), PartitionStatus(2, "this process")], [0.0, 1.0, *[0.0] * 4]),
    ):
        samples = samples_of(*statuses)
        shown = {s.labels["partition"]: s.value for s in samples if s.name == owned}
        assert [shown[str(partition)] for partition in range(6)] == wanted
        assert [s.value for s in samples if s.name == "artifact_store_partitions"] == [6]
    assert [s.value for s in samples_of() if s.name == "artifact_store_events_appended_total"] == [7]


@pytest.mark.parametrize("drifted", [False, True])
def test_metrics_say_whether_the_settings_of_the_topic_drifted(drifted: bool) -> None:
    shown = {s.name: s.value for s in samples_of(drifted=drifted)}
    assert shown["artifact_store_log_settings_drifted"] == drifted


def test_metrics_show_what_a_partition_passes_over_and_what_stops_it() -> None:
    status = PartitionStatus(
        2, "this process", skipped=1, repeated=3, quarantined=4, bad_offset=5, bad_digest="ab", lost_offset=6
    )
    samples = samples_of(status)
    shown = {s.name.removeprefix("artifact_store_partition_"): s for s in samples if s.labels.get("partition") == "2"}
    wanted = {"skipped": 1, "repeated": 3, "quarantined": 4, "bad_record_offset": 5, "lost_record_offset": 6}
    assert {name: shown[name].value for name in wanted} == wanted
    assert shown["bad_record_offset"].labels["digest"] == "ab"
