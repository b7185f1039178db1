"""The framing of a topic's values: chosen when the topic is created, and the same for all readers and writers."""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from typing import Any
from uuid import UUID

import fastavro
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from artifact_store.errors import BadRecordError, ConfigurationError, UnavailableError
from schemas.codec import encode
from services.cli.doctor import _framing as remark_of_doctor
from services.config import Settings
from services.log.kafka import KafkaLog
from services.log.kafka.cluster import CONFLUENT, FRAMING
from services.log.kafka.connection import partition_of
from services.log.kafka.topic import Guard
from services.runtime.clock import system_clock
from tests import commands
from tests.contract.log_stage import ready
from tests.integration.kafka_stage import PARTITIONS, create_in, lone_writer, open_kafka_log, set_on_topic
from tests.schema_registry import FakeRegistry, fake_registry
from tests.unit.schemas.test_golden import history

pytestmark = pytest.mark.services


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """A schema registry without any schema."""
    with fake_registry() as found:
        yield found


@pytest.fixture
def registered(kafka: Settings, registry: FakeRegistry) -> Settings:
    """Settings with that registry."""
    return replace(kafka, schema_registry_url=registry.url)


@pytest.fixture
async def framed(registered: Settings) -> AsyncIterator[KafkaLog]:
    """A log that `migrate` made with the registry."""
    async with open_kafka_log(registered) as log:
        yield log


def raw(log: KafkaLog, partition: int, count: int) -> list[bytes]:
    """The first committed values of a partition, as everybody sees them. Blocks."""
    consumer = Consumer({**log.kafka.reader(), "isolation.level": "read_committed"})
    try:
        consumer.assign([TopicPartition(log.kafka.topic, partition, 0)])
        return [message.value() or b"" for message in consumer.consume(count, 30.0)]
    finally:
        consumer.close()


def append(log: KafkaLog, package_id: UUID, value: bytes) -> None:
    """As a stranger's producer does it. Blocks."""
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap})
    key = str(package_id).encode()
    producer.produce(log.kafka.topic, value, key, partition_of(package_id, PARTITIONS))
    assert producer.flush(30) == 0


async def test_values_carry_the_ids_of_their_schemas_where_the_topic_was_made_with_a_registry(
    registered: Settings, framed: KafkaLog, registry: FakeRegistry
) -> None:
    made = create_in(1)
    async with lone_writer(registered, framed) as writer:
        await ready(writer)
        await writer.submit(made)
        await writer.submit(commands.ingest(made.package_id, "a", "b"))
    values = await asyncio.to_thread(raw, framed, 1, 3)
    schemas = {registry.id_of(subject): text for subject, text in registry.schemas.items()}
    heads = [(value[0], int.from_bytes(value[1:5])) for value in values]
    assert {head for head, _ in heads} == {0}
    found: list[Any] = [
        fastavro.schemaless_reader(io.BytesIO(value[5:]), json.loads(schemas[id_]), None)
        for value, (_, id_) in zip(values, heads, strict=True)
    ]
    read = [event async for event in framed.read()]
    assert [(event["event_type"], event["event_id"]) for event in found] == [(e.event_type, e.event_id) for e in read]
    assert [event.sequence for event in read] == [1, 2, 3]
    assert "values carry their ids" in await remark_of_doctor(framed)


async def test_a_writer_on_an_empty_disk_reads_them_back(registered: Settings, framed: KafkaLog) -> None:
    made = create_in(1)
    async with lone_writer(registered, framed) as writer:
        await ready(writer)
        await writer.submit(made)
    elsewhere = replace(registered, state_dir=registered.state_dir / "empty")
    async with lone_writer(elsewhere, framed) as writer:
        await ready(writer)
        done = await writer.submit(commands.finalize(made.package_id))
        assert done.sequence == 2


async def test_a_topic_that_was_made_without_a_registry_keeps_its_framing(
    kafka: Settings, log: KafkaLog, registered: Settings, registry: FakeRegistry
) -> None:
    async with open_kafka_log(registered) as later:
        assert len(registry.schemas) == 8  # all types of events
        assert "stay in single-object encoding" in await remark_of_doctor(later)
        made = create_in(0)
        async with lone_writer(registered, later) as writer:
            await ready(writer)
            await writer.submit(made)
    assert (await asyncio.to_thread(raw, log, 0, 1))[0].startswith(b"\xc3\x01")
    assert [event.package_id async for event in log.read()] == [made.package_id]


async def test_a_topic_with_ids_is_not_used_without_its_registry(kafka: Settings, framed: KafkaLog) -> None:
    log = KafkaLog(kafka)
    try:
        for use in (log.check, log.migrate):
            with pytest.raises(ConfigurationError, match="set ARTIFACT_STORE_SCHEMA_REGISTRY_URL"):
                await use()
    finally:
        await log.close()


async def test_a_registry_that_others_could_change_keeps_processes_from_starting(
    registered: Settings, framed: KafkaLog, registry: FakeRegistry
) -> None:
    registry.levels[next(iter(registry.levels))] = "NONE"
    with pytest.raises(ConfigurationError, match="artifact-store migrate"):
        async with lone_writer(registered, KafkaLog(registered)):
            pytest.fail("it started")
    registry.status = 503
    with pytest.raises(UnavailableError, match="503"):
        await KafkaLog(registered).check()


@pytest.mark.parametrize("made_with_registry", [True, False])
async def test_a_record_in_the_other_framing_is_no_event(
    kafka: Settings, registered: Settings, registry: FakeRegistry, made_with_registry: bool
) -> None:
    event = history()[0]
    value = encode(event)
    async with open_kafka_log(registered if made_with_registry else kafka) as log:
        if not made_with_registry:
            value = b"\0" + (101).to_bytes(4) + value[10:]
        await asyncio.to_thread(append, log, event.package_id, value)
        with pytest.raises(BadRecordError, match="not in the framing of this log"):
            assert [event async for event in log.read()] == []


async def test_writing_stops_while_the_topic_says_another_framing_than_it_has(
    registered: Settings, framed: KafkaLog
) -> None:
    guard = Guard(framed.kafka, framed.cluster, system_clock)

    async def trouble(**changes: str) -> str:
        await asyncio.to_thread(set_on_topic, framed, **changes)
        await asyncio.to_thread(guard.look)
        return guard.trouble or ""

    assert await trouble(**{FRAMING: CONFLUENT}) == ""
    assert f"--add-config {FRAMING}={CONFLUENT}" in await trouble(**{FRAMING: "86400000"})
    assert await trouble(**{FRAMING: CONFLUENT}) == ""
