"""Scopes in queries: the database finds exactly the packages that `Scope.includes` includes."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Awaitable, Callable
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select

from artifact_store.manifest import ContentAddress, content_key
from artifact_store.models import Page
from services.core.access import Packages, Scope
from services.views.bulk import insert_rows
from services.views.database import Views
from services.views.queries import NEWEST_PACKAGES, Queries
from services.views.tables import (
    artifact_files,
    artifact_manifests,
    artifact_packages,
    parked_packages,
    projection_generations,
    retention_state,
    storage_locations,
    usage_totals,
)

TEXTS = ("a", "A", "ab", "aB", "a%", "a_b", "a?", "[a]", "a\\b", "a*", "é", "a'b")
"""Values with what is special in patterns of either database."""

PATTERNS = st.lists(
    st.one_of(st.sampled_from(TEXTS), st.text(st.sampled_from("aAbB%_?[]\\*é'"), min_size=0, max_size=4)),
    min_size=1,
    max_size=3,
).map(tuple)
SCOPES = st.lists(st.builds(Packages, PATTERNS, PATTERNS), max_size=3).map(lambda found: Scope(tuple(found)))


async def fill(views: Views) -> dict[UUID, tuple[str, str]]:
    """A package with one file of every producer and subject; by id."""
    found = {uuid4(): origin for origin in itertools.product(TEXTS, TEXTS)}
    packages, files, places, manifests, ends = [], [], [], [], []
    for number, (package, (producer, subject)) in enumerate(found.items()):
        digest = package.bytes * 2
        address = str(ContentAddress.of_digest(digest))
        packages.append((package, "n", producer, subject, "report", "finalized", "{}", address, 2, "a", number, 9))
        files.append((file_of(package), package, "path", "x/y", 1, digest, digest, number))
        places.append((uuid4(), file_of(package), "local", address, content_key(digest), 0, 1, number))
        manifests.append((package, address, b"", None))
        ends.append((package, "report", 1, 1, 1, 2))
    async with views.writing() as connection:
        await insert_rows(connection, artifact_packages, packages)
        await insert_rows(connection, artifact_files, files)
        await insert_rows(connection, storage_locations, places)
        await insert_rows(connection, artifact_manifests, manifests)
        await insert_rows(connection, retention_state, ends)
        live = select(projection_generations.c.generation).where(projection_generations.c.projection == "registry")
        generation = (await connection.execute(live)).scalar_one()
        parked = [(generation, 0, str(package), "registry", package, 7, 1, "cause") for package in found]
        await insert_rows(connection, parked_packages, parked)
        await insert_rows(connection, usage_totals, [(producer, "report", 1, 1, 1, 1) for producer in TEXTS])
    return found


def file_of(package: UUID) -> UUID:
    return UUID(int=package.int ^ 1)


@pytest.fixture
async def views(views_url: str) -> AsyncIterator[Views]:
    opened = Views(views_url)
    await opened.migrate()
    yield opened
    await opened.close()


async def test_lists_show_what_the_scope_includes(views_url: str) -> None:
    """Each example runs on its own loop, in its own thread."""

    async def prepared() -> dict[UUID, tuple[str, str]]:
        opened = Views(views_url)
        await opened.migrate()
        found = await fill(opened)
        await opened.close()
        return found

    packages = await prepared()

    async def check(scope: Scope) -> None:
        opened = Views(views_url)
        try:
            queries = Queries(opened).within(scope)
            shown = {package.package_id for package in (await queries.packages(limit=1000)).items}
            assert shown == {package for package, origin in packages.items() if scope.includes(*origin)}
            producers = {total.producer for total in (await queries.usage(limit=1000)).items}
            whole = Scope(tuple(one for one in scope.packages if "*" in one.subjects))
            assert producers == {producer for producer in TEXTS if whole.includes(producer, "any")}
        finally:
            await opened.close()

    @settings(max_examples=25)
    @given(SCOPES)
    def scopes(scope: Scope) -> None:
        asyncio.run(check(scope))

    await asyncio.to_thread(scopes)


async def _is_there(answer: Awaitable[object]) -> bool:
    found = await answer
    return bool(found.items) if isinstance(found, Page) else bool(found)


READS: dict[str, Callable[[Queries, UUID], Awaitable[bool]]] = {
    "package": lambda q, package: _is_there(q.package(package)),
    "parked": lambda q, package: _is_there(q.parked(package)),
    "files": lambda q, package: _is_there(q.files(package)),
    "found_file": lambda q, package: _is_there(q.found_file(file_of(package))),
    "file_at": lambda q, package: _is_there(q.file_at(package, "path")),
    "placed_files": lambda q, package: _is_there(q.placed_files(package)),
    "manifest": lambda q, package: _is_there(q.manifest(package)),
    "retention": lambda q, package: _is_there(q.retention(package)),
    "readable_files": lambda q, package: _is_there(q.readable_files({package.bytes * 2})),
    "readable_blobs": lambda q, package: _is_there(q.readable_blobs({package.bytes * 2})),
}
"""Every read of one package, and whether it finds the package."""

LISTED = {"packages", "usage"}
"""What the test above is about."""

OF_NO_READER = {"within", "origins", "progress", "checkpoint"}
"""What the gateway asks for itself: by what to filter events, and how far the view is. It shows none of it."""


async def test_nothing_outside_the_scope_is_there(views: Views) -> None:
    asked = {name for name in vars(Queries) if not name.startswith("_")}
    assert asked == READS.keys() | LISTED | OF_NO_READER, "a read without a row, or a row without a read"
    packages = await fill(views)
    queries = Queries(views).within(Scope((Packages(("a", "A*"), ("ab", "[*")),)))
    seen = 0
    few = {package: origin for package, origin in packages.items() if origin[0] in ("a", "A", "ab")}
    for package, (producer, subject) in few.items():
        visible = producer in ("a", "A") and subject in ("ab", "[a]")
        seen += visible
        found = {name: await read(queries, package) for name, read in READS.items()}
        assert found == dict.fromkeys(READS, visible), (producer, subject)
    assert seen == 4


async def test_bytes_are_looked_for_in_the_newest_packages_alone(views: Views) -> None:
    rows = [
        (uuid4(), "n", "p", "s", "report", "created", "{}", None, 1, "a", at, None) for at in range(NEWEST_PACKAGES + 1)
    ]
    files = [(uuid4(), row[0], "path", "x/y", 1, row[0].bytes * 2, row[0].bytes * 2, 1) for row in rows]
    async with views.writing() as connection:
        await insert_rows(connection, artifact_packages, rows)
        await insert_rows(connection, artifact_files, files)
    digests = {row[0].bytes * 2 for row in rows}
    found = await Queries(views).within(Scope((Packages(("p",)),))).readable_files(digests)
    assert digests - found == {rows[0][0].bytes * 2}
