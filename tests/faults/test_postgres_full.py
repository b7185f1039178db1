"""A views database with a full disk, and one that is far away: the view stops or is late, but is the same."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from artifact_store.errors import UnavailableError
from projector.rebuild import replay_view
from services.views.database import Views
from services.views.digest import digest_view
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from tests.faults.small_disk import SmallPostgres
from tests.faults.store_proxy import StoreProxy
from tests.integration.projector_stage import covers, eventually, projecting, same_as_a_fresh_fold
from tests.memory_log import MemoryLog
from tests.views_history import History

pytestmark = [pytest.mark.services, pytest.mark.processes]

REGISTRY = PROJECTIONS["registry"]
LATENCY = 0.05


@pytest.fixture
async def full(tmp_path: Path) -> AsyncIterator[tuple[SmallPostgres, Views]]:
    with SmallPostgres(tmp_path / "postgres") as server:
        views = Views(await server.small_database())
        await views.migrate()
        yield server, views
        await views.close()


async def test_a_full_database_is_read_and_folded_into_when_there_is_room(
    full: tuple[SmallPostgres, Views], reference: Views, caplog: pytest.LogCaptureFixture
) -> None:
    server, views = full
    log, history = MemoryLog(), History().fill(packages=40, files=20)
    log.append(*history.events[:100])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
        before = await digest_view(views, REGISTRY)
        with server.disk.filled(server):
            log.append(*history.events[100:])

            async def told() -> bool:
                return "No space left on device" in caplog.text

            await eventually(told, "the projector says that the disk is full")
            await Queries(views).checkpoint("registry")
            with pytest.raises(UnavailableError):
                await replay_view(views, log, REGISTRY)
            assert (await digest_view(views, REGISTRY)).rows >= before.rows
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)
    await replay_view(views, log, REGISTRY)
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
    assert server.password not in caplog.text


async def test_a_database_that_is_far_away_is_folded_into_in_batches(postgres_url: str, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=60, files=20)
    log.append(*history.events)
    server, _, name = postgres_url.rpartition("/")
    credentials, _, host = server.rpartition("@")
    proxy = StoreProxy(host)
    async with proxy.listening() as through:
        views = Views(f"{credentials}@{through}/{name}")
        await views.migrate()
        with proxy.slow(LATENCY):
            began = time.monotonic()
            async with projecting(views, log, REGISTRY):
                await same_as_a_fresh_fold(views, reference, log, REGISTRY)
            # There and back takes twice as long; an event by itself would need that, and there are many.
            assert time.monotonic() - began < len(history.events) * 2 * LATENCY
        await views.close()
