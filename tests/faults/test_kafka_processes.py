"""A gateway is killed or frozen at every step of a write: nothing acknowledged is lost, nothing is written twice."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.config import Settings
from services.log.kafka import KafkaLog, KafkaWriter
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.faults.kafka_child import child_gateway
from tests.faults.kafka_gateway import HOLD, STEPS
from tests.integration.conditions import until
from tests.integration.kafka_stage import PARTITIONS, create_in, gateway, kafka_settings, open_kafka_log

pytestmark = pytest.mark.services

QUICK = {"session.timeout.ms": 1_500, "heartbeat.interval.ms": 300}
"""A process that is gone is noticed soon."""


@pytest.fixture
def kafka(kafka_url: str, tmp_path: Path) -> Settings:
    return kafka_settings(kafka_url, tmp_path, kafka_options=QUICK)


@pytest.fixture
async def log(kafka: Settings) -> AsyncIterator[KafkaLog]:
    async with open_kafka_log(kafka) as found:
        yield found


async def partition_of_the_other(writer: KafkaWriter) -> int:
    """Wait until another process owns a partition and all are served; one of its partitions."""
    found: list[int] = []

    async def shared() -> bool:
        status = await writer.status()
        found[:] = [s.partition for s in status if s.owner is not None and s.owner.startswith("http")]
        return bool(found) and all(s.owner is not None for s in status) and await writer.ready() is None

    await until(shared, PATIENCE_SECONDS, "the other process got no partition")
    return found[0]


@pytest.mark.parametrize("step", STEPS)
async def test_a_killed_gateway_s_command_is_settled_once_by_the_one_that_takes_over(
    kafka: Settings, log: KafkaLog, step: str
) -> None:
    async with gateway(kafka, log) as staying, child_gateway(kafka, step) as child:
        partition = await partition_of_the_other(staying)
        before = [create_in(partition) for _ in range(20)]
        done = [(command, await staying.submit(command)) for command in before]
        held = create_in(partition, name=HOLD)
        answer = asyncio.ensure_future(staying.submit(held))
        await child.says("held")
        await child.kill()
        done.append((held, await answer))
        assert await staying.submit(held) == done[-1][1]
        assert await staying.submit(before[0]) == done[0][1]
        await ready(staying)
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == len(done)


@pytest.mark.parametrize("step", STEPS)
async def test_a_frozen_gateway_that_wakes_up_neither_writes_nor_disturbs_its_successor(
    kafka: Settings, log: KafkaLog, step: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING, "services.log.kafka")
    async with gateway(kafka, log) as staying, child_gateway(kafka, step) as child:
        partition = await partition_of_the_other(staying)
        held = create_in(partition, name=HOLD)
        answer = asyncio.ensure_future(staying.submit(held))
        await child.says("held")
        child.freeze()
        done = [(held, await answer)]
        await ready(staying)
        caplog.clear()
        child.thaw()
        stop = asyncio.Event()

        async def write_on() -> None:
            while not stop.is_set():
                command = create_in(partition)
                done.append((command, await staying.submit(command)))

        writing = asyncio.ensure_future(write_on())
        # The one that woke up has understood when it is a member again.
        await partition_of_the_other(staying)
        stop.set()
        await writing
        assert [record.message for record in caplog.records if "taken over again" in record.message] == []
        for p in range(PARTITIONS):
            command = create_in(p)
            done.append((command, await staying.submit(command)))
        assert await child.end() == 0
        await ready(staying)
        assert await staying.submit(held) == done[0][1]
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == len(done)


async def test_a_gateway_process_that_is_told_to_end_leaves_nothing_undone(kafka: Settings, log: KafkaLog) -> None:
    async with gateway(kafka, log) as staying, child_gateway(kafka) as child:
        await partition_of_the_other(staying)
        commands = [create_in(n % PARTITIONS) for n in range(300)]
        answers = [asyncio.ensure_future(staying.submit(command)) for command in commands]
        await asyncio.wait(answers, return_when=asyncio.FIRST_COMPLETED)
        assert await child.end() == 0
        done = list(zip(commands, await asyncio.gather(*answers), strict=True))
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == len(done)
