"""A projector in trouble that others can mend: it is shown, nothing is skipped, and no restart is needed."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import update

from artifact_store.errors import ConfigurationError
from projector import run_projection
from projector.projection_metrics import ProjectorMetrics
from projector.rebuild import replay_view
from services.log.port import Batch, Settled, StartOffsets
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.projections.registry_fold import RegistryProjection
from services.views.tables import projection_generations
from tests.integration.projector_stage import covers, eventually, projecting
from tests.memory_log import MemoryLog, MemorySubscription
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is tried again every 10 s is tried again at once."""
    monkeypatch.setattr("projector.runner._LONGEST_PAUSE", 0.05)


async def test_tables_that_are_missing_are_waited_for(views_url: str, caplog: pytest.LogCaptureFixture) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    views = Views(views_url)

    async def told() -> bool:
        return "artifact-store migrate" in caplog.text

    async with projecting(views, log, REGISTRY):
        await eventually(told, "the projector says what creates its tables")
        await views.migrate()
        await covers(views, REGISTRY, await log.end())
    await views.close()


@pytest.mark.parametrize("in_place", [False, True], ids=["beside", "in-place"])
@pytest.mark.parametrize("layout", [-1, 0], ids=["lost", "older"])
async def test_a_view_that_is_to_be_folded_again_is_folded_on_once_it_was(
    views: Views, caplog: pytest.LogCaptureFixture, layout: int, *, in_place: bool
) -> None:
    log, history = MemoryLog(), History().fill(packages=3, files=2)
    log.append(*history.events[:-3])
    await catch_up(views, log, REGISTRY)
    async with views.writing() as connection:
        await connection.execute(update(projection_generations).values(layout=layout))

    async def told() -> bool:
        return "artifact-store replay registry" in caplog.text

    async with projecting(views, log, REGISTRY):
        await eventually(told, "the projector says what mends its view")
        await replay_view(views, log, REGISTRY, in_place=in_place)
        log.append(*history.events[-3:])
        await covers(views, REGISTRY, await log.end())


async def test_settings_that_never_worked_end_a_projector(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog()

    async def refuse() -> Any:
        raise ConfigurationError("the topic is missing")

    monkeypatch.setattr(log, "identity", refuse)
    with pytest.raises(ConfigurationError, match="the topic is missing"):
        await run_projection(views, log, REGISTRY, asyncio.Event())


class _Late(MemorySubscription):
    """Nothing is assigned in the first polls, as where a group waits for further members."""

    polls = 0

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        self.polls += 1
        if self.polls <= 3:
            await asyncio.sleep(0)
            return Batch((), {})
        return await super().poll(max_records, timeout_seconds)


class _LateLog(MemoryLog):
    async def subscribe(
        self, projection: str, start_offsets: StartOffsets, settled: Settled | None = None
    ) -> MemorySubscription:
        joined = _Late(self, projection, start_offsets)
        self.members.append(joined)
        self.rebalance(projection)
        return joined


class _Watched(ProjectorMetrics):
    """Keeps what it is told."""

    def __init__(self, views: Views, log: MemoryLog) -> None:
        super().__init__(views, log, ["registry"])
        self.told: list[str] = []

    def goes_on(self, name: str) -> None:
        self.told.append("goes on")
        super().goes_on(name)

    def stopped(self, name: str) -> None:
        self.told.append("stopped")
        super().stopped(name)


async def test_a_projector_whose_fold_always_fails_never_seems_to_go_on(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, stop = _LateLog(), asyncio.Event()
    log.append(*History().fill(packages=2, files=1).events)

    async def mistaken(_self: RegistryProjection, *_given: Any) -> None:
        raise KeyError("a mistake in the fold")

    monkeypatch.setattr(RegistryProjection, "fold", mistaken)
    metrics = _Watched(views, log)
    running = asyncio.create_task(run_projection(views, log, REGISTRY, stop, metrics))
    await eventually(_counted(metrics, "stopped", 4), "the fold has failed again and again")
    stop.set()
    await running
    assert "goes on" not in metrics.told


async def test_a_projector_whose_log_is_away_does_not_run_until_it_is_back(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.views.engine.source.IDENTITY_SECONDS", 0.1)
    log, stop = MemoryLog(), asyncio.Event()
    metrics = _Watched(views, log)
    running = asyncio.create_task(run_projection(views, log, REGISTRY, stop, metrics))
    await eventually(_counted(metrics, "goes on", 1), "it runs")
    log.unavailable = True
    await eventually(_counted(metrics, "stopped", 1), "it cannot run")
    metrics.told.clear()
    log.unavailable = False
    await eventually(_counted(metrics, "goes on", 1), "it runs again")
    assert "stopped" not in metrics.told[metrics.told.index("goes on") :]
    stop.set()
    await running


async def test_a_projector_whose_database_is_locked_by_others_does_not_run_until_it_folds(
    views: Views, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("services.views.engine.source.IDENTITY_SECONDS", 0.1)
    monkeypatch.setattr("projector.runner._STUCK_SECONDS", 0.05)
    log, stop, history = MemoryLog(), asyncio.Event(), History().fill(packages=2, files=1)
    metrics = _Watched(views, log)
    running = asyncio.create_task(run_projection(views, log, REGISTRY, stop, metrics))
    await eventually(_counted(metrics, "goes on", 1), "it runs")
    async with views.writing() as connection:
        await connection.execute(update(projection_generations).values(projection=projection_generations.c.projection))
        log.append(*history.events)
        await eventually(_counted(metrics, "stopped", 1), "it is stuck")
        metrics.told.clear()
    await eventually(_counted(metrics, "goes on", 1), "it runs again")
    await covers(views, REGISTRY, await log.end())
    stop.set()
    await running
    assert "registry: folding 6 events has taken more than 0.05 s" in caplog.text


async def test_a_projector_that_has_nothing_to_fold_goes_on_once_that_is_known(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.views.engine.source.IDENTITY_SECONDS", 0.1)
    log, stop = _LateLog(), asyncio.Event()
    metrics = _Watched(views, log)
    running = asyncio.create_task(run_projection(views, log, REGISTRY, stop, metrics))
    await eventually(_counted(metrics, "goes on", 1), "it is known that nothing is left")
    stop.set()
    await running


def _counted(metrics: _Watched, what: str, times: int) -> Callable[[], Any]:
    async def often() -> bool:
        return metrics.told.count(what) >= times

    return often
