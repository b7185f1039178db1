"""Pages while others write: nothing is repeated or missing, whatever is created or changed between two pages."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, repeat
from uuid import UUID

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, update

from artifact_store.models import PackageFilter
from services.views.bulk import insert_rows
from services.views.database import Views
from services.views.queries import Queries
from services.views.tables import artifact_files, artifact_packages

MOMENTS = st.integers(0, 5)
"""Times at which packages are created: few, so that many share one."""


@dataclass(frozen=True)
class Step:
    """What others do before the next page is asked for."""

    created_at: Sequence[int]
    finalized: Sequence[int]


STEPS = st.lists(
    st.builds(Step, st.lists(MOMENTS, max_size=4), st.lists(st.integers(0, 20), max_size=3)), min_size=1, max_size=8
)


def package_id(number: int) -> UUID:
    """Identifiers whose order has nothing to do with the order of creation."""
    return UUID(int=(number * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128))


class Writers:
    """Others who create and finalize packages."""

    def __init__(self, views: Views) -> None:
        self.made: dict[UUID, int] = {}
        self._views = views

    async def create(self, moments: Sequence[int]) -> None:
        rows = []
        for created_at in moments:
            new = package_id(len(self.made) + 1)
            self.made[new] = created_at
            rows.append((new, "n", "p", "s", "report", "created", "{}", None, 1, "a", created_at, None))
        async with self._views.writing() as connection:
            await insert_rows(connection, artifact_packages, rows)

    async def finalize(self, numbers: Sequence[int]) -> None:
        ids = [package_id(number) for number in numbers]
        async with self._views.writing() as connection:
            row = update(artifact_packages).where(artifact_packages.c.id.in_(ids))
            await connection.execute(row.values(status="finalized"))


@pytest.mark.parametrize("where", [PackageFilter(), PackageFilter(producer="p"), PackageFilter(status="created")])
def test_no_package_repeats_and_none_that_was_there_goes_missing(views_url: str, where: PackageFilter) -> None:
    async def read(first: list[int], steps: list[Step], limit: int) -> None:
        views = Views(views_url)
        try:
            await views.migrate()
            async with views.writing() as connection:
                await connection.execute(delete(artifact_packages))
            writers = Writers(views)
            await writers.create(first)
            there = dict(writers.made)
            gone: set[UUID] = set()
            seen: list[tuple[int, UUID]] = []
            page = await Queries(views).packages(where, limit=limit)
            for step in chain(steps, repeat(Step((), ()))):
                seen += [(package.created_at, package.package_id) for package in page.items]
                if page.next is None:
                    break
                await writers.create(step.created_at)
                await writers.finalize(step.finalized)
                gone |= {package_id(number) for number in step.finalized} if where.status else set()
                page = await Queries(views).packages(where, limit=limit, cursor=page.next)
            assert seen == sorted(set(seen), reverse=True)
            assert {id_ for _, id_ in seen} >= there.keys() - gone
            assert {id_ for _, id_ in seen} <= writers.made.keys()
        finally:
            await views.close()

    examples = 15 if views_url.startswith("sqlite") else 8

    @settings(max_examples=examples, deadline=None)
    @given(first=st.lists(MOMENTS, min_size=1, max_size=12), steps=STEPS, limit=st.integers(1, 5))
    def holds(first: list[int], steps: list[Step], limit: int) -> None:
        asyncio.run(read(first, steps, limit))

    holds()


async def test_files_that_come_between_two_pages_neither_repeat_nor_hide_others(views_url: str) -> None:
    views, package = Views(views_url), package_id(1)
    await views.migrate()

    async def ingest(*paths: str) -> None:
        rows = [
            (UUID(bytes=path.encode().ljust(16)), package, path, "t/p", 1, bytes(32), bytes(32), 0) for path in paths
        ]
        async with views.writing() as connection:
            await insert_rows(connection, artifact_files, rows)

    await ingest("b", "d", "f", "é")
    first = await Queries(views).files(package, limit=2)
    await ingest("a", "c", "e", "z")
    second = await Queries(views).files(package, limit=9, cursor=first.next)
    assert [file.relative_path for file in (*first.items, *second.items)] == ["b", "d", "e", "f", "z", "é"]
    await views.close()
