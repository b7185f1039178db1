"""The projector on real services: its PostgreSQL is killed, frozen and restarted, and Kafka is the log."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from confluent_kafka import Producer

from artifact_store.errors import ConfigurationError, LogIdentityError, UnavailableError
from projector import replay, run_projectors
from schemas.codec import encode
from services.config import Settings
from services.log.kafka import KafkaLog
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from services.wiring import open_log, parts
from tests import commands
from tests.integration.kafka_stage import kafka_settings, open_kafka_log, operate
from tests.integration.projector_stage import WAIT_SECONDS, covers, eventually, projecting
from tests.memory_log import MemoryLog
from tests.services.postgres import PostgresServer
from tests.views_history import History

pytestmark = pytest.mark.services

REGISTRY = PROJECTIONS["registry"]


async def test_a_database_that_is_killed_and_comes_back_loses_and_doubles_nothing(
    tmp_path: Path, reference: Views, caplog: pytest.LogCaptureFixture
) -> None:
    log, history = MemoryLog(), History().fill(packages=30, files=6)
    with PostgresServer(tmp_path / "postgres") as server:
        views = Views(server.url())
        await views.migrate()
        async with projecting(views, log, REGISTRY):
            for turn in range(3):
                part = len(history.events) // 3
                fresh = history.events[turn * part : None if turn == 2 else (turn + 1) * part]
                for i, event in enumerate(fresh):
                    log.append(event)
                    if i == len(fresh) // 2:
                        await asyncio.to_thread(server.kill)
                    await asyncio.sleep(0)
                caplog.clear()

                async def noticed() -> bool:
                    return "the views database" in caplog.text

                await eventually(noticed, "the projector says that the database is away")
                with pytest.raises(UnavailableError):
                    await Queries(views).checkpoint("registry")
                await asyncio.to_thread(server.restart)
                await covers(views, REGISTRY, await log.end())
        await catch_up(reference, log, REGISTRY)
        assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
        await views.close()
        assert server.password not in caplog.text


async def test_a_database_that_hangs_is_unavailable_within_the_bound_and_folded_into_when_it_wakes(
    tmp_path: Path, reference: Views
) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=4)
    log.append(*history.events[:50])
    with PostgresServer(tmp_path / "postgres") as server:
        hasty, views = Views(server.url(), answer_seconds=0.5), Views(server.url())
        await views.migrate()
        async with projecting(hasty, log, REGISTRY):
            await covers(views, REGISTRY, await log.end())
            server.freeze()
            log.append(*history.events[50:])
            with pytest.raises(UnavailableError, match="no answer in time"):
                await Queries(hasty).checkpoint("registry")
            server.thaw()
            await covers(views, REGISTRY, await log.end())
        await catch_up(reference, log, REGISTRY)
        assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
        await hasty.close()
        await views.close()


def write(log: KafkaLog, history: History) -> None:
    """Events into the only partition, past every writer. Blocks."""
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    for event in history.events:
        producer.produce(log.kafka.topic, encode(event), str(event.package_id).encode(), 0)
    assert producer.flush(30) == 0


async def is_gone(log: KafkaLog) -> bool:
    try:
        await log.identity()
    except ConfigurationError:
        return True
    return False


async def test_a_topic_that_is_made_anew_under_a_projector_stops_it(
    kafka_url: str, tmp_path: Path, reference: Views
) -> None:
    settings = kafka_settings(kafka_url, tmp_path, kafka_partitions=1)
    old, new = History(1), History(2)
    for number in range(60):  # nothing but first events: they could follow at any offset
        new.create(f"new {number}")
        if number < 20:
            old.create(f"old {number}")
    async with open_kafka_log(settings) as log:
        await asyncio.to_thread(write, log, old)
        running = projecting(reference, log, REGISTRY)
        tasks = await running.__aenter__()
        await covers(reference, REGISTRY, await log.end())
        await asyncio.to_thread(operate, log, lambda admin: admin.delete_topics([log.kafka.topic]))
        await eventually(lambda: is_gone(log), "the brokers have learned of the deletion")
        async with open_kafka_log(settings) as anew:
            await asyncio.to_thread(write, anew, new)
            await asyncio.wait(tasks, timeout=WAIT_SECONDS)
        with pytest.raises(LogIdentityError):
            await running.__aexit__(None, None, None)
    shown = await Queries(reference).packages(limit=100)
    assert {package.name for package in shown.items} == {f"old {number}" for number in range(20)}


async def test_what_kafka_holds_is_projected_over_its_markers_and_replayed(
    real_settings: Settings, reference: Views
) -> None:
    stop = asyncio.Event()
    log = open_log(real_settings)
    await log.migrate()
    await log.close()
    async with parts(real_settings) as opened:
        await opened.views.migrate()
        made = [commands.create(i) for i in range(20)]
        running = asyncio.create_task(run_projectors(real_settings, [], stop))
        for command in made:
            await opened.writer.submit(command)
        for command in made:
            await opened.writer.submit(commands.ingest(command.package_id, "a", "b", name=str(command.package_id)))
        await opened.writer.submit(commands.finalize(made[0].package_id))
        end = await opened.log.end()
        for projection in PROJECTIONS.values():
            await covers(opened.views, projection, end)
            await catch_up(reference, opened.log, projection)
            found, expected = await digest_view(opened.views, projection), await digest_view(reference, projection)
            assert (found.digest, found.rows) == (expected.digest, expected.rows)

        async def shown() -> bool:
            lags = [await opened.log.lag(name) for name in PROJECTIONS]
            return not any(behind for lag in lags for behind in lag.values())

        await eventually(shown, "no lag is left in the log's own tools")
        done = await replay(real_settings, "registry")
        assert (done.events, done.digest) == (61, (await digest_view(reference, REGISTRY)).digest)
        assert done.position.covers(end)
        stop.set()
        assert await running == {}
