"""The guard of running writers: what stops them, what lets them go on, and what neither does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from services.config import Settings
from services.errors import ConfigurationError, PushBackError, UnavailableError
from services.log.kafka import writer as writer_module
from services.log.kafka.cluster import Topic
from services.log.kafka.context import Counts
from services.log.kafka.guard import Guard, HeldError
from services.log.kafka.settings import KafkaSettings
from services.log.kafka.writer import PartitionWriter
from tests.integration.kafka_stage import create_in

SOUND = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
    "min.insync.replicas": "2",
    "max.message.bytes": "2097152",
}


class Cluster:
    """A cluster with one topic of three partitions, or none that answers."""

    def __init__(self) -> None:
        self.settings = dict(SOUND)
        self.replicas = 3
        self.begins = {0: 0, 1: 0, 2: 0}
        self.failure: Exception | None = None
        self.questions: list[str] = []

    def topic(self) -> Topic:
        self._answer("topic")
        return Topic(UUID(int=1), 3, self.replicas)

    def topic_settings(self) -> dict[str, str]:
        self._answer("settings")
        return self.settings

    def earliest(self, _partitions: Iterable[int]) -> dict[int, int]:
        self._answer("earliest")
        return self.begins

    def _answer(self, question: str) -> None:
        self.questions.append(question)
        if self.failure is not None:
            raise self.failure


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def guard(cluster: Cluster, tmp_path: Path) -> Guard:
    kafka = KafkaSettings.of(Settings(log_url="kafka://broker:9092/x", kafka_partitions=3, state_dir=tmp_path))
    return Guard(kafka, cast("Any", cluster))


@pytest.mark.parametrize(
    ("name", "value", "mended"),
    [
        ("retention.ms", "604800000", "retention.ms=-1"),
        ("retention.bytes", "1", "retention.bytes=-1"),
        ("cleanup.policy", "compact", "cleanup.policy=delete"),
        ("min.insync.replicas", "1", "min.insync.replicas=2"),
        ("unclean.leader.election.enable", "true", "unclean.leader.election.enable=false"),
    ],
)
def test_a_setting_that_changes_holds_everything_until_it_is_mended(
    cluster: Cluster, guard: Guard, name: str, value: str, mended: str
) -> None:
    guard.look()
    guard.require()
    cluster.settings[name] = value
    guard.look()
    with pytest.raises(HeldError) as held:
        guard.require()
    assert f"{name}={value}" in held.value.detail
    assert f"--add-config {mended}`" in held.value.detail
    cluster.settings[name] = SOUND[name]
    guard.look()
    guard.require()


def test_fewer_replicas_and_a_beginning_that_is_gone_hold_everything(cluster: Cluster, guard: Guard) -> None:
    cluster.replicas = 2
    cluster.begins[1] = 7
    guard.look()
    with pytest.raises(HeldError) as held:
        guard.require()
    assert "kafka-reassign-partitions.sh" in held.value.detail
    assert "partitions 1 do not begin at offset 0" in held.value.detail
    assert guard.trouble == held.value.detail


@pytest.mark.parametrize(
    "failure", [UnavailableError("no answer"), ConfigurationError("no right to describe"), ValueError("no number")]
)
def test_a_cluster_that_does_not_answer_changes_nothing(cluster: Cluster, guard: Guard, failure: Exception) -> None:
    cluster.failure = failure
    guard.look()
    guard.require()
    cluster.failure, cluster.settings["retention.ms"] = None, "1"
    guard.look()
    cluster.failure = failure
    guard.look()
    with pytest.raises(HeldError):
        guard.require()


def test_looking_costs_the_same_for_any_number_of_partitions_and_requiring_nothing(
    cluster: Cluster, guard: Guard
) -> None:
    guard.look()
    for _ in range(1000):
        guard.require()
    assert cluster.questions == ["topic", "settings", "earliest"]


async def test_a_writer_that_is_held_tells_everyone_and_takes_nothing_over(
    cluster: Cluster, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_over(*_: object, **__: object) -> None:
        raise AssertionError("it took the partition over")

    monkeypatch.setattr(writer_module, "Tenure", take_over)
    cluster.settings["retention.ms"] = "1"
    guard.look()
    counts = Counts()
    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=counts, guard=guard)
    writer = PartitionWriter(0, cast("Any", context))
    writer.start()
    answers = [writer.submit(create_in(0)) for _ in range(3)]
    async with asyncio.timeout(30):
        told = await asyncio.gather(*answers, return_exceptions=True)
    assert all(isinstance(error, PushBackError) and "retention.ms=1" in error.detail for error in told)
    assert "retention.ms=1" in (writer.trouble or "")
    writer.stop()
    assert await asyncio.to_thread(writer.join, 30)
    assert (counts.failed_tenures, counts.pushed_back) == (0, 3)
