"""Locks around a rebuild and a reset: who waits for whom when a view is replaced, and who never waits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

import pytest
from sqlalchemy import select, text

from projector.rebuild import replay_view
from services.views.database import Views
from services.views.engine.apply import apply, catch_up
from services.views.engine.checkpoints import StaleCheckpointError, load_checkpoint, tables_of
from services.views.engine.generations import building
from services.views.engine.source import EventBatch
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from services.views.tables import artifact_packages
from tests.integration.projector_stage import WAIT_SECONDS, eventually, opened, same_as_a_fresh_fold
from tests.memory_log import MemoryLog
from tests.standstill import Standstill
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]

pytestmark = pytest.mark.services


@asynccontextmanager
async def filled(url: str) -> AsyncIterator[tuple[Views, MemoryLog, UUID]]:
    """A view of the registry that stands at the end of its log, the log, and one of its packages."""
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events)
    async with opened(url) as views:
        await catch_up(views, log, REGISTRY)
        yield views, log, history.events[0].package_id


async def test_a_long_read_holds_up_the_switch_and_nobody_else(postgres_url: str, reference: Views) -> None:
    async with filled(postgres_url) as (views, log, package_id):
        queries = Queries(views)
        phases: list[str] = []
        slowest = 0.0
        async with views.engine.connect() as long_reader:
            await long_reader.execute(select(artifact_packages))  # its transaction goes on
            replaying = asyncio.create_task(
                replay_view(views, log, REGISTRY, progress=lambda seen: phases.append(seen.phase))
            )
            with Standstill() as machine:
                since = time.monotonic()
                while phases.count("switch") < 5:
                    began = time.monotonic()
                    assert await queries.package(package_id) is not None
                    slowest = max(slowest, time.monotonic() - began)
                    assert not replaying.done()
                    await asyncio.sleep(0)
            assert (await long_reader.execute(select(artifact_packages.c.id))).all()
        await replaying
        assert slowest - machine.longest(since) < 5, "a reader waited as long as the long one reads"
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_long_read_holds_up_a_replay_in_place_and_nobody_else(
    postgres_url: str, reference: Views, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    async with filled(postgres_url) as (views, log, package_id):
        queries = Queries(views)
        async with views.engine.connect() as long_reader:
            await long_reader.execute(select(artifact_packages))  # its transaction goes on
            replaying = asyncio.create_task(replay_view(views, log, REGISTRY, in_place=True))

            async def refused_often() -> bool:
                assert await queries.package(package_id) is not None  # within the bound of a read
                assert not replaying.done()
                return caplog.text.count("not emptied yet") >= 5

            await eventually(refused_often, "the replay has tried to empty the view")
            assert (await long_reader.execute(select(artifact_packages.c.id))).all()
        await replaying
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_switch_waits_for_no_fold_of_another_projection(postgres_url: str, reference: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=4, files=2).events)
    other = PROJECTIONS["usage"]
    async with opened(postgres_url) as views:
        at = await load_checkpoint(views, other, log.id)
        async with views.writing() as connection, asyncio.timeout(WAIT_SECONDS):
            await tables_of(connection, other, at)  # a fold that goes on, a retry for instance
            await replay_view(views, log, REGISTRY)
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_switch_waits_for_a_fold_that_is_under_way_and_the_next_waits_for_the_switch(postgres_url: str) -> None:
    log, history = MemoryLog(), History().fill(packages=4, files=2)
    log.append(*history.events)
    async with opened(postgres_url) as views:
        await catch_up(views, log, REGISTRY)
        at = await load_checkpoint(views, REGISTRY, log.id)

        async def waiting(count: int) -> bool:
            async with views.reading() as connection:
                query = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
                return bool((await connection.execute(text(query))).scalar_one() == count)

        async with views.writing() as connection:
            await tables_of(connection, REGISTRY, at)
            replaying = asyncio.create_task(replay_view(views, log, REGISTRY))
            await eventually(lambda: waiting(1), "the switch waits for the fold")
            late = asyncio.create_task(apply(views, REGISTRY, EventBatch(at, {})))
            await eventually(lambda: waiting(2), "the next fold waits for the switch")
        await replaying
        with pytest.raises(StaleCheckpointError):
            await late


async def test_a_builder_whose_connection_was_lost_ends_as_if_it_had_not_been(postgres_url: str) -> None:
    async with opened(postgres_url) as views:

        async def lose_connections() -> None:
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid != pg_backend_pid()"

            async def gone() -> bool:
                async with views.reading() as connection:
                    await connection.execute(text(f"SELECT pg_terminate_backend(pid) {others}"))
                    return bool((await connection.execute(text(f"SELECT count(*) {others}"))).scalar_one() == 0)

            await eventually(gone, "the connections are gone")

        async def fail() -> None:
            async with building(views, REGISTRY):
                await lose_connections()
                raise KeyError("another failure")

        async with building(views, REGISTRY):
            await lose_connections()
        with pytest.raises(KeyError):
            await fail()
        async with building(views, REGISTRY):
            pass


async def test_what_fails_while_a_builder_has_its_lock_is_not_the_database_s_failure(postgres_url: str) -> None:
    async with opened(postgres_url) as views:
        with pytest.raises(FileNotFoundError, match="no such program"):
            async with building(views, REGISTRY):
                raise FileNotFoundError("no such program")
