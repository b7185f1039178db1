"""Fixtures of the tests on Kafka: a log of their own there, a blob store in a folder, and snapshots at every close."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.blobs.local import LocalBlobStore
from services.blobs.port import BlobStore
from services.config import Settings
from services.log.kafka import KafkaLog
from services.log.state import snapshots
from tests.integration.kafka_stage import kafka_settings, open_kafka_log


@pytest.fixture
def kafka(kafka_url: str, tmp_path: Path) -> Settings:
    return kafka_settings(kafka_url, tmp_path)


@pytest.fixture
async def log(kafka: Settings) -> AsyncIterator[KafkaLog]:
    async with open_kafka_log(kafka) as found:
        yield found


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BlobStore]:
    found = LocalBlobStore(tmp_path / "blobs")
    await found.migrate()
    yield found
    await found.close()


@pytest.fixture
def every_close_makes_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CLOSING_OFFSETS", 1)
