"""The indexes fit the queries: no query reads more of a large table than it returns, or sorts it."""

from __future__ import annotations

import json
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import event, text

from artifact_store.manifest import ContentAddress
from artifact_store.models import PackageFilter
from services.core.lifecycle import RETENTION_CLASSES
from services.views.bulk import Row, insert_rows
from services.views.database import Views
from services.views.queries import Queries
from services.views.tables import (
    artifact_files,
    artifact_manifests,
    artifact_packages,
    retention_state,
    storage_locations,
    usage_totals,
)

PAGE = 100
MOST_BLOCKS = 1200
"""Blocks of 8 KiB that one query may touch on PostgreSQL: a page of rows that lie anywhere, and the way to them."""

MOST_SORTED = 1000
"""Rows that PostgreSQL may sort: it does so where a filter leaves few, which an index finds."""

LARGE = {table.name for table in (artifact_packages, artifact_files, storage_locations, artifact_manifests)} | {
    retention_state.name,
    usage_totals.name,
}

_ROWS_AT_ONCE = 20_000


@pytest.fixture(params=[10_000, pytest.param(1_000_000, marks=pytest.mark.endurance)])
async def views(views_url: str, request: pytest.FixtureRequest) -> AsyncIterator[Views]:
    """Views with this many rows in every table that grows, in an order unrelated to any key."""
    opened = Views(views_url)
    await opened.migrate()
    for start in range(0, request.param, _ROWS_AT_ONCE):
        await fill(opened, start, min(_ROWS_AT_ONCE, request.param - start))
    async with opened.writing() as connection:
        await connection.execute(text("ANALYZE"))
    yield opened
    await opened.close()


def id_of(kind: int, number: int) -> UUID:
    return UUID(int=((number * 4 + kind) * 0x9E3779B97F4A7C15F39CC0605CEDC835) % (1 << 128))


async def fill(views: Views, start: int, count: int) -> None:
    """Rows from number `start` on: fifty files a package, and a few producers that have most of the packages."""
    dice = random.Random(start)
    packages: list[Row] = []
    files: list[Row] = []
    places: list[Row] = []
    manifests: list[Row] = []
    ends: list[Row] = []
    totals: list[Row] = []
    for n in range(start, start + count):
        package, at, kind = id_of(0, n), dice.randrange(10**15), RETENTION_CLASSES[n % len(RETENTION_CLASSES)].name
        producer = f"producer {int(dice.paretovariate(1)) % 5000}"
        digest = ContentAddress.of_digest(id_of(3, n).bytes * 2)
        status = "finalized" if n % 10 else "created"
        packages.append(
            (
                package,
                f"n{n}",
                producer,
                f"s{n % 997}",
                kind,
                status,
                "{}",
                digest if n % 10 else None,
                9,
                "a",
                at,
                None,
            )
        )
        file, sha = id_of(1, n), dice.randbytes(32)
        files.append((file, id_of(0, n // 50), f"dir/{n % 50}", "text/plain", 7, id_of(3, n).bytes * 2, sha, at))
        places.append((id_of(2, n), file, "local", str(digest), f"blobs/{n}", 0, 7, at))
        manifests.append((package, digest, b"manifest", None))
        ends.append((package, kind, 30, at, at + n, 9))
        totals.append((f"producer {n % 2000}", kind, n // 2000, 1, 1, 1))
    async with views.writing() as connection:
        await insert_rows(connection, artifact_packages, packages)
        await insert_rows(connection, artifact_files, files)
        await insert_rows(connection, storage_locations, places)
        await insert_rows(connection, artifact_manifests, manifests)
        await insert_rows(connection, retention_state, ends)
        await insert_rows(connection, usage_totals, totals)


class Seen:
    """The statements that queries send, to ask for their plans."""

    def __init__(self, views: Views) -> None:
        self.views = views
        self.statements: list[tuple[str, Any]] = []
        event.listen(views.engine.sync_engine, "before_cursor_execute", self._note)

    def _note(self, _connection: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        self.statements.append((statement, parameters))

    async def of(self, ask: Callable[[], Awaitable[Any]]) -> list[tuple[str, Any]]:
        self.statements = []
        await ask()
        return [(text_, values) for text_, values in self.statements if any(name in text_ for name in LARGE)]


async def check_plan(views: Views, statement: str, parameters: Any) -> None:
    async with views.engine.connect() as connection:
        if views.dialect == "sqlite":
            # Of one package's manifest or one file's places there is a row to sort, or a few.
            may_sort = "manifest_digest = " in statement or "LIMIT" not in statement
            rows = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement}", parameters)
            for detail in [str(row.detail) for row in rows]:
                assert "USING" in detail or not any(name in detail for name in LARGE), (detail, statement)
                assert "TEMP B-TREE" not in detail or may_sort, (detail, statement)
            return
        rows = await connection.exec_driver_sql(f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) {statement}", parameters)
        found = rows.scalar_one()
        plan = (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]
        for node in walk(plan):
            sorted_rows = sum(child["Actual Rows"] for child in node.get("Plans", ()) if node["Node Type"] == "Sort")
            assert sorted_rows <= MOST_SORTED, (node, statement)
            scanned = node["Node Type"] == "Seq Scan" and node["Relation Name"] in LARGE
            assert not scanned, (node, statement)
        blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
        assert blocks <= MOST_BLOCKS, (blocks, statement)


def walk(node: dict[str, Any]) -> Iterator[dict[str, Any]]:
    yield node
    for child in node.get("Plans", ()):
        yield from walk(child)


async def test_every_query_finds_its_rows_by_an_index_and_in_order(views: Views) -> None:
    queries, seen = Queries(views), Seen(views)
    some = id_of(0, 77)
    package = await queries.package(some)
    assert package is not None
    filters = (
        PackageFilter(),
        PackageFilter(producer=package.producer),
        PackageFilter(producer="producer 1"),
        PackageFilter(producer="nobody"),
        PackageFilter(subject=package.subject),
        PackageFilter(status="created"),
        PackageFilter(status="finalized"),
        PackageFilter(retention_class=package.retention_class),
        PackageFilter(manifest_digest=package.manifest_digest),
    )
    asked: list[Callable[[], Awaitable[Any]]] = []
    for where in filters:
        asked.append(lambda where=where: queries.packages(where, limit=PAGE))  # type: ignore[misc]  # bound at once
        first = await queries.packages(where, limit=PAGE)
        if first.next is not None:
            asked.append(lambda where=where, at=first.next: queries.packages(where, limit=PAGE, cursor=at))  # type: ignore[misc]  # as above
    files = await queries.files(id_of(0, 1), limit=20)
    assert files.next is not None
    usage = await queries.usage(limit=PAGE)
    assert usage.next is not None
    asked += [
        lambda: queries.package(some),
        lambda: queries.files(id_of(0, 1), limit=20),
        lambda: queries.files(id_of(0, 1), limit=20, cursor=files.next),
        lambda: queries.found_file(id_of(1, 77)),
        lambda: queries.file_at(id_of(0, 1), "dir/7"),
        lambda: queries.manifest(some),
        lambda: queries.retention(some),
        lambda: queries.usage(limit=PAGE),
        lambda: queries.usage(limit=PAGE, cursor=usage.next),
        lambda: queries.usage("producer 7", limit=PAGE),
    ]
    checked = 0
    for ask in asked:
        for statement, parameters in await seen.of(ask):
            await check_plan(views, statement, parameters)
            checked += 1
    assert checked >= len(asked)
