"""Views that lost a table, or are in a database that cannot store every text, are refused."""

from __future__ import annotations

import asyncpg
import pytest
from sqlalchemy import Table

from artifact_store.errors import ConfigurationError
from projector.rebuild import replay_view
from schemas.codec import encode
from services.views.database import Views
from services.views.engine.apply import catch_up, list_marks
from services.views.engine.generations import begin_build
from services.views.projections import PROJECTIONS
from services.views.tables import (
    artifact_files,
    artifact_packages,
    parked_packages,
    projection_checkpoints,
    projection_generations,
)
from tests.memory_log import MemoryLog
from tests.views_history import History, apply_whole, view_rows

REGISTRY = PROJECTIONS["registry"]


@pytest.fixture
def log() -> MemoryLog:
    """Some packages, one of which every projection parks."""
    log, history = MemoryLog(), History().fill(packages=3, files=2)
    log.append(*history.events)
    bad = history.events[0].package_id
    log.append_raw(log.partition_of(bad), encode(history.events[-1])[:-1], str(bad).encode())
    return log


async def drop(views: Views, table: Table) -> None:
    """Lose a table."""
    async with views.writing() as connection:
        await connection.exec_driver_sql(f"DROP TABLE {table.name}")


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
@pytest.mark.parametrize(
    "lost", [artifact_files, projection_checkpoints, parked_packages, projection_generations], ids=lambda t: t.name
)
async def test_a_view_that_lost_what_it_needs_is_refused_until_it_is_folded_again(
    views: Views, log: MemoryLog, lost: Table, *, in_place: bool
) -> None:
    concerned = [REGISTRY] if lost is artifact_files else list(PROJECTIONS.values())
    for projection in PROJECTIONS.values():
        await catch_up(views, log, projection)
    before, marks = await view_rows(views), len(await list_marks(views))
    await drop(views, lost)
    for _ in range(2):
        assert set(await views.create_missing()) == {projection.name for projection in concerned}
    for projection in concerned:
        with pytest.raises(ConfigurationError, match=f"lost.*artifact-store replay {projection.name}"):
            await catch_up(views, log, projection)
        await replay_view(views, log, projection, in_place=in_place)
    await views.migrate()
    assert (await view_rows(views), len(await list_marks(views))) == (before, marks)


async def test_a_build_whose_progress_was_lost_is_begun_anew(views: Views, log: MemoryLog) -> None:
    await catch_up(views, log, REGISTRY)
    before = (await view_rows(views))["artifact_packages"]
    build = await begin_build(views, REGISTRY, log.id)
    first = History().fill(packages=3, files=2).events[0]
    behind = {log.partition_of(first.package_id): 1}
    await apply_whole(views, REGISTRY, [first], behind, since=build.checkpoint)
    await drop(views, projection_checkpoints)
    await views.create_missing()
    await replay_view(views, log, REGISTRY)
    assert (await view_rows(views))["artifact_packages"] == before


@pytest.mark.parametrize("lost", [artifact_packages, projection_checkpoints, parked_packages], ids=lambda t: t.name)
async def test_a_table_that_was_lost_before_anything_was_folded_is_made_anew(views: Views, lost: Table) -> None:
    await drop(views, lost)
    await views.migrate()
    assert (await view_rows(views))["artifact_packages"] == []


async def _made_anew(postgres_url: str, encoding: str) -> Views:
    server, _, name = postgres_url.rpartition("/")
    connection = await asyncpg.connect(f"{server}/postgres".replace("+asyncpg", ""))
    try:
        await connection.execute(f"DROP DATABASE {name}")
        await connection.execute(
            f"CREATE DATABASE {name} ENCODING '{encoding}' LOCALE 'C' LOCALE_PROVIDER libc TEMPLATE template0"
        )
    finally:
        await connection.close()
    return Views(postgres_url)


@pytest.mark.services
async def test_a_database_that_keeps_texts_as_they_come_holds_every_text(postgres_url: str) -> None:
    views = await _made_anew(postgres_url, "SQL_ASCII")
    await views.migrate()
    await views.check()
    await views.close()


@pytest.mark.services
async def test_a_database_that_does_not_hold_every_text_is_refused(postgres_url: str) -> None:
    views = await _made_anew(postgres_url, "LATIN1")
    for attempt in (views.create_missing, views.check):
        with pytest.raises(ConfigurationError, match=r"LATIN1.*CREATE DATABASE … ENCODING 'UTF8' TEMPLATE template0"):
            await attempt()
    await views.close()
