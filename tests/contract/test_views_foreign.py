"""Events that our writers never write: parked if they could not be shown to anybody, listed like others if they can."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest

from artifact_store.events import PackageCreated
from services.views.bulk import insert_rows
from services.views.database import Views
from services.views.engine.apply import catch_up, list_marks
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from services.views.tables import artifact_files, artifact_packages, usage_totals
from tests.memory_log import MemoryLog
from tests.views_history import History

ODD = ("\x01", "../up", "", "a" * 300)
"""Texts that no name and no path of ours can be."""


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize(("odd", "cause"), [({"created_at": -5}, "1970"), ({"metadata": "none"}, "metadata")])
async def test_an_event_that_nobody_could_be_shown_parks_its_package_alone(
    views: Views, odd: dict[str, Any], cause: str, name: str
) -> None:
    log, history = MemoryLog(partitions=1), History()
    good, bad = history.create(), history.create()
    history.ingest(good, "a")
    history.ingest(bad, "a")
    for event in history.events:
        if event.package_id == bad and isinstance(event.payload, PackageCreated):
            event = (
                replace(event, payload=replace(event.payload, **odd)) if "metadata" in odd else replace(event, **odd)
            )
        log.append(event)
    await catch_up(views, log, PROJECTIONS[name])
    (mark,) = await list_marks(views, name)
    assert (mark.package_id, mark.events) == (bad, 2)
    assert cause in mark.cause
    if name == "registry":
        assert [package.package_id for package in (await Queries(views).packages()).items] == [good]


async def test_rows_of_odd_times_and_texts_are_paged_like_others(views: Views) -> None:
    packages = [(UUID(int=n), "n", "p", "s", "c", "created", "{}", None, 1, "a", -n, None) for n in range(1, 5)]
    files = [(UUID(int=n), UUID(int=1), path, "t", 1, bytes(32), bytes(32), 1) for n, path in enumerate(ODD)]
    totals = [(text, text, -(1 << 31) + n, 1, 1, 1) for n, text in enumerate(ODD)]
    async with views.writing() as connection:
        await insert_rows(connection, artifact_packages, packages)
        await insert_rows(connection, artifact_files, files)
        await insert_rows(connection, usage_totals, totals)
    queries = Queries(views)

    async def listed(ask: Any, *given: Any) -> list[Any]:
        page = await ask(*given, limit=1)
        found = list(page.items)
        while page.next is not None:
            page = await ask(*given, limit=1, cursor=page.next)
            found += page.items
        return found

    assert [p.created_at for p in await listed(queries.packages)] == [-1, -2, -3, -4]
    assert [f.relative_path for f in await listed(queries.files, UUID(int=1))] == sorted(ODD)
    assert [u.producer for u in await listed(queries.usage)] == sorted(ODD)
