"""The same log gives the same digest, even in other partitions, at other offsets, or interleaved differently.

A log that is no longer the same is refused on Kafka too.
"""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from sqlalchemy import update

from artifact_store.errors import CorruptError
from artifact_store.events import Event
from artifact_store.manifest import ContentAddress
from projector import replay
from schemas.codec import encode
from services.log.kafka import KafkaLog
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.tables import projection_checkpoints
from tests.integration.kafka_stage import kafka_settings, open_kafka_log
from tests.integration.projector_stage import covers, projecting
from tests.services.kafka import KafkaCluster
from tests.views_history import History

pytestmark = pytest.mark.services

REGISTRY = PROJECTIONS["registry"]


@pytest.fixture
def views_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/views.db"


def write(log: KafkaLog, events: Sequence[Event]) -> None:
    """Append the events in this order, past every writer. Blocks."""
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    _produce(producer, log, events)
    assert producer.flush(30) == 0


def write_in_transactions(log: KafkaLog, events: Sequence[Event], dice: random.Random) -> None:
    """As `write`, in transactions: their markers take offsets, and some are aborted and done once more. Blocks."""
    producer = Producer(
        {"bootstrap.servers": log.kafka.bootstrap, "transactional.id": f"copy-{log.kafka.topic}", "log_level": 3}
    )
    producer.init_transactions(30)
    for start in range(0, len(events), 50):
        for aborts in [True] * (dice.random() < 0.3) + [False]:
            producer.begin_transaction()
            _produce(producer, log, events[start : start + 50])
            producer.flush(30)
            (producer.abort_transaction if aborts else producer.commit_transaction)(30)


def _produce(producer: Producer, log: KafkaLog, events: Sequence[Event]) -> None:
    for event in events:
        key = str(event.package_id).encode()
        producer.produce(log.kafka.topic, encode(event), key, log.partition_of(event.package_id))


def interleaved(events: Sequence[Event], dice: random.Random) -> list[Event]:
    """The same events in another order, each package's own kept."""
    left: dict[UUID, deque[Event]] = {}
    for event in events:
        left.setdefault(event.package_id, deque()).append(event)
    found = []
    while left:
        package_id = dice.choice(list(left))
        some = min(dice.randint(1, 9), len(left[package_id]))
        found += [left[package_id].popleft() for _ in range(some)]
        if not left[package_id]:
            del left[package_id]
    return found


async def digests(views: Views) -> dict[str, tuple[ContentAddress, int]]:
    found = {name: await digest_view(views, projection) for name, projection in PROJECTIONS.items()}
    return {name: (digest.digest, digest.rows) for name, digest in found.items()}


@pytest.fixture
def other_cluster(tmp_path: Path) -> Iterator[str]:
    """The address of a Kafka cluster of the test's own."""
    with KafkaCluster(tmp_path / "kafka", brokers=1) as cluster:
        yield cluster.endpoint


@pytest.mark.processes
async def test_a_topic_copied_to_another_cluster_gives_the_same_digests_over_other_partitions_offsets_and_interleavings(
    kafka_url: str, other_cluster: str, postgres_url: str, tmp_path: Path, views: Views
) -> None:
    history, dice = History(3).fill(packages=40, files=6), random.Random(3)
    there = kafka_settings(f"kafka://{other_cluster}/copy", tmp_path, kafka_partitions=5)
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path)) as log, open_kafka_log(there) as copied:
        await asyncio.to_thread(write, log, history.events)
        other = interleaved(history.events, dice)
        assert other != history.events
        await asyncio.to_thread(write_in_transactions, copied, other, dice)
        assert sum((await copied.end()).offsets.values()) > sum((await log.end()).offsets.values())
        for projection in PROJECTIONS.values():
            await catch_up(views, log, projection, batch_events=37)
        projected = Views(postgres_url)
        await projected.migrate()
        for projection in PROJECTIONS.values():
            async with projecting(projected, copied, projection, times=2):
                await covers(projected, projection, await copied.end())
        expected = await digests(views)
        assert await digests(projected) == expected
        await projected.close()
        settings = replace(there, views_url=postgres_url)
        for name in PROJECTIONS:
            assert (await replay(settings, name)).digest == expected[name][0]


async def test_a_topic_whose_beginning_was_deleted_up_to_the_checkpoint_is_refused(
    kafka_url: str, tmp_path: Path, views: Views
) -> None:
    history = History(4).fill(packages=6, files=3)
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path, kafka_partitions=1)) as log:
        await asyncio.to_thread(write, log, history.events[:40])
        await catch_up(views, log, REGISTRY)
        gone = [TopicPartition(log.kafka.topic, 0, 40)]
        admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
        (deleted,) = admin.delete_records(gone).values()
        await asyncio.to_thread(deleted.result, 30)
        await asyncio.to_thread(write, log, history.events[40:])
        with pytest.raises(CorruptError, match="artifact-store replay registry"):
            await catch_up(views, log, REGISTRY)


async def test_another_record_where_the_view_folded_its_last_one_is_refused(
    kafka_url: str, tmp_path: Path, views: Views
) -> None:
    history = History(4).fill(packages=6, files=3)
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path)) as log:
        await asyncio.to_thread(write, log, history.events[:40])
        await catch_up(views, log, REGISTRY)
        await asyncio.to_thread(write, log, history.events[40:42])
        await catch_up(views, log, REGISTRY)  # it goes on, as long as the record is that one
        async with views.writing() as connection:
            await connection.execute(update(projection_checkpoints).values(last_digest=bytes(32)))
        await asyncio.to_thread(write, log, history.events[42:])
        with pytest.raises(CorruptError, match="restored from an older copy and written to since"):
            await catch_up(views, log, REGISTRY)
