"""Rewinds on Kafka: an operator sets the projector's group back, and the view folds again to the same digest."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition

from schemas.codec import encode
from schemas.events import Event
from services.log.kafka import KafkaLog
from services.views.catch_up import catch_up
from services.views.checkpoints import load_checkpoint
from services.views.digest import digest_view
from services.views.engine import Views
from services.views.projections import PROJECTIONS
from tests.integration.kafka_stage import PARTITIONS, kafka_settings, open_kafka_log, operate
from tests.integration.projector_stage import covers, eventually, position_of, projecting
from tests.views_history import History

pytestmark = pytest.mark.services

USAGE = PROJECTIONS["usage"]
"""An event that is folded twice shows in its totals."""


@pytest.fixture
async def views(postgres_url: str) -> AsyncIterator[Views]:
    opened = Views(postgres_url)
    await opened.migrate()
    yield opened
    await opened.close()


@pytest.fixture
async def log(kafka_url: str, tmp_path: Path) -> AsyncIterator[KafkaLog]:
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path)) as opened:
        yield opened


def write(log: KafkaLog, events: Iterable[Event]) -> None:
    """Append the events past every writer. Blocks."""
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    for event in events:
        key = str(event.package_id).encode()
        producer.produce(log.kafka.topic, encode(event), key, log.partition_of(event.package_id))
    assert producer.flush(30) == 0


def rewind(log: KafkaLog, offsets: dict[int, int]) -> None:
    """As `kafka-consumer-groups --reset-offsets`: offsets without metadata, for a group without members. Blocks."""
    parts = [TopicPartition(log.kafka.topic, p, offset) for p, offset in offsets.items()]
    group = ConsumerGroupTopicPartitions(log.kafka.projector_group("usage"), parts)
    operate(log, lambda admin: admin.alter_consumer_group_offsets([group]))


async def carries_generation(log: KafkaLog) -> bool:
    group = log.kafka.projector_group("usage")

    def ask() -> bool:
        from confluent_kafka import Consumer

        consumer = Consumer({"bootstrap.servers": log.kafka.bootstrap, "group.id": group, "log_level": 3})
        try:
            parts = [TopicPartition(log.kafka.topic, p) for p in range(PARTITIONS)]
            return all(part.metadata for part in consumer.committed(parts, 30))
        finally:
            consumer.close()

    return await asyncio.to_thread(ask)


async def test_ten_rewinds_at_random_moments_end_in_the_digest_of_one_fold(
    log: KafkaLog, views: Views, tmp_path: Path
) -> None:
    history, dice = History(7).fill(packages=60, files=8), random.Random(7)
    events = history.events
    await asyncio.to_thread(write, log, events[: len(events) // 2])
    generations = {(await load_checkpoint(views, USAGE, await log.identity())).generation}
    for turn in range(10):
        some = events[len(events) // 2 :][turn * 40 : (turn + 1) * 40]
        async with projecting(views, log, USAGE, times=dice.choice([1, 2, 3])):
            await asyncio.to_thread(write, log, some)
            wanted = dice.choice([1, 200, len(events) // 2])

            async def far_enough(wanted: int = wanted) -> bool:
                position = await position_of(views, USAGE)
                return position is not None and sum(position.offsets.values()) >= wanted

            await eventually(far_enough, f"the view has come to {wanted}")
            generations.add((await load_checkpoint(views, USAGE, await log.identity())).generation)
        moved = dice.sample(range(PARTITIONS), dice.randint(1, PARTITIONS))
        await asyncio.to_thread(rewind, log, {p: dice.choice([0, 0, 1]) for p in moved})
    await asyncio.to_thread(write, log, events[len(events) // 2 + 400 :])
    async with projecting(views, log, USAGE, times=2):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation again")
        last = (await load_checkpoint(views, USAGE, await log.identity())).generation
        async with projecting(views, log, USAGE):  # a rebalance, in which nothing is a rewind any more
            await covers(views, USAGE, await log.end())
    assert (await load_checkpoint(views, USAGE, await log.identity())).generation == last
    assert len(generations | {last}) > 5
    reference = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
    await reference.migrate()
    await catch_up(reference, log, USAGE)
    assert (await digest_view(views, USAGE)).digest == (await digest_view(reference, USAGE)).digest
    assert not any((await log.lag("usage")).values())
    await reference.close()
