"""A rebuild on Kafka and PostgreSQL, loaded by several processes, one of which is killed."""

from __future__ import annotations

import asyncio
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Producer

from projector import RebuildOptions, rebuild, replay
from projector.rebuild import ReplayProgress
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import TooManyParkedError, catch_up, list_marks
from services.views.projections import PROJECTIONS
from tests.faults.catch_up_storm import write_history
from tests.integration.kafka_stage import kafka_settings, open_kafka_log
from tests.integration.projector_stage import covers, projecting

pytestmark = pytest.mark.services

REGISTRY = PROJECTIONS["registry"]
EVENTS = 3_000


def loaders() -> list[psutil.Process]:
    """The processes that load for this one."""
    return [p for p in psutil.Process().children() if "projector.loader" in p.cmdline()]


async def test_processes_load_the_partitions_and_one_that_dies_costs_nothing(
    kafka_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "_MANY_EVENTS", 0)
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=6, views_url=postgres_url)
    killed: list[int] = []

    def kill_one(seen: ReplayProgress) -> None:
        if seen.events >= EVENTS / 3 and not killed:
            at_work = loaders()
            assert len(at_work) == 2
            at_work[0].kill()
            killed.append(at_work[0].pid)

    async with open_kafka_log(settings) as log:
        count = await asyncio.to_thread(write_history, log, EVENTS)
        views = Views(postgres_url)
        await views.migrate()
        async with projecting(views, log, REGISTRY):
            await covers(views, REGISTRY, await log.end())
            before = await digest_view(views, REGISTRY)
            options = RebuildOptions(processes=2, max_rate=EVENTS, verify=True)
            done = await replay(settings, "registry", options=options, progress=kill_one)
            assert killed
            assert (done.digest, done.rows, done.matches) == (before.digest, before.rows, True)
            assert count / 3 <= done.events <= count
            assert done.position.covers(await log.end())
            assert not loaders()
        reference = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
        await reference.migrate()
        await catch_up(reference, log, REGISTRY)
        assert (await digest_view(reference, REGISTRY)).digest == done.digest
        await reference.close()
        await views.close()


async def test_processes_that_load_park_no_more_packages_than_the_replay_is_told(
    kafka_url: str, postgres_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rebuild, "_MANY_EVENTS", 0)
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=2, views_url=postgres_url)
    options = RebuildOptions(processes=2)
    async with open_kafka_log(settings) as log:
        await asyncio.to_thread(write_history, log, 100)
        producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
        for partition in range(2):
            producer.produce(log.kafka.topic, b"no event", f"key {partition}".encode(), partition)
        assert await asyncio.to_thread(producer.flush, 30) == 0
        with pytest.raises(TooManyParkedError, match="0 packages"):
            await replay(settings, "registry", options=options, max_parked=0)
        await replay(settings, "registry", options=options, max_parked=2)
        views = Views(postgres_url)
        assert len(await list_marks(views)) == 2
        await views.close()
