"""The guard: a view refuses any log but the one that it was folded from, and is never reset automatically."""

from __future__ import annotations

import asyncio

import pytest

from artifact_store.errors import CorruptError
from projector import run_projection
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.engine.checkpoints import load_checkpoint
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS
from tests.integration.projector_stage import covers, projecting
from tests.memory_log import MemoryLog
from tests.views_history import History, view_rows

REGISTRY = PROJECTIONS["registry"]
MEND = "artifact-store replay registry"


def restored_and_written_on(log: MemoryLog, kept: int, fresh: History) -> None:
    """Bring the only partition back to its first `kept` records, and go on in another way."""
    records = log._records[0][:kept]
    log.truncate(0)
    for record in records:
        log.append_raw(0, record.value, record.key)
    log.append(*fresh.events)


async def refused(views: Views, log: MemoryLog, match: str) -> None:
    """Neither way of folding goes on, and the view stays as it is."""
    rows, checkpoint = await view_rows(views), await load_checkpoint(views, REGISTRY, log.id)
    for _ in range(2):
        with pytest.raises(CorruptError, match=match) as raised:
            await run_projection(views, log, REGISTRY, asyncio.Event())
        assert MEND in raised.value.detail
        with pytest.raises(CorruptError, match=match) as raised:
            await catch_up(views, log, REGISTRY)
        assert MEND in raised.value.detail
    assert await view_rows(views) == rows
    assert await load_checkpoint(views, REGISTRY, log.id) == checkpoint


@pytest.fixture
async def log(views: Views) -> MemoryLog:
    """A log of one partition that the view was folded from."""
    found = MemoryLog(partitions=1)
    found.append(*History(1).fill(packages=4, files=3).events)
    await catch_up(views, found, REGISTRY)
    return found


async def test_a_log_that_is_shorter_is_refused(views: Views, log: MemoryLog) -> None:
    restored_and_written_on(log, 10, History())
    await refused(views, log, "beyond the log's end")


async def test_a_log_that_was_restored_from_an_older_copy_and_written_on_is_refused(
    views: Views, log: MemoryLog
) -> None:
    restored_and_written_on(log, 10, History(2).fill(packages=9, files=3))
    await refused(views, log, "restored from an older copy and written to since")


async def test_a_log_that_lost_its_beginning_up_to_the_checkpoint_is_refused(views: Views, log: MemoryLog) -> None:
    log._records[0].clear()
    log.append(*History(2).fill(packages=2, files=1).events)
    await refused(views, log, "no longer holds")


async def test_a_view_that_is_folded_again_takes_the_log_as_it_is(views: Views, log: MemoryLog) -> None:
    restored_and_written_on(log, 0, History(2).fill(packages=9, files=3))
    await reset(views, REGISTRY)
    await catch_up(views, log, REGISTRY)
    assert len((await view_rows(views))["artifact_packages"]) == 9


async def test_the_same_log_goes_on_over_rebalances_and_partitions_without_records(views: Views) -> None:
    log, history = MemoryLog(partitions=4), History(3).fill(packages=3, files=3)
    async with projecting(views, log, REGISTRY, times=2):
        for event in history.events:
            log.append(event)
            log.rebalance("registry")
            await asyncio.sleep(0)
        await covers(views, REGISTRY, await log.end())
    assert len((await view_rows(views))["artifact_packages"]) == 3
