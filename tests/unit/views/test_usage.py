"""The usage projection: what is counted on which day, and nothing twice."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from sqlalchemy import select

from artifact_store.events import Event, FileIngested
from services.views.database import Views
from services.views.engine.checkpoints import load_checkpoint
from services.views.projections import PROJECTIONS
from services.views.projections.usage_fold import DAY
from services.views.tables import usage_totals
from tests.views_history import START, History, apply_whole

LOG = UUID(int=7)
USAGE = PROJECTIONS["usage"]
TODAY = START // DAY


@pytest.fixture
def views_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/views.db"


async def fold(views: Views, events: Sequence[Event], partition: int = 0) -> None:
    """Apply the events as the next ones of the partition."""
    at = await load_checkpoint(views, USAGE, LOG)
    behind = {partition: at.position.offsets.get(partition, 0) + len(events)}
    await apply_whole(views, USAGE, events, behind, since=at)


async def totals(views: Views) -> list[tuple[str, str, int, int, int, int]]:
    """Every total: producer, class, day, packages, files, bytes."""
    async with views.reading() as connection:
        rows = await connection.execute(select(usage_totals).order_by(*usage_totals.primary_key.columns))
        return [(row[0], row[1], row[2], row[3], row[4], row[5]) for row in rows]


def expected(events: Sequence[Event]) -> list[tuple[str, str, int, int, int, int]]:
    """The totals of a valid history, counted event by event."""
    kinds = {e.package_id: (e.payload.producer, e.payload.retention_class) for e in events if e.sequence == 1}  # type: ignore[union-attr]  # the first event is a creation
    found: dict[tuple[str, str, int], list[int]] = {}
    for event in events:
        if event.sequence == 1 or isinstance(event.payload, FileIngested):
            total = found.setdefault((*kinds[event.package_id], event.created_at // DAY), [0, 0, 0])
            total[0] += event.sequence == 1
            total[1] += event.sequence > 1
            total[2] += getattr(event.payload, "size_bytes", 0)
    return [(*key, *sums) for key, sums in sorted(found.items())]  # type: ignore[misc]  # three and three


async def test_packages_files_and_bytes_are_counted_on_the_day_of_their_event(views: Views) -> None:
    history = History()
    package_id = history.create(producer="lab", retention_class="report")
    history.ingest(package_id, "a", "b")
    history.finalize(package_id)
    events = [replace(event, created_at=event.created_at + DAY * (i == 2)) for i, event in enumerate(history.events)]
    await fold(views, events)
    assert await totals(views) == [("lab", "report", TODAY, 1, 1, 8), ("lab", "report", TODAY + 1, 0, 1, 8)]


@pytest.mark.parametrize("size", [1, 3, 1000])
async def test_the_totals_are_those_of_a_count_whatever_the_batches(views: Views, size: int) -> None:
    history = History(3).fill(packages=9, files=4)
    for start in range(0, len(history.events), size):
        await fold(views, history.events[start : start + size])
    assert await totals(views) == expected(history.events)


async def test_partitions_that_are_folded_at_once_add_to_the_same_totals(views: Views) -> None:
    histories = [History(seed).fill(packages=6, files=3) for seed in range(3)]

    async def project(partition: int) -> None:
        for start in range(0, len(histories[partition].events), 7):
            await fold(views, histories[partition].events[start : start + 7], partition)

    await asyncio.gather(*(project(partition) for partition in range(3)))
    assert await totals(views) == expected([event for history in histories for event in history.events])


async def test_an_event_that_comes_twice_is_not_counted_twice(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a")
    await fold(views, history.events)
    for again in (history.events[:1], history.events[1:]):
        await fold(views, again)
    assert await totals(views) == expected(history.events)


@pytest.mark.parametrize(("created_at", "day"), [(0, 0), (DAY - 1, 0), (DAY, 1), (-1, -1)])
async def test_a_day_begins_at_midnight_utc(views: Views, created_at: int, day: int) -> None:
    history = History()
    history.create()
    await fold(views, [replace(history.events[0], created_at=created_at)])
    assert [row[2] for row in await totals(views)] == [day]
