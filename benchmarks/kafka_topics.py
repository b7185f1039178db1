"""Topics of a benchmark's own: our log on a fresh one, the records that it holds, and bare producers on another."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from services.config import Settings
from services.core.decide import Limits
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import KafkaSettings
from services.log.kafka.topic import migrate
from services.runtime.clock import system_clock

_SECONDS = 60.0
_READ = 1_000


@dataclass(frozen=True, slots=True)
class SentRecord:
    """A record as a producer was given it; `timestamp` in ms since 1970."""

    key: bytes
    value: bytes
    headers: list[tuple[str, str | bytes | None]]
    timestamp: int


@contextmanager
def fresh_topic(settings: Settings) -> Iterator[Settings]:
    """Settings whose log is a topic just made by `migrate`; both it and its writers' state go at the end. Blocks."""
    server, _, _ = settings.log_url.rpartition("/")
    prefix = f"bench-{uuid4().hex[:12]}"
    # On the disk where a gateway's state would be.
    states = settings.state_dir / prefix
    fresh = replace(settings, log_url=f"{server}/{prefix}", state_dir=states)
    kafka = KafkaSettings.of(fresh)
    migrate(kafka, Cluster(kafka))
    try:
        yield fresh
    finally:
        admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 3})
        for deleted in admin.delete_topics([kafka.topic], operation_timeout=_SECONDS).values():
            deleted.result(_SECONDS)
        shutil.rmtree(states, ignore_errors=True)


@asynccontextmanager
async def serving_writer(settings: Settings) -> AsyncIterator[KafkaWriter]:
    """The writer of one gateway alone that owns every partition, warmed up to where it takes commands."""
    log = KafkaLog(settings)
    try:
        await log.check()
        writer = KafkaWriter(settings, log, limits=Limits(), put_manifest=_no_claim_check, clock=system_clock)
        await writer.start()
        try:
            async with asyncio.timeout(_SECONDS):
                while await writer.ready() is not None:  # noqa: ASYNC110 - the port gives the state, not an event
                    await asyncio.sleep(0.05)
            yield writer
        finally:
            await writer.close()
    finally:
        await log.close()


async def _no_claim_check(manifest: bytes) -> None:
    raise AssertionError(f"a manifest of {len(manifest):,} bytes is no part of this benchmark")


def read_records(kafka: KafkaSettings) -> list[list[SentRecord]]:
    """All committed records of the topic, per partition in log order. Blocks."""
    ends = Cluster(kafka).last_stable(range(kafka.partitions))
    found: list[list[SentRecord]] = [[] for _ in ends]
    parts = [TopicPartition(kafka.topic, p, 0) for p, end in ends.items() if end > 0]
    # The package's types say None where a record without an error always has a value.
    consumer: Any = Consumer(kafka.reader())
    consumer.assign(parts)
    while any(at.offset < ends[at.partition] for at in consumer.position(parts)):
        for message in consumer.consume(_READ, 0.2):
            if message.error() is not None:
                raise RuntimeError(message.error().str())
            _, timestamp = message.timestamp()
            found[message.partition()].append(SentRecord(message.key(), message.value(), message.headers(), timestamp))
    consumer.close()
    return found


def bare_producer(kafka: KafkaSettings, partition: int) -> Producer:
    """A transactional producer with the very settings of our writers, ready to begin. Blocks."""
    producer = Producer(kafka.producer(partition))
    producer.init_transactions(_SECONDS)
    return producer


def send_transaction(producer: Producer, topic: str, partition: int, records: Sequence[SentRecord]) -> None:
    """All records in one transaction; returns when it is committed."""
    producer.begin_transaction()
    for record in records:
        producer.produce(topic, record.value, record.key, partition, timestamp=record.timestamp, headers=record.headers)
    producer.commit_transaction(_SECONDS)
