"""Shared by the tests of the Kafka log: settings for a separate topic, writers on it, and their rivals."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import confluent_kafka.admin
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from artifact_store.errors import ConfigurationError
from ingest_gateway.peers.membership import kafka_writer
from schemas import identifiers
from services.config import Settings
from services.core.decide import CreatePackage, Limits
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.connection import partition_of
from services.log.state.state_file import sealed, unsealed
from services.runtime.clock import system_clock
from tests.contract.log_stage import PATIENCE_SECONDS, no_manifest
from tests.integration.conditions import until

# The package's types do not mark what its documentation names as exported.
_admin: Any = confluent_kafka.admin

PARTITIONS = 3


def kafka_settings(url: str, folder: Path, **changes: Any) -> Settings:
    """A Kafka log of three partitions on one broker; the other parts are not used."""
    values: dict[str, Any] = {
        "log_url": url,
        "kafka_partitions": PARTITIONS,
        "kafka_replication_factor": 1,
        "kafka_min_insync_replicas": 1,
        "state_dir": folder / "state",
    }
    return Settings(**{**values, **changes})


@asynccontextmanager
async def open_kafka_log(settings: Settings) -> AsyncIterator[KafkaLog]:
    """The log with its topic made."""
    log = KafkaLog(settings)
    try:
        await log.migrate()
        yield log
    finally:
        await log.close()


@asynccontextmanager
async def gateway(settings: Settings, log: KafkaLog, **options: Any) -> AsyncIterator[KafkaWriter]:
    """A member of the group of writers, as a gateway process is one: others can forward to it."""
    values = {"limits": Limits(), "put_manifest": no_manifest, "clock": system_clock, **options}
    async with kafka_writer(settings, log, **values) as writer:
        yield writer


@asynccontextmanager
async def lone_writer(settings: Settings, log: KafkaLog, **options: Any) -> AsyncIterator[KafkaWriter]:
    """A writer without a listener and without a way to forward; `options` of `KafkaWriter`."""
    writer = KafkaWriter(settings, log, **{"limits": Limits(), "put_manifest": no_manifest, **options})
    await writer.start()
    try:
        yield writer
    finally:
        await writer.close()


def create_in(partition: int, **changes: Any) -> CreatePackage:
    """A creation that no other equals, whose package lies in this partition."""
    while True:
        id_ = uuid4()
        package = identifiers.package_id("ada", id_)
        if partition_of(package, PARTITIONS) == partition:
            return replace(CreatePackage(package, id_, "ada", "run 1", "lab", "sample 7", "report", "{}"), **changes)


async def owned(writer: KafkaWriter) -> set[int]:
    """The partitions that the writer serves now."""
    return {status.partition for status in await writer.status() if status.since is not None}


async def shared(one: KafkaWriter, two: KafkaWriter) -> tuple[set[int], set[int]]:
    """Wait until both serve partitions, together all, and both know it; the partitions of each."""

    async def settled() -> bool:
        mine, others = await owned(one), await owned(two)
        known = [status.owner for writer in (one, two) for status in await writer.status()]
        return bool(mine and others) and mine | others == set(range(PARTITIONS)) and None not in known

    await until(settled, PATIENCE_SECONDS, "the writers do not share the partitions")
    return await owned(one), await owned(two)


@contextmanager
def foreign_transaction(log: KafkaLog, partition: int) -> Iterator[None]:
    """A transaction of a producer that is no writer, open for the length of the block, then aborted."""
    producer = Producer(
        {"bootstrap.servers": log.kafka.bootstrap, "transactional.id": f"foreign-{uuid4()}", "log_level": 3}
    )
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(log.kafka.topic, b"no event", b"no package", partition)
    producer.flush(30)
    try:
        yield
    finally:
        producer.abort_transaction(30)


def cut_off(log: KafkaLog, partition: int) -> None:
    """What a rival does first: `init_transactions` under the partition's transactional id. Blocks."""
    producer = Producer(
        {
            "bootstrap.servers": log.kafka.bootstrap,
            "transactional.id": f"{log.kafka.topic}-{partition}",
            "log_level": 3,
        }
    )
    producer.init_transactions(30)


async def make_anew(log: KafkaLog) -> None:
    """As an operator who deletes the topic and lets `migrate` make it again."""
    gone = [log.kafka.topic]
    await asyncio.to_thread(operate, log, lambda admin: admin.delete_topics(gone, operation_timeout=30))

    async def deleted() -> bool:
        try:
            await log.identity()
        except ConfigurationError:
            return True
        return False

    await until(deleted, 30, "the topic is still there")
    await log.migrate()


@contextmanager
def state_about(path: Path) -> Iterator[list[Any]]:
    """What a state file says of itself, to be changed: log, topic, partition, position, mark and more."""
    connection = sqlite3.connect(path)
    try:
        values = list(unsealed(connection.execute("SELECT body FROM about").fetchone()[0]))
        yield values
        with connection:
            connection.execute("UPDATE about SET body = ?", (sealed(*values),))
    finally:
        connection.close()


def operate(log: KafkaLog, act: Callable[[AdminClient], dict[Any, Future[Any]]]) -> None:
    """Do what only an operator does, and wait until it is done. Blocks."""
    admin = AdminClient({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    # The client must outlive its futures.
    for future in act(admin).values():
        future.result(30)


def set_on_topic(log: KafkaLog, **settings: str) -> None:
    """Change settings of the topic, as an operator does. Blocks."""
    entries = [
        _admin.ConfigEntry(name, value, incremental_operation=_admin.AlterConfigOpType.SET)
        for name, value in settings.items()
    ]
    resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, log.kafka.topic, incremental_configs=entries)
    operate(log, lambda admin: admin.incremental_alter_configs([resource]))
