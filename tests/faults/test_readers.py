"""Readers whose brokers stop answering give up within a bound, and say so; everything read before was right."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from time import monotonic

import pytest

from artifact_store.errors import UnavailableError
from services.log.kafka import KafkaLog, cluster
from services.log.kafka import tail as watch
from tests.contract.log_stage import ready
from tests.faults.proxy import Network, ProxiedCluster
from tests.integration.kafka_stage import create_in, kafka_settings, lone_writer, open_kafka_log
from tests.standstill import Standstill

pytestmark = pytest.mark.services

EVENTS = 300
HARDLY_AHEAD = {"fetch.message.max.bytes": 2_000, "queued.max.messages.kbytes": 4, "queued.min.messages": 1}
"""So that most is still to come when the brokers fall silent."""

PATIENCE_SECONDS = 2.0
ANSWER_SECONDS = 3.0


@pytest.fixture
async def log(cluster: ProxiedCluster, network: Network, tmp_path: Path) -> AsyncIterator[KafkaLog]:
    url = f"kafka://{cluster.proxied_endpoint}/readers"
    settings = kafka_settings(url, tmp_path, kafka_options=HARDLY_AHEAD)
    async with open_kafka_log(settings) as found:
        async with lone_writer(settings, found) as writer:
            await ready(writer)
            for _ in range(EVENTS // 100):
                await asyncio.gather(*(writer.submit(create_in(n % 3)) for n in range(100)))
        yield found


async def test_reading_and_scanning_end_with_an_error_when_all_brokers_fall_silent(
    log: KafkaLog, network: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "PATIENCE_SECONDS", PATIENCE_SECONDS)
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", ANSWER_SECONDS)
    end = (await log.end()).offsets
    for reading in (log.read(), log.scan(dict.fromkeys(end, 0), end)):
        await anext(reading)
        with Standstill() as machine, network.silent():
            began = monotonic()
            with pytest.raises(UnavailableError):
                async with asyncio.timeout(60):
                    _ = [found async for found in reading]
            took = monotonic() - began
        assert took - machine.longest(began) < PATIENCE_SECONDS + 3 * ANSWER_SECONDS
    assert len([event async for event in log.read()]) == EVENTS
