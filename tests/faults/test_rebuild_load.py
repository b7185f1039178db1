"""A throttled rebuild under reads and writes: nobody notices. `REBUILD_EVENTS=60000 make endurance` takes less time."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import subprocess
from pathlib import Path

import pytest
from sqlalchemy import select

from benchmarks.file_events import Amount, filled_topic
from services.log.kafka import KafkaLog
from services.views.database import Views
from services.views.engine.generations import read_build
from services.views.projections import PROJECTIONS
from services.views.tables import artifact_packages
from services.wiring import open_log
from tests.faults.rebuild_load import Load
from tests.integration.kafka_stage import kafka_settings
from tests.integration.processes import COMMAND, ProductProcess
from tests.integration.projector_stage import covers
from tests.services.postgres import PostgresServer

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance, pytest.mark.timeout(3600)]

REGISTRY = PROJECTIONS["registry"]
EVENTS = int(os.environ.get("REBUILD_EVENTS", "1000000"))
PACKAGES = 1_000
RATE = 5_000
QUIET_SECONDS = 20.0


async def test_a_throttled_rebuild_is_not_noticed_by_those_who_read_and_write(kafka_url: str, tmp_path: Path) -> None:
    with PostgresServer(tmp_path / "postgres", durable=True) as server:
        plain = kafka_settings(kafka_url, tmp_path, kafka_partitions=6, views_url=server.url())
        async with filled_topic(plain, Amount(PACKAGES, EVENTS // PACKAGES - 1)) as settings:
            views, log = Views(settings.views_url), open_log(settings)
            assert isinstance(log, KafkaLog)
            await views.migrate()
            with ProductProcess(settings, tmp_path / "projector", "projector", "registry", listens=False):
                await covers(views, REGISTRY, await log.end(), seconds=600 + EVENTS / 1000)
                async with views.reading() as connection:
                    packages = list((await connection.execute(select(artifact_packages.c.id))).scalars())
                load = Load(views, log, packages, seed=7)
                async with load.running() as reads:
                    await asyncio.sleep(QUIET_SECONDS)  # what is measured
                    quiet, before = reads.p99(), len(reads.seconds)
                    command = [*COMMAND, "replay", "registry", "--max-rate", str(RATE), "--verify", "--json"]
                    done = await asyncio.to_thread(
                        subprocess.run,
                        command,
                        env={**os.environ, **settings.environment()},
                        stdout=subprocess.PIPE,
                        check=True,
                    )
                    busy, after = reads.p99(before), len(reads.seconds)
                await covers(views, REGISTRY, await log.end())
            async with views.reading(snapshot=True) as connection:
                assert await read_build(connection, REGISTRY) is None
            await views.close()
            await log.close()
    found = json.loads(done.stdout)
    told = f"p99 {quiet:.4f} s quiet, {busy:.4f} s busy, {after - before} reads, {load.written} writes: {found}"
    logging.getLogger(__name__).info(told)
    assert reads.wrong == []
    assert found["same_as_before"] is True
    assert found["events"] >= EVENTS
    assert busy <= max(0.1, 3 * quiet), f"{after - before} reads: p99 {busy:.3f} s, quiet {quiet:.3f} s"
