"""Replay: a view folded again from zero is the same view, whatever runs beside it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from artifact_store.errors import InvalidRequestError, UnavailableError
from artifact_store.events import Event
from projector import replay
from projector.rebuild import ReplayProgress, replay_view
from services.config import Settings
from services.registry import open_registry
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from tests.integration.projector_stage import covers, projecting
from tests.memory_log import MemoryLog
from tests.views_history import History, view_rows

REGISTRY = PROJECTIONS["registry"]


@pytest.fixture(params=[False, True], ids=["beside", "in place"])
def in_place(request: pytest.FixtureRequest) -> bool:
    found: bool = request.param
    return found


@pytest.mark.parametrize("name", PROJECTIONS)
async def test_a_replay_gives_the_same_rows_and_digest(views: Views, name: str, *, in_place: bool) -> None:
    log, projection = MemoryLog(), PROJECTIONS[name]
    history = History().fill(packages=6, files=3)
    log.append(*history.events)
    for known in PROJECTIONS.values():
        await catch_up(views, log, known)
    before, rows = await digest_view(views, projection), await view_rows(views)
    told: list[ReplayProgress] = []
    done = await replay_view(views, log, projection, in_place=in_place, progress=told.append)
    assert (done.digest, done.rows, done.position) == (before.digest, before.rows, await log.end())
    assert done.events == len(history.events)
    loaded = [seen for seen in told if seen.phase == "load"][-1]
    assert (loaded.events, loaded.done, told[-1].events) == (done.events, loaded.total, done.events)
    assert await view_rows(views) == rows


async def test_a_replay_beside_running_projectors_gives_the_same_view(views: Views, *, in_place: bool) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=5)
    log.append(*history.events)
    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        before, rows = await digest_view(views, REGISTRY), await view_rows(views)
        for _ in range(3):
            done = await replay_view(views, log, REGISTRY, in_place=in_place)
            assert (done.digest, done.position) == (before.digest, before.position)
            log.rebalance("registry")  # by which the projectors look where the view stands
    assert await view_rows(views) == rows


async def test_a_replay_while_events_arrive_and_projectors_fold_loses_nothing(
    views: Views, tmp_path: Path, *, in_place: bool
) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=5)
    log.append(*history.events[:60])

    async def arrive(events: list[Event]) -> None:
        for event in events:
            log.append(event)
            await asyncio.sleep(0.002)

    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        arriving = asyncio.create_task(arrive(history.events[60:]))
        while not arriving.done():
            at_call = await log.end()
            assert (await replay_view(views, log, REGISTRY, in_place=in_place)).position.covers(at_call)
        await arriving
        await covers(views, REGISTRY, await log.end())
    reference = Views(f"sqlite+aiosqlite:///{tmp_path}/reference.db")
    await reference.migrate()
    await catch_up(reference, log, REGISTRY)
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
    await reference.close()


async def test_several_replays_in_place_at_once_end_in_the_same_view(views: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=6, files=3).events)
    await catch_up(views, log, REGISTRY)
    before = await digest_view(views, REGISTRY)
    await asyncio.gather(*(replay_view(views, log, REGISTRY, in_place=True) for _ in range(3)))
    await catch_up(views, log, REGISTRY)
    assert await digest_view(views, REGISTRY) == before


async def test_a_replay_without_its_log_leaves_the_view_as_it_is(views: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=3, files=1).events)
    await catch_up(views, log, REGISTRY)
    rows = await view_rows(views)
    log.unavailable = True
    with pytest.raises(UnavailableError):
        await replay_view(views, log, REGISTRY)
    assert await view_rows(views) == rows


async def test_a_replay_takes_a_view_to_another_log(views: Views) -> None:
    old, new = MemoryLog(), MemoryLog()
    old.append(*History(seed=1).fill(packages=3, files=1).events)
    new.append(*History(seed=2).fill(packages=2, files=1).events)
    await catch_up(views, old, REGISTRY)
    assert (await replay_view(views, new, REGISTRY)).position.log == new.id
    assert len((await view_rows(views))["artifact_packages"]) == 2


async def test_what_a_registry_wrote_is_replayed_by_its_settings(embedded_settings: Settings) -> None:
    async with open_registry(embedded_settings) as registry:
        package_id = await registry.create_package("name", "producer", "subject", "report")
        await registry.ingest_file(package_id, "a.txt", "text/plain", b"content")
        await registry.finalize_package(package_id)
        before = await registry.get_package(package_id)
    first = await replay(embedded_settings, "registry")
    second = await replay(embedded_settings, "registry", in_place=True)
    assert (first.events, first.rows) == (3, 4)
    assert (second.digest, second.position) == (first.digest, first.position)
    views = Views(embedded_settings.views_url)
    assert await Queries(views).package(package_id) == before
    await views.close()


async def test_an_unknown_projection_is_refused(embedded_settings: Settings) -> None:
    with pytest.raises(InvalidRequestError, match="known: registry, retention, usage"):
        await replay(embedded_settings, "search")
