"""The shared services of `make services` are running and do what the adapters rely on."""

from __future__ import annotations

import io
import subprocess
import sys
from typing import Any
from urllib.parse import urlsplit

import asyncpg
import pytest
from confluent_kafka import Consumer, Producer
from confluent_kafka.admin import AdminClient
from confluent_kafka.cimpl import NewTopic
from minio import Minio

from services.config import Settings
from tests.services.shared import ENVIRONMENT_FILE, ROOT, read_environment

pytestmark = pytest.mark.services


def test_an_event_that_was_produced_is_consumed(kafka_url: str) -> None:
    url = urlsplit(kafka_url)
    topic = f"{url.path.removeprefix('/')}.events"
    admin = AdminClient({"bootstrap.servers": url.netloc})
    for created in admin.create_topics([NewTopic(topic, 2, 1)]).values():
        created.result(timeout=30)
    producer = Producer({"bootstrap.servers": url.netloc, "transactional.id": topic})
    producer.init_transactions(30)
    producer.begin_transaction()
    producer.produce(topic, key=b"key", value=b"value")
    producer.commit_transaction(30)
    consumer = Consumer(
        {
            "bootstrap.servers": url.netloc,
            "group.id": topic,
            "group.protocol": "consumer",
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.subscribe([topic])
        messages = consumer.consume(1, timeout=30)
        assert [(message.error(), message.key(), message.value()) for message in messages] == [(None, b"key", b"value")]
    finally:
        consumer.close()


def test_an_object_that_was_put_is_got(s3_bucket: dict[str, Any]) -> None:
    url = urlsplit(s3_bucket["blobs_url"])
    bucket = url.path.removeprefix("/")
    client = Minio(
        url.netloc, s3_bucket["s3_access_key"], s3_bucket["s3_secret_key"], secure=False, region=s3_bucket["s3_region"]
    )
    client.put_object(bucket, "a/key", io.BytesIO(b"some bytes"), 10)
    with client.get_object(bucket, "a/key") as answer:
        assert answer.read() == b"some bytes"


async def test_a_database_of_its_own_answers(postgres_url: str) -> None:
    connection = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    try:
        assert await connection.fetchval("select 1") == 1
        assert await connection.fetchval("select count(*) from pg_tables where schemaname = 'public'") == 0
    finally:
        await connection.close()


def test_the_settings_of_the_file_are_settings_of_the_product() -> None:
    values = {name.removeprefix("ARTIFACT_STORE_").lower(): value for name, value in read_environment().items()}
    settings = Settings(**values)
    assert settings.log_url.startswith("kafka://127.0.0.1:")
    assert settings.views_url.startswith("postgresql+asyncpg://")
    assert settings.schema_registry_url is None
    assert ENVIRONMENT_FILE.stat().st_mode & 0o077 == 0


def test_starting_again_changes_nothing_and_shows_no_secret() -> None:
    before = ENVIRONMENT_FILE.read_bytes()
    start = [sys.executable, "-m", "tests.services", "start"]
    shown = subprocess.run(start, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    assert ENVIRONMENT_FILE.read_bytes() == before
    values = read_environment()
    for name in ("LOG_URL", "BLOBS_URL", "VIEWS_URL"):
        url = urlsplit(values[f"ARTIFACT_STORE_{name}"])
        assert f"{url.hostname}:{url.port}" in shown
        if url.password is not None:
            assert url.password not in shown
    assert values["ARTIFACT_STORE_S3_SECRET_KEY"] not in shown
