"""A fault test can kill, freeze and restart private servers, and acknowledged data is still there."""

from __future__ import annotations

from pathlib import Path

import asyncpg
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic

from tests.services.kafka import KafkaBroker, KafkaCluster
from tests.services.minio import MinioServer
from tests.services.postgres import PostgresServer
from tests.services.process import Identity, ServiceError, becomes_true

pytestmark = pytest.mark.services

TOPIC = "private.events"


def _make_topic(servers: str, replicas: int) -> None:
    admin = AdminClient({"bootstrap.servers": servers})
    for created in admin.create_topics([NewTopic(TOPIC, 1, replicas)]).values():
        created.result(timeout=30)


def _append(servers: str, value: bytes) -> None:
    """Blocks until acknowledged by all replicas."""
    errors: list[object] = []
    producer = Producer({"bootstrap.servers": servers, "acks": "all", "enable.idempotence": True})
    producer.produce(TOPIC, value=value, on_delivery=lambda error, _: errors.append(error))
    assert producer.flush(60) == 0
    assert errors == [None]


def _read(servers: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": servers, "group.id": "reader", "enable.auto.commit": False})
    try:
        consumer.assign([TopicPartition(TOPIC, 0, 0)])
        messages = consumer.consume(count, timeout=60)
        return [message.value() for message in messages]
    finally:
        consumer.close()


def test_a_killed_broker_comes_back_with_its_log_on_its_port(tmp_path: Path) -> None:
    with KafkaBroker(tmp_path / "kafka") as broker:
        _make_topic(broker.endpoint, 1)
        _append(broker.endpoint, b"before")
        first = broker.pid
        broker.kill()
        assert not broker.running
        assert not broker.answers()
        broker.restart()
        assert broker.pid != first
        _append(broker.endpoint, b"after")
        assert _read(broker.endpoint, 2) == [b"before", b"after"]


def test_a_cluster_goes_on_without_one_of_three(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path) as cluster:
        _make_topic(cluster.endpoint, 3)
        _append(cluster.endpoint, b"before")
        cluster.brokers[0].kill()
        _append(cluster.endpoint, b"after")
        assert _read(cluster.endpoint, 2) == [b"before", b"after"]


def test_a_frozen_object_store_answers_again_when_thawed(tmp_path: Path) -> None:
    with MinioServer(tmp_path / "minio") as minio:
        minio.freeze()
        assert minio.running
        assert not minio.answers()
        minio.thaw()
        assert becomes_true(minio.answers, 30)


async def test_a_killed_database_comes_back_with_its_rows(tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "postgres") as postgres:
        url = postgres.url().replace("+asyncpg", "")
        connection = await asyncpg.connect(url)
        await connection.execute("create table kept (n int)")
        await connection.execute("insert into kept values (7)")
        postgres.kill()
        with pytest.raises((OSError, asyncpg.PostgresError, asyncpg.InterfaceError)):
            await connection.fetchval("select n from kept")
        connection.terminate()
        postgres.restart()
        connection = await asyncpg.connect(url)
        assert await connection.fetchval("select n from kept") == 7
        await connection.close()
        home = postgres.home
    assert not home.exists()


def test_a_pid_that_was_given_to_another_process_is_not_taken_for_the_server(tmp_path: Path) -> None:
    minio = MinioServer(tmp_path / "minio")
    with minio:
        stranger = Identity(minio.pid, "another moment")
        other = MinioServer(tmp_path / "other", minio.port)
        other.adopt(stranger)
        other.stop()
        assert minio.running
        assert becomes_true(minio.answers, 30)


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with MinioServer(tmp_path / "first") as first, pytest.raises(ServiceError, match="in use"):
        MinioServer(tmp_path / "second", first.port).start()
