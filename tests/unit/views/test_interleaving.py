"""The view is the same however a log's packages are interleaved over partitions and batches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from artifact_store.events import Event
from artifact_store.manifest import ContentAddress
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.checkpoints import load_checkpoint
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS
from tests.views_history import History, apply_whole

LOG = UUID(int=7)
PARTITIONS = 3


def by_package(events: Sequence[Event]) -> list[list[Event]]:
    found: dict[UUID, list[Event]] = {}
    for event in events:
        found.setdefault(event.package_id, []).append(event)
    return list(found.values())


PACKAGES = by_package(History().fill(packages=6, files=2).events)


@st.composite
def partitioned_batches(draw: st.DrawFn) -> list[tuple[int, list[Event]]]:
    """The packages' events in batches of one partition each: any order that keeps each package's own."""
    partition = [draw(st.integers(0, PARTITIONS - 1)) for _ in PACKAGES]
    left = [list(events) for events in PACKAGES]
    batches: list[tuple[int, list[Event]]] = []
    while any(left):
        number = draw(st.sampled_from([i for i, events in enumerate(left) if events]))
        taken, left[number] = left[number][: (count := draw(st.integers(1, 4)))], left[number][count:]
        if batches and batches[-1][0] == partition[number] and draw(st.booleans()):
            batches[-1][1].extend(taken)
        else:
            batches.append((partition[number], taken))
    return batches


async def digest_of(url: str, name: str, batches: Sequence[tuple[int, Sequence[Event]]]) -> ContentAddress:
    views, projection = Views(url), PROJECTIONS[name]
    try:
        await views.migrate()
        await reset(views, projection)
        at = await load_checkpoint(views, projection, LOG)
        for partition, events in batches:
            behind = {partition: at.position.offsets.get(partition, 0) + len(events)}
            at = await apply_whole(views, projection, events, behind, since=at)
        return (await digest_view(views, projection)).digest
    finally:
        await views.close()


@pytest.mark.slow
@pytest.mark.parametrize("name", PROJECTIONS)
def test_any_interleaving_gives_the_same_digest(name: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    folder: Path = tmp_path_factory.mktemp("views")
    url = f"sqlite+aiosqlite:///{folder}/views.db"
    in_order = [(0, events) for events in PACKAGES]
    expected = asyncio.run(digest_of(url, name, in_order))

    @settings(max_examples=30, deadline=None)
    @given(batches=partitioned_batches())
    def holds(batches: list[tuple[int, list[Event]]]) -> None:
        assert asyncio.run(digest_of(url, name, batches)) == expected

    holds()
