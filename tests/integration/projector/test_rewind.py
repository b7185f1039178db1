"""Resets on Kafka: resetting a projector's whole group folds the view again; any other change leaves it alone."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from uuid import UUID

import pytest
from confluent_kafka import ConsumerGroupTopicPartitions, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from artifact_store.errors import CorruptError
from artifact_store.events import Event
from projector import run_projection
from projector.rebuild import replay_view
from schemas.codec import encode
from services.log.kafka import KafkaLog
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.engine.checkpoints import load_checkpoint
from services.views.projections import PROJECTIONS
from tests.integration.kafka_stage import PARTITIONS, kafka_settings, open_kafka_log
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


async def rewind(log: KafkaLog, offsets: dict[int, int]) -> None:
    """As `kafka-consumer-groups --reset-offsets`: offsets without metadata, once the group has no members."""
    parts = [TopicPartition(log.kafka.topic, p, offset) for p, offset in offsets.items()]
    group = ConsumerGroupTopicPartitions(log.kafka.projector_group("usage"), parts)
    admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})

    async def done() -> bool:
        (answer,) = admin.alter_consumer_group_offsets([group]).values()
        found = await asyncio.to_thread(answer.result, 30)
        return all(part.error is None for part in found.topic_partitions)

    await eventually(done, "the group has no members and can be set back")


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


async def delete_offsets(log: KafkaLog, partitions: Iterable[int]) -> None:
    """What `kafka-consumer-groups --delete-offsets` leaves: the group without a commit for these partitions."""
    admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    (answer,) = admin.delete_consumer_groups([log.kafka.projector_group("usage")]).values()
    before = await log.committed("usage")
    await asyncio.to_thread(answer.result, 30)
    left = {p: found for p, found in before.items() if p not in set(partitions)}
    for p, (offset, metadata) in left.items():
        assert await log.show("usage", {p: offset}, metadata)


@pytest.mark.parametrize("some", ["one back", "all but one back", "all to the end", "all to a time"])
async def test_a_group_that_is_set_elsewhere_stops_the_projector_until_a_replay(
    log: KafkaLog, views: Views, some: str
) -> None:
    events = History(7).fill(packages=20, files=3).events
    await asyncio.to_thread(write, log, events)
    async with projecting(views, log, USAGE):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation")
    before = await load_checkpoint(views, USAGE, await log.identity())
    await asyncio.to_thread(write, log, History(8).fill(packages=20, files=3).events)
    end, stands = (await log.end()).offsets, before.position.offsets
    back = dict.fromkeys(range(PARTITIONS), 0)
    moved = {
        "one back": {1: 0},
        "all but one back": dict.fromkeys(range(1, PARTITIONS), 0),
        "all to the end": dict(end),
        "all to a time": {p: offset - 1 for p, offset in stands.items()},
    }[some]
    assert moved != back
    await rewind(log, moved)
    with pytest.raises(CorruptError, match="artifact-store replay usage"):
        await asyncio.wait_for(run_projection(views, log, USAGE, asyncio.Event()), 60)
    assert await load_checkpoint(views, USAGE, await log.identity()) == before
    await replay_view(views, log, USAGE)
    async with projecting(views, log, USAGE, times=2):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation again")


@pytest.mark.parametrize("gone", [[1], list(range(PARTITIONS))])
async def test_offsets_that_were_deleted_or_have_expired_are_no_reset(
    log: KafkaLog, views: Views, gone: list[int]
) -> None:
    await asyncio.to_thread(write, log, History(7).fill(packages=20, files=3).events)
    async with projecting(views, log, USAGE):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation")
    before = await generation_of(views, log)
    await delete_offsets(log, gone)
    assert await log.committed("usage") == {p: v for p, v in (await log.committed("usage")).items() if p not in gone}
    await asyncio.to_thread(write, log, History(8).fill(packages=20, files=3).events)
    async with projecting(views, log, USAGE, times=2):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation again")
    assert await generation_of(views, log) == before


async def generation_of(views: Views, log: KafkaLog) -> UUID:
    return (await load_checkpoint(views, USAGE, await log.identity())).generation


async def test_ten_rewinds_at_random_moments_end_in_the_digest_of_one_fold(
    log: KafkaLog, views: Views, tmp_path: Path
) -> None:
    history, dice = History(7).fill(packages=60, files=8), random.Random(7)
    events, half = history.events, len(history.events) // 2
    await asyncio.to_thread(write, log, events[:half])
    generations = [await generation_of(views, log)]
    rewound = False
    for turn in range(11):
        async with projecting(views, log, USAGE, times=dice.choice([1, 2, 3])):
            await asyncio.to_thread(write, log, events[half:][turn * 40 : (turn + 1) * 40])

            async def begun_anew(since: UUID = generations[-1]) -> bool:
                return await generation_of(views, log) != since

            if rewound:
                await eventually(begun_anew, "the view begins anew")
                generations.append(await generation_of(views, log))
            wanted = dice.choice([1, 200, half])

            async def far_enough(wanted: int = wanted) -> bool:
                position = await position_of(views, USAGE)
                return position is not None and sum(position.offsets.values()) >= wanted

            await eventually(far_enough, f"the view has come to {wanted}")
        rewound = turn < 10
        if rewound:
            await rewind(log, dict.fromkeys(range(PARTITIONS), 0))
    await asyncio.to_thread(write, log, events[half + 440 :])
    async with projecting(views, log, USAGE, times=2):
        await covers(views, USAGE, await log.end())
        await eventually(lambda: carries_generation(log), "every partition carries a generation again")
        async with projecting(views, log, USAGE):  # a rebalance, in which nothing is a rewind any more
            await covers(views, USAGE, await log.end())
    assert await generation_of(views, log) == generations[-1]
    assert len(set(generations)) > 5
    reference = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
    await reference.migrate()
    await catch_up(reference, log, USAGE)
    assert (await digest_view(views, USAGE)).digest == (await digest_view(reference, USAGE)).digest
    assert not any((await log.lag("usage")).values())
    await reference.close()
