"""Wrong clocks on a real Kafka: nothing is recorded with one, and a partition with a wrong time can be mended."""

from __future__ import annotations

import asyncio
import json
import re
import time
from dataclasses import dataclass
from datetime import datetime

import pytest
from click.testing import CliRunner
from confluent_kafka import Consumer, TopicPartition

from artifact_store.errors import ConfigurationError, PushBackError, UnavailableError
from services.cli import main
from services.config import Settings
from services.log.kafka import KafkaLog, KafkaWriter
from services.runtime.clock import StoreClock, system_clock
from services.wiring import open_blobs, open_log, parts
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import ready, settled
from tests.integration.conditions import until
from tests.integration.kafka_stage import create_in, gateway, lone_writer, open_kafka_log, owned

pytestmark = pytest.mark.services

HOUR = 3_600 * 1_000_000


@dataclass
class Clock:
    """A machine's clock that is wrong by so many µs."""

    wrong: int = 0

    def __call__(self) -> int:
        return system_clock() + self.wrong


@pytest.fixture(autouse=True)
def looked_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.log.kafka.writer._GUARD_SECONDS", 0.2)
    monkeypatch.setattr("services.log.sequencer.queue.REFUSE_SECONDS", 0.2)


async def allow_times(log: KafkaLog, ahead_ms: int) -> None:
    """As an operator who sets how far ahead the time of an event may be."""
    settings = {"message.timestamp.after.max.ms": str(ahead_ms)}
    await asyncio.to_thread(log.cluster.set_on_topic, settings)

    async def in_effect() -> bool:
        return (await asyncio.to_thread(log.cluster.topic_settings)).items() >= settings.items()

    await until(in_effect, 30, "the setting does not take effect")


async def held(writer: KafkaWriter, partition: int) -> str:
    """Wait until the writer refuses everything; what callers are told."""
    async with asyncio.timeout(60):
        while True:
            try:
                await writer.submit(create_in(partition))
            except PushBackError as error:
                return error.detail
            except UnavailableError:
                continue


async def test_a_clock_a_day_ahead_records_nothing_and_goes_on_once_it_is_set(kafka: Settings, log: KafkaLog) -> None:
    clock, made, late = Clock(), create_in(0), create_in(0)
    async with lone_writer(kafka, log, clock=clock) as writer:
        await ready(writer)
        done = [(made, await writer.submit(made))]
        clock.wrong = 25 * HOUR
        with pytest.raises((UnavailableError, PushBackError), match="clock is further ahead of a broker's"):
            await writer.submit(late)
        clock.wrong = 0
        done.append((late, await settled(writer, late)))
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert max(event.created_at for event in events) < system_clock() + HOUR


@pytest.mark.parametrize("wrong", [25 * HOUR, -25 * HOUR])
async def test_a_clock_that_differs_from_the_store_s_records_nothing(
    kafka: Settings, log: KafkaLog, wrong: int
) -> None:
    clock = Clock(wrong)
    store = Store(clock)
    async with lone_writer(kafka, log, clock=clock, times=store) as writer:
        said = await held(writer, 0)
        assert "the blob store's: set the one that is wrong" in said
        assert said in (await writer.ready() or "")
        assert abs((writer.clock_skew_seconds or 0) - wrong / 1e6) < 60
        clock.wrong = 0
        await ready(writer)
        made = create_in(0)
        done = [(made, await settled(writer, made))]
    assert_recorded_once(await read_valid(log), done)


async def test_a_gateway_whose_clock_is_wrong_leaves_its_partitions_to_one_whose_is_right(
    kafka: Settings, log: KafkaLog
) -> None:
    clock = Clock()
    async with gateway(kafka, log, clock=clock, times=Store(clock)) as wrong:
        await ready(wrong)
        async with open_kafka_log(kafka) as second, gateway(kafka, second) as right:
            clock.wrong = 25 * HOUR

            async def owns_all() -> bool:
                return await owned(right) == {0, 1, 2}

            await until(owns_all, 60, "the gateway with the wrong clock keeps partitions")
            made = create_in(1)
            done = [(made, await settled(wrong, made))]
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert max(event.created_at for event in events) < system_clock() + HOUR


async def test_a_partition_with_a_future_time_is_written_to_once_an_operator_says_so(
    kafka: Settings, log: KafkaLog
) -> None:
    clock, made = Clock(), create_in(1)
    async with lone_writer(kafka, log, clock=clock) as writer:
        await ready(writer)
        await allow_times(log, 2**63 - 1)  # as earlier releases made it
        clock.wrong = 25 * HOUR
        done = [(made, await settled(writer, made))]
    marked = (await read_valid(log))[0].created_at
    await allow_times(log, 3_600_000)
    async with lone_writer(kafka, log) as writer:
        said = await held(writer, 1)
        assert "25 h ahead of this machine's clock" in said
        assert [status.trouble for status in await writer.status()][1] == said
        for partition in (0, 2):
            other = create_in(partition)
            done.append((other, await settled(writer, other)))
        raised, lowered = re.findall(r"--add-config message\.timestamp\.after\.max\.ms=(\d+)`", said)
        await allow_times(log, int(raised))
        await ready(writer)
        late = create_in(1)
        done.append((late, await settled(writer, late)))
        async with open_kafka_log(kafka) as starting:
            await starting.check()
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert [e.created_at for e in events if log.partition_of(e.package_id) == 1] == [marked, marked]
    assert lowered == "3600000"


async def test_a_clock_far_behind_the_partition_s_last_event_records_nothing(kafka: Settings, log: KafkaLog) -> None:
    clock = Clock()
    async with lone_writer(kafka, log, clock=clock) as writer:
        await ready(writer)
        await writer.submit(create_in(0))
        clock.wrong = -24 * HOUR
        assert "24 h ahead of this machine's clock" in await held(writer, 0)
        clock.wrong = 0
        await settled(writer, create_in(0))
    assert len(await read_valid(log)) == 2


async def test_times_that_may_lie_far_ahead_are_refused_at_the_start_and_bounded_by_migrate(
    kafka: Settings, log: KafkaLog
) -> None:
    await log.check()
    await allow_times(log, 2**63 - 1)
    await log.check()  # a process that runs goes on
    starting = KafkaLog(kafka)
    with pytest.raises(ConfigurationError, match="no partition needs it"):
        await starting.check()
    await starting.migrate()
    await starting.check()
    await starting.close()
    assert log.cluster.topic_settings()["message.timestamp.after.max.ms"] == "3600000"


async def test_a_gateway_shows_that_its_clock_is_wrong_and_records_nothing(real_settings: Settings) -> None:
    clock = Clock(25 * HOUR)
    for part in (open_log(real_settings), open_blobs(real_settings)):
        await part.migrate()
        await part.close()
    async with parts(real_settings, clock=clock) as opened:
        with pytest.raises(PushBackError, match="25 h ahead of the blob store's"):
            await opened.registry.create("run", "lab", "sample", "report", "ada", {})
        assert "25 h ahead of the blob store's" in (await opened.writer.ready() or "")
        assert abs((opened.metrics.get_sample_value("artifact_store_clock_skew_seconds") or 0) - 25 * 3600) < 60
        clock.wrong = 0
        await ready(opened.writer)
        await opened.registry.create("run", "lab", "sample", "report", "ada", {})
        assert opened.metrics.get_sample_value("artifact_store_clock_skew_seconds") == 0
        assert len(await read_valid(opened.log)) == 1


def test_doctor_says_that_the_clock_is_wrong(real_settings: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
    environment = real_settings.environment()
    assert CliRunner().invoke(main, ["migrate"], env=environment).exit_code == 0
    right = time.time_ns
    monkeypatch.setattr("time.time_ns", lambda: right() + 25 * HOUR * 1000)
    done = CliRunner().invoke(main, ["doctor", "--json"], env=environment)
    causes = {finding["part"]: finding["cause"] for finding in json.loads(done.stdout)["findings"]}
    assert causes["blobs"].startswith(
        "this machine's clock is 25 h ahead of the blob store's: set the one that is wrong"
    )
    assert done.exit_code == 1


class Store:
    """A store whose clock is right."""

    def __init__(self, machine: Clock) -> None:
        self.clock = StoreClock(machine)

    async def now(self) -> datetime:
        """Answer at once."""
        self.clock.heard(system_clock() // 1_000_000, time.monotonic())
        return self.clock.now()


async def test_a_take_over_leaves_no_record_behind_that_is_much_older_than_the_events(
    kafka: Settings, log: KafkaLog
) -> None:
    """Kafka would begin a new segment right after it, and delete it first if somebody set a retention."""
    async with lone_writer(kafka, log) as writer:
        await settled(writer, create_in(0))
    options = {"group.id": "no group", "isolation.level": "read_uncommitted", "enable.auto.commit": False}
    consumer = Consumer({"bootstrap.servers": log.kafka.bootstrap, **options})
    try:
        consumer.assign([TopicPartition(log.kafka.topic, 0, 0)])
        first = await asyncio.to_thread(consumer.consume, 1, 30)
    finally:
        consumer.close()
    (barrier,) = first
    _, written_ms = barrier.timestamp()
    assert (barrier.offset(), barrier.key(), barrier.value()) == (0, None, None)
    assert 23 * HOUR < system_clock() - written_ms * 1_000 < 25 * HOUR
