"""The topic of the Kafka log: how it is created, and what the start-up guard refuses, with the mending command."""

from __future__ import annotations

import asyncio
import json
import shutil
import threading
from dataclasses import replace
from itertools import cycle
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import confluent_kafka.admin
import pytest
from click.testing import CliRunner
from confluent_kafka import Producer, TopicPartition

from artifact_store.errors import (
    ConfigurationError,
    ConflictError,
    CorruptError,
    LogIdentityError,
    PushBackError,
    UnavailableError,
)
from artifact_store.position import Position
from services.cli import main
from services.config import Settings
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka import tail as watch
from services.log.kafka.cluster import Topic
from services.log.kafka.driver import KafkaDriver
from services.log.records import SkipRecord
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import Projection, ready, settled
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    create_in,
    kafka_settings,
    lone_writer,
    make_anew,
    open_kafka_log,
    operate,
    set_on_topic,
)
from tests.integration.processes import output_of
from tests.services.process import free_ports

pytestmark = pytest.mark.services

# The package's types do not mark what its documentation names as exported.
_admin: Any = confluent_kafka.admin


async def test_a_topic_that_migrate_made_passes_the_guard_and_migrate_may_be_repeated(log: KafkaLog) -> None:
    await log.migrate()
    await log.check()
    found = log.cluster.topic_settings()
    assert (found["retention.ms"], found["retention.bytes"], found["cleanup.policy"]) == ("-1", "-1", "delete")
    assert found["unclean.leader.election.enable"] == "false"
    assert found["message.timestamp.type"] == "CreateTime"


async def test_a_topic_that_is_missing_is_named_with_the_command_that_makes_it(kafka: Settings) -> None:
    log = KafkaLog(kafka)
    try:
        with pytest.raises(ConfigurationError, match=rf"topic {log.kafka.topic}\): run `artifact-store migrate`"):
            await log.check()
    finally:
        await log.close()


@pytest.mark.parametrize(
    ("name", "value", "mended"),
    [
        ("retention.ms", "604800000", "retention.ms=-1"),
        ("retention.bytes", "1000000", "retention.bytes=-1"),
        ("cleanup.policy", "compact", "cleanup.policy=delete"),
        ("cleanup.policy", "compact,delete", "cleanup.policy=delete"),
        ("unclean.leader.election.enable", "true", "unclean.leader.election.enable=false"),
        ("message.timestamp.type", "LogAppendTime", "message.timestamp.type=CreateTime"),
        ("max.message.bytes", "1000", "max.message.bytes=2097152"),
    ],
)
async def test_a_setting_that_could_lose_or_refuse_events_is_refused_with_the_command_that_mends_it(
    log: KafkaLog, name: str, value: str, mended: str
) -> None:
    await asyncio.to_thread(set_on_topic, log, **{name: value})
    with pytest.raises(ConfigurationError) as refused:
        await log.check()
    assert f"{name}={value}" in refused.value.detail
    assert "kafka-configs.sh" in refused.value.detail
    assert f"--add-config {mended}" in refused.value.detail
    with pytest.raises(ConfigurationError):
        await log.migrate()


async def test_a_writer_does_not_start_on_a_topic_that_the_guard_refuses(kafka: Settings, log: KafkaLog) -> None:
    await asyncio.to_thread(set_on_topic, log, **{"retention.ms": "1000"})
    with pytest.raises(ConfigurationError, match="retention"):
        async with lone_writer(kafka, log):
            pytest.fail("it started")


async def test_doctor_asks_gateways_and_looks_at_views_although_the_topic_has_a_wrong_setting(
    real_settings: Settings,
) -> None:
    missing = await asyncio.to_thread(_doctor, real_settings)
    assert "artifact-store migrate" in missing["log"]["cause"]
    assert missing.keys().isdisjoint({"partitions", "projections"})  # each would say just that
    await asyncio.to_thread(output_of, real_settings, "migrate")
    async with open_kafka_log(real_settings) as log:
        await asyncio.to_thread(set_on_topic, log, **{"retention.ms": "86400000"})
    found = await asyncio.to_thread(_doctor, real_settings)
    assert "retention.ms=86400000" in found["log"]["cause"]
    assert found["partitions"]["cause"].startswith("partition 0 takes no writes: no process writes to it")
    assert (found["gateways"]["cause"], found["projections"]["ok"]) == ("0 processes", True)


def _doctor(settings: Settings) -> dict[str, Any]:
    """The findings, by part."""
    done = CliRunner().invoke(main, ["doctor", "--json"], env=settings.environment())
    return {finding["part"]: finding for finding in json.loads(done.stdout)["findings"]}


async def test_replication_below_the_settings_is_refused(kafka: Settings, log: KafkaLog) -> None:
    wanted = replace(kafka, kafka_replication_factor=3, kafka_min_insync_replicas=2)
    other = KafkaLog(wanted)
    try:
        with pytest.raises(ConfigurationError) as refused:
            await other.check()
    finally:
        await other.close()
    assert "kafka-reassign-partitions.sh" in refused.value.detail
    assert "min.insync.replicas=2" in refused.value.detail


async def test_more_replicas_in_sync_than_there_are_is_refused_before_anything_is_made(kafka: Settings) -> None:
    log = KafkaLog(replace(kafka, kafka_min_insync_replicas=2))
    try:
        with pytest.raises(ConfigurationError, match="MIN_INSYNC_REPLICAS"):
            await log.migrate()
        with pytest.raises(ConfigurationError, match="migrate"):
            await log.identity()
    finally:
        await log.close()


async def test_added_partitions_are_refused(log: KafkaLog) -> None:
    added = [_admin.NewPartitions(log.kafka.topic, 5)]
    await asyncio.to_thread(operate, log, lambda admin: admin.create_partitions(added))

    async def five() -> bool:
        return await asyncio.to_thread(lambda: log.cluster.topic().partitions == 5)

    await until(five, 30, "the topic keeps three partitions")
    with pytest.raises(ConfigurationError, match="5 partitions, the settings say 3"):
        await log.check()


async def test_a_log_whose_beginning_is_gone_is_refused_by_guard_reader_and_subscription(
    kafka: Settings, log: KafkaLog
) -> None:
    start = Position(await log.identity(), {})
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        for _ in range(3):
            await writer.submit(create_in(1))
    cut = [TopicPartition(log.kafka.topic, 1, 2)]
    await asyncio.to_thread(operate, log, lambda admin: admin.delete_records(cut))
    with pytest.raises(ConfigurationError, match="partitions 1 do not begin at offset 0"):
        await log.check()
    with pytest.raises(CorruptError):
        _ = [event async for event in log.read(start)]
    projection = Projection(log)
    subscription = await projection.subscribe()
    try:
        with pytest.raises(CorruptError, match="partition 1"):
            await projection.poll_until(subscription, lambda: False)
        with pytest.raises(CorruptError, match="partition 1"):
            await projection.poll_until(subscription, lambda: False)
    finally:
        await subscription.close()
    assert projection.records == []


async def test_a_topic_made_anew_has_another_identity_and_refuses_the_old_positions(
    kafka: Settings, log: KafkaLog
) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await writer.submit(create_in(0))
    before, end = await log.identity(), await log.end()
    await make_anew(log)
    assert await log.identity() != before
    with pytest.raises(LogIdentityError):
        _ = [event async for event in log.read(end)]
    shutil.rmtree(kafka.state_dir)  # what is there remembers the log before
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await writer.submit(create_in(0))
    assert len([event async for event in log.read()]) == 1


async def test_a_topic_that_is_made_anew_under_a_writer_is_not_written_to(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.log.kafka.writer._IDENTITY_SECONDS", 0.3)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await asyncio.gather(*(writer.submit(create_in(n % 3)) for n in range(30)))
        await make_anew(log)

        async def noticed() -> bool:
            return "created again" in (await writer.ready() or "")

        await until(noticed, 30, "the writer has not noticed that its topic is another one")
        for partition in range(3):
            with pytest.raises(UnavailableError, match="created again"):
                await writer.submit(create_in(partition))
    assert [event async for event in log.read()] == []


async def test_a_topic_that_grows_under_a_writer_is_not_written_to(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.log.kafka.writer._IDENTITY_SECONDS", 0.3)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        made = [create_in(n % 3) for n in range(30)]
        await asyncio.gather(*map(writer.submit, made))
        owners = [log.partition_of(command.package_id) for command in made]
        added = [_admin.NewPartitions(log.kafka.topic, 5)]
        await asyncio.to_thread(operate, log, lambda admin: admin.create_partitions(added))

        async def noticed() -> bool:
            return "now has 5 partitions instead of 3" in (await writer.ready() or "")

        await until(noticed, 30, "the writer has not noticed that its topic has grown")
        with pytest.raises(UnavailableError, match="now has 5 partitions"):
            await writer.submit(made[0])
        with pytest.raises(ConfigurationError, match="Restore it with its former number"):
            _ = [event async for event in log.read(package_id=made[0].package_id)]
        assert [log.partition_of(command.package_id) for command in made] == owners

        async def left() -> bool:
            return await asyncio.to_thread(log.cluster.members, log.kafka.writers_group) == []

        await until(left, 30, "it keeps its partitions, although others may be sound")


async def test_nothing_is_committed_while_the_topic_is_gone(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.log.kafka.writer._IDENTITY_SECONDS", 0.1)
    topic, gone = log.cluster.topic, threading.Event()

    def asked() -> Topic:
        if gone.is_set():
            raise ConfigurationError("Kafka has no such topic")
        return topic()

    monkeypatch.setattr("services.log.sequencer.queue.REFUSE_SECONDS", 0.1)
    async with lone_writer(kafka, log, submit_seconds=3.0) as writer:
        await ready(writer)
        await writer.submit(create_in(0))
        monkeypatch.setattr(log.cluster, "topic", asked)
        gone.set()
        context = writer._context
        assert context is not None
        doubt = cast("KafkaDriver", context.driver).doubt
        await until(lambda: _set(doubt), 30, "nobody doubts that the topic is there")
        late = create_in(0)
        with pytest.raises((UnavailableError, ConfigurationError)):
            await writer.submit(late)
        gone.clear()
        await until(lambda: _set(doubt, wanted=False), 30, "it is doubted for ever")
        await ready(writer)
        await settled(writer, late)
    assert len(await read_valid(log)) == 2


async def _set(flag: threading.Event, *, wanted: bool = True) -> bool:
    return flag.is_set() is wanted


@pytest.mark.parametrize("follow", [False, True])
async def test_a_topic_that_is_made_anew_while_it_is_read_is_noticed(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch, follow: bool
) -> None:
    monkeypatch.setattr(watch, "IDENTITY_SECONDS", 0.5)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await asyncio.gather(*(writer.submit(create_in(n % 3)) for n in range(30)))
    monkeypatch.setattr("services.log.kafka.log._BATCH_RECORDS", 5)
    reading = log.read(follow=follow)
    await anext(reading)
    await make_anew(log)
    with pytest.raises((LogIdentityError, CorruptError)):
        async with asyncio.timeout(30):
            _ = [event async for event in reading]


async def test_a_cluster_that_cannot_be_reached_is_unavailable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.log.kafka.cluster.ANSWER_SECONDS", 1.0)
    log = KafkaLog(kafka_settings(f"kafka://127.0.0.1:{free_ports(1)[0]}/nobody", tmp_path))
    try:
        with pytest.raises(UnavailableError):
            await log.check()
        with pytest.raises(UnavailableError):
            log.partition_of(create_in(0).package_id)
    finally:
        await log.close()


async def test_a_client_setting_that_does_not_exist_is_named_and_its_value_is_not_shown(kafka: Settings) -> None:
    log = KafkaLog(replace(kafka, kafka_options={"socket.no.such.option": "hidden-value"}))
    try:
        with pytest.raises(ConfigurationError) as refused:
            await log.check()
    finally:
        await log.close()
    assert "no.such.option" in refused.value.detail
    assert "hidden-value" not in refused.value.detail


async def test_a_record_that_is_no_event_stops_a_reader_which_names_its_place(log: KafkaLog) -> None:
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    producer.produce(log.kafka.topic, b"not an event", b"key", 2)
    assert await asyncio.to_thread(producer.flush, 30) == 0
    with pytest.raises(CorruptError, match="offset 0 of partition 2"):
        _ = [event async for event in log.read()]


@pytest.fixture
def guarded_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.log.kafka.writer._GUARD_SECONDS", 0.2)


async def refused(writer: KafkaWriter, log: KafkaLog, cause: str) -> str:
    """Wait until no partition acknowledges a command any more; what callers are told."""
    told: list[str] = []

    async def everywhere() -> bool:
        told.clear()
        for partition in range(3):
            try:
                await writer.submit(create_in(partition))
                return False
            except PushBackError as error:
                told.append(error.detail)
        return all(cause in text for text in told)

    await until(everywhere, 60, f"writers acknowledge although {cause}")
    return told[0]


@pytest.mark.usefixtures("guarded_often")
@pytest.mark.parametrize(
    ("name", "value", "sound"),
    [
        ("retention.ms", "604800000", "-1"),
        ("retention.bytes", "1000000000", "-1"),
        ("cleanup.policy", "compact", "delete"),
        ("unclean.leader.election.enable", "true", "false"),
    ],
)
async def test_writers_stop_on_a_topic_that_could_lose_events_and_go_on_once_it_is_mended(
    kafka: Settings, log: KafkaLog, name: str, value: str, sound: str
) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        made = [create_in(partition) for partition in range(3)]
        done = [(command, await writer.submit(command)) for command in made]
        await asyncio.to_thread(set_on_topic, log, **{name: value})
        cause = await refused(writer, log, f"{name}={value}")
        assert f"--add-config {name}={sound}" in cause
        assert cause in (await writer.ready() or "")
        with pytest.raises(ConflictError) as confirmed:  # at once, and not as an answer that asks for patience
            await writer.confirm_here(SkipRecord(0, 0, bytes(32), "ada", "", uuid4()))
        assert cause in confirmed.value.detail
        assert [status.trouble for status in await writer.status()] == [cause] * 3
        await asyncio.to_thread(set_on_topic, log, **{name: sound})
        await ready(writer)
        again = create_in(0)
        done.append((again, await settled(writer, again)))
    assert_recorded_once(await read_valid(log), done)


@pytest.mark.usefixtures("guarded_often")
async def test_writers_stop_when_the_log_s_beginning_goes_away_under_them(kafka: Settings, log: KafkaLog) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        for _ in range(3):
            await writer.submit(create_in(1))
        cut = [TopicPartition(log.kafka.topic, 1, 2)]
        await asyncio.to_thread(operate, log, lambda admin: admin.delete_records(cut))
        cause = await refused(writer, log, "partitions 1 do not begin at offset 0")
        assert "Restore the topic from a mirror or backup" in cause


@pytest.mark.usefixtures("guarded_often")
async def test_writers_go_on_while_the_topic_s_settings_cannot_be_asked_for(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    failures: list[Exception] = []
    errors = cycle([UnavailableError("no answer in time"), ConfigurationError("no right to describe")])

    def away() -> dict[str, str]:
        failures.append(next(errors))
        raise failures[-1]

    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        monkeypatch.setattr(log.cluster, "topic_settings", away)

        async def written_unasked() -> bool:
            await writer.submit(create_in(0))
            return len(failures) > 4

        await until(written_unasked, 30, "nobody asks for the topic's settings")
        assert await writer.ready() is None
