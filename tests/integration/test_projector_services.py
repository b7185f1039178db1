"""The projector on real services: a PostgreSQL that is killed, frozen and restarted under it, and Kafka as the log."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.errors import UnavailableError
from services.views.catch_up import catch_up
from services.views.digest import digest_view
from services.views.engine import Views
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from tests.integration.projector_stage import covers, eventually, projecting
from tests.memory_log import MemoryLog
from tests.services.postgres import PostgresServer
from tests.views_history import History

pytestmark = pytest.mark.services

REGISTRY = PROJECTIONS["registry"]


@pytest.fixture
async def reference(tmp_path: Path) -> AsyncIterator[Views]:
    """A SQLite view beside the one under test, to compare with."""
    opened = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
    await opened.migrate()
    yield opened
    await opened.close()


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
