"""The guard of running writers: what stops them, what lets them continue, and what does neither."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from artifact_store.errors import ConfigurationError, PushBackError, UnavailableError
from services.config import Settings
from services.log.kafka import topic
from services.log.kafka.cluster import Topic
from services.log.kafka.connection import KafkaSettings
from services.log.kafka.driver import KafkaDriver, PartitionLease
from services.log.kafka.topic import Guard
from services.log.port import HeldError
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts
from services.runtime.clock import StoreClock
from tests.integration.kafka_stage import create_in

SOUND = {
    "cleanup.policy": "delete",
    "retention.ms": "-1",
    "retention.bytes": "-1",
    "unclean.leader.election.enable": "false",
    "message.timestamp.type": "CreateTime",
    "min.insync.replicas": "2",
    "max.message.bytes": "2097152",
    "message.timestamp.after.max.ms": "3600000",
}
SECOND = 1_000_000
NOON = 1_800_000_000 * SECOND
DAY = 86_400 * SECOND
UNBOUNDED = str(2**63 - 1)


class Cluster:
    """A cluster with one topic of three partitions, or none that answers."""

    registry = None

    def __init__(self) -> None:
        self.settings = dict(SOUND)
        self.replicas = 3
        self.begins = {0: 0, 1: 0, 2: 0}
        self.times: dict[int, int] = {}
        self.set_settings: Mapping[str, str] | None = None
        self.alter_failure: Exception | None = None
        self.failure: Exception | None = None
        self.leader_failure: Exception | None = None
        self.questions: list[str] = []

    def topic(self) -> Topic:
        self._answer("topic")
        return Topic(UUID(int=1), 3, self.replicas)

    def topic_settings(self) -> dict[str, str]:
        self._answer("settings")
        return self.settings

    def framing(self) -> None:
        """Single-object encoding."""

    def earliest(self, _partitions: Iterable[int]) -> dict[int, int]:
        self._answer("earliest")
        if self.leader_failure is not None:
            raise self.leader_failure
        return self.begins

    def latest_times(self, _partitions: Iterable[int]) -> dict[int, int]:
        self._answer("times")
        return self.times

    def create_topic(self, _settings: Mapping[str, str]) -> bool:
        return False

    def set_on_topic(self, settings: Mapping[str, str]) -> None:
        if self.alter_failure is not None:
            raise self.alter_failure
        self.settings.update(settings)
        self.set_settings = settings

    def _answer(self, question: str) -> None:
        self.questions.append(question)
        if self.failure is not None:
            raise self.failure


@dataclass
class Machine:
    """A machine's clocks."""

    own: int = NOON
    ticks: float = 0.0

    def clock(self) -> int:
        return self.own


@pytest.fixture
def machine() -> Machine:
    return Machine()


@pytest.fixture
def store(machine: Machine) -> StoreClock:
    """The clock of a store that has answered once, when both said noon."""
    made = StoreClock(machine.clock, lambda: machine.ticks)
    made.heard(NOON // SECOND, machine.ticks)
    return made


@pytest.fixture
def cluster() -> Cluster:
    return Cluster()


@pytest.fixture
def kafka(tmp_path: Path) -> KafkaSettings:
    return KafkaSettings.of(Settings(log_url="kafka://broker:9092/x", kafka_partitions=3, state_dir=tmp_path))


@pytest.fixture
def guard(cluster: Cluster, kafka: KafkaSettings, machine: Machine, store: StoreClock) -> Guard:
    return Guard(kafka, cast("Any", cluster), machine.clock, store)


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
    guard.require(0, NOON)
    cluster.settings[name] = value
    guard.look()
    with pytest.raises(HeldError) as held:
        guard.require(0, NOON)
    assert f"{name}={value}" in held.value.detail
    assert f"--add-config {mended}`" in held.value.detail
    cluster.settings[name] = SOUND[name]
    guard.look()
    guard.require(0, NOON)


def test_fewer_replicas_and_a_beginning_that_is_gone_hold_everything(cluster: Cluster, guard: Guard) -> None:
    cluster.replicas = 2
    cluster.begins[1] = 7
    guard.look()
    with pytest.raises(HeldError) as held:
        guard.require(0, NOON)
    assert "kafka-reassign-partitions.sh" in held.value.detail
    assert "partitions 1 do not begin at offset 0" in held.value.detail
    assert guard.trouble == held.value.detail


@pytest.mark.parametrize(
    "failure", [UnavailableError("no answer"), ConfigurationError("no right to describe"), ValueError("no number")]
)
def test_a_cluster_that_does_not_answer_changes_nothing(cluster: Cluster, guard: Guard, failure: Exception) -> None:
    cluster.failure = failure
    guard.look()
    guard.require(0, NOON)
    cluster.failure, cluster.settings["retention.ms"] = None, "1"
    guard.look()
    cluster.failure = failure
    guard.look()
    with pytest.raises(HeldError):
        guard.require(0, NOON)


def test_a_leader_that_is_out_of_reach_hides_neither_a_changed_setting_nor_a_known_loss(
    cluster: Cluster, guard: Guard
) -> None:
    cluster.begins[1] = 7
    guard.look()
    cluster.leader_failure = UnavailableError("no answer")
    cluster.settings["retention.ms"] = "1"
    guard.look()
    with pytest.raises(HeldError) as held:
        guard.require(0, NOON)
    assert "retention.ms=1" in held.value.detail
    assert "partitions 1 do not begin at offset 0" in held.value.detail
    cluster.settings["retention.ms"] = SOUND["retention.ms"]
    guard.look()
    assert "partitions 1 do not begin" in (guard.trouble or "")
    assert "retention.ms" not in (guard.trouble or "")


def test_looking_costs_the_same_for_any_number_of_partitions_and_requiring_nothing(
    cluster: Cluster, guard: Guard
) -> None:
    guard.look()
    for _ in range(1000):
        guard.require(0, NOON)
    assert cluster.questions == ["settings", "topic", "earliest"]


def driver_of(guard: Guard) -> KafkaDriver:
    """A driver that asks nobody but the guard."""
    nobody = cast("Any", None)
    return KafkaDriver(guard._kafka, nobody, UUID(int=1), nobody, nobody, guard)


async def test_a_writer_that_is_held_tells_everyone_and_takes_nothing_over(
    cluster: Cluster, guard: Guard, monkeypatch: pytest.MonkeyPatch
) -> None:
    def take_over(*_: object, **__: object) -> None:
        raise AssertionError("it took the partition over")

    monkeypatch.setattr(PartitionLease, "take_over", take_over)
    cluster.settings["retention.ms"] = "1"
    guard.look()
    counts = Counts()
    context = SimpleNamespace(
        loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=counts, driver=driver_of(guard)
    )
    writer = PartitionWriter(0, cast("Any", context))
    writer.start()
    answers = [writer.submit(create_in(0)) for _ in range(3)]
    async with asyncio.timeout(30):
        told = await asyncio.gather(*answers, return_exceptions=True)
    assert all(isinstance(error, PushBackError) and "retention.ms=1" in error.detail for error in told)
    assert "retention.ms=1" in (writer.trouble or "")
    writer.stop()
    assert await asyncio.to_thread(writer.join, 30)
    assert (counts.failed_takeovers, counts.pushed_back) == (0, 3)


@pytest.mark.parametrize(("days", "differs"), [(1, "24 h ahead of"), (-1, "24 h behind")])
def test_a_clock_that_differs_from_the_store_s_holds_everything_until_it_is_set(
    guard: Guard, machine: Machine, days: int, differs: str
) -> None:
    guard.require(0, NOON - DAY)
    machine.own += days * DAY
    with pytest.raises(HeldError, match=f"this machine's clock is {differs} the blob store's: set the one") as held:
        guard.require(0, NOON - DAY)
    assert held.value.own_clock, "other gateways may be right"
    assert guard.trouble == held.value.detail
    assert abs((guard.skew_seconds or 0) - days * 86_400) <= 1
    machine.own -= days * DAY
    guard.require(0, NOON - DAY)


def test_a_store_that_never_answered_is_no_reason_to_stop(
    cluster: Cluster, kafka: KafkaSettings, machine: Machine
) -> None:
    for silent in (None, StoreClock(machine.clock, lambda: machine.ticks)):
        guard = Guard(kafka, cast("Any", cluster), machine.clock, silent)
        guard.require(0, NOON)
        assert guard.skew_seconds is None


def test_a_partition_whose_last_time_is_far_ahead_is_held_alone_until_an_operator_lets_kafka_take_it(
    cluster: Cluster, guard: Guard
) -> None:
    guard.look()
    last = NOON + 25 * 3600 * SECOND
    guard.require(0, NOON + 299 * SECOND)
    with pytest.raises(HeldError) as held:
        guard.require(2, last)
    assert not held.value.own_clock
    said = held.value.detail
    assert f"partition 2 has the time {datetime.fromtimestamp(last // SECOND, UTC).isoformat()}, 25 h ahead" in said
    assert "--entity-name x.events --add-config message.timestamp.after.max.ms=97200000`" in said
    assert "then `kafka-configs.sh --bootstrap-server broker:9092 --alter" in said
    assert "message.timestamp.after.max.ms=3600000` ends the exception" in said
    assert guard.trouble is None, "others are written to"
    guard.require(1, NOON)
    cluster.settings["message.timestamp.after.max.ms"] = "97200000"
    guard.look()
    guard.require(2, last)
    cluster.settings["message.timestamp.after.max.ms"] = "3600000"
    guard.look()
    with pytest.raises(HeldError):
        guard.require(2, last)


def now_ms() -> int:
    return int(datetime.now(UTC).timestamp() * 1000)


@pytest.mark.parametrize("value", ["3600001", UNBOUNDED])
def test_times_that_may_lie_far_ahead_are_refused_at_the_start_unless_a_partition_needs_it(
    cluster: Cluster, kafka: KafkaSettings, value: str
) -> None:
    cluster.settings["message.timestamp.after.max.ms"] = value
    cluster.times = {0: now_ms()}
    with pytest.raises(ConfigurationError, match=r"no partition needs it: `kafka-configs.*max\.ms=3600000` mends"):
        topic.check(kafka, cast("Any", cluster))
    cluster.times[2] = now_ms() + 25 * 3_600_000
    topic.check(kafka, cast("Any", cluster))


def test_migrate_bounds_times_that_an_earlier_release_left_unbounded(cluster: Cluster, kafka: KafkaSettings) -> None:
    cluster.settings["message.timestamp.after.max.ms"] = UNBOUNDED
    topic.migrate(kafka, cast("Any", cluster))
    assert cluster.set_settings == {"message.timestamp.after.max.ms": "3600000"}


def test_migrate_leaves_what_a_partition_with_a_future_time_needs(cluster: Cluster, kafka: KafkaSettings) -> None:
    cluster.settings["message.timestamp.after.max.ms"] = UNBOUNDED
    cluster.times = {1: now_ms() + 25 * 3_600_000}
    topic.migrate(kafka, cast("Any", cluster))
    assert cluster.set_settings is None


def test_migrate_without_the_right_to_change_the_topic_says_what_an_operator_has_to_do(
    cluster: Cluster, kafka: KafkaSettings
) -> None:
    cluster.settings["message.timestamp.after.max.ms"] = UNBOUNDED
    cluster.alter_failure = ConfigurationError("no right to alter")
    with pytest.raises(ConfigurationError, match="no partition needs it: `kafka-configs"):
        topic.migrate(kafka, cast("Any", cluster))


async def test_a_writer_whose_clock_is_wrong_leaves_its_partition_to_others(
    guard: Guard, machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine.own += DAY
    context = SimpleNamespace(
        loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts(), driver=driver_of(guard)
    )
    writer = PartitionWriter(0, cast("Any", context))
    writer.start()
    async with asyncio.timeout(30):
        with pytest.raises(PushBackError, match="24 h ahead"):
            await writer.submit(create_in(0))
    assert "24 h ahead of the blob store's" in (writer.leave_to_others or "")
    writer.stop()
    assert await asyncio.to_thread(writer.join, 30)


def test_running_gateways_say_once_that_no_partition_needs_a_future_time_any_more(
    cluster: Cluster, guard: Guard, caplog: pytest.LogCaptureFixture
) -> None:
    cluster.settings["message.timestamp.after.max.ms"] = "97200000"
    cluster.times = {2: now_ms() + 25 * 3_600_000}
    guard.look()
    assert caplog.text == ""
    cluster.times = {2: now_ms()}
    for _ in range(3):
        guard.look()
    guard.require(0, NOON)
    assert caplog.text.count("no partition needs it: `kafka-configs.sh") == 1
