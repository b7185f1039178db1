"""The duties of every views database, on SQLite and PostgreSQL: the same rows, digests, pages, guards and errors."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import update
from sqlalchemy.engine import make_url

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    CorruptError,
    InvalidPathError,
    InvalidRequestError,
    LogIdentityError,
    UnavailableError,
)
from artifact_store.manifest import ContentAddress
from artifact_store.models import PackageFilter
from artifact_store.position import Position
from services.views.database import Views
from services.views.digest import ViewDigest, digest_view
from services.views.engine.apply import catch_up
from services.views.engine.checkpoints import StaleCheckpointError, load_checkpoint
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS
from services.views.queries import PAGE_BYTES, Queries
from services.views.tables import artifact_files, artifact_packages, projection_generations
from tests.memory_log import MemoryLog
from tests.views_history import History, apply_whole, batches, view_rows

LOG = UUID(int=7)
REGISTRY = PROJECTIONS["registry"]
NAMES = list(PROJECTIONS)


async def fold_all(views: Views, history: History, size: int) -> Mapping[str, ViewDigest]:
    """Fold the history into every projection in batches of this size, as partition 0."""
    digests = {}
    for name, projection in PROJECTIONS.items():
        at = await load_checkpoint(views, projection, LOG)
        for batch in batches(history.events, size):
            behind = {0: at.position.offsets.get(0, 0) + len(batch)}
            at = await apply_whole(views, projection, batch, behind, since=at)
        digests[name] = await digest_view(views, projection)
    return digests


@pytest.mark.parametrize("size", [1, 7, 500])
async def test_rows_and_digest_do_not_depend_on_batches_or_database(views: Views, reference: Views, size: int) -> None:
    history = History().fill(packages=7, files=4)
    assert await fold_all(views, history, size) == await fold_all(reference, history, 23)
    assert await view_rows(views) == await view_rows(reference)


async def test_two_folds_of_one_batch_at_once_leave_it_applied_once(views: Views) -> None:
    history = History().fill(packages=3, files=2)
    at = await load_checkpoint(views, REGISTRY, LOG)
    folds = [apply_whole(views, REGISTRY, history.events, {0: 99}, since=at) for _ in range(4)]
    outcomes = await asyncio.gather(*folds, return_exceptions=True)
    assert sorted(isinstance(outcome, StaleCheckpointError) for outcome in outcomes) == [False, True, True, True]
    assert len((await view_rows(views))["artifact_packages"]) == 3


@pytest.mark.parametrize("name", NAMES)
async def test_folds_of_different_partitions_go_on_side_by_side(views: Views, reference: Views, name: str) -> None:
    projection = PROJECTIONS[name]
    histories = {p: History(seed=p).fill(packages=3, files=2) for p in range(3)}

    async def project(views: Views, partition: int) -> None:
        at = await load_checkpoint(views, projection, LOG)
        for batch in batches(histories[partition].events, 5):
            behind = at.position.offsets.get(partition, 0) + len(batch)
            at = await apply_whole(views, projection, batch, {partition: behind}, since=at)

    await asyncio.gather(*(project(views, partition) for partition in histories))
    for partition in histories:
        await project(reference, partition)
    assert await digest_view(views, projection) == await digest_view(reference, projection)


async def test_a_violation_changes_nothing_and_names_the_package(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a", "b")
    before = await view_rows(views)
    at = await load_checkpoint(views, REGISTRY, LOG)
    with pytest.raises(CorruptError, match=str(package_id)):
        await apply_whole(views, REGISTRY, [history.events[0], history.events[2]], {0: 2}, since=at)
    twice = [history.events[0]]
    another = History(7)
    another.create()
    at = await apply_whole(views, REGISTRY, twice, {0: 1}, since=at)
    with pytest.raises(CorruptError, match="artifact_packages"):
        await apply_whole(views, REGISTRY, [*twice, *another.events], {0: 3}, since=at)
    assert len((await view_rows(views))["artifact_packages"]) == len(before["artifact_packages"]) + 1
    assert (await load_checkpoint(views, REGISTRY, LOG)).position == at.position


@pytest.mark.parametrize(
    "change",
    [
        update(artifact_files).where(artifact_files.c.relative_path == "dir/ü0-0-0").values(blake3=bytes(32)),
        update(artifact_packages).where(artifact_packages.c.name == "package 0").values(name="package O"),
        update(artifact_packages).where(artifact_packages.c.name == "package 0").values(finalized_at=0),
        update(artifact_packages).where(artifact_packages.c.name == "package 1").values(manifest_digest=None),
    ],
)
async def test_the_digest_differs_when_one_value_does(views: Views, change: Any) -> None:
    before = (await fold_all(views, History().fill(packages=2, files=1), 500))["registry"]
    async with views.writing() as connection:
        assert (await connection.execute(change)).rowcount == 1
    after = await digest_view(views, REGISTRY)
    assert (after.digest != before.digest, after.rows) == (True, before.rows)


async def test_a_digest_is_of_one_moment_while_events_are_folded_and_folded_again(
    views: Views, reference: Views
) -> None:
    history = History().fill(packages=5, files=3)
    known: dict[int, ContentAddress] = {}
    at = await load_checkpoint(reference, REGISTRY, LOG)
    for i, event in enumerate(history.events, start=1):
        at = await apply_whole(reference, REGISTRY, [event], {0: i}, since=at)
        known[i] = (await digest_view(reference, REGISTRY)).digest
    known[0] = (await digest_view(views, REGISTRY)).digest

    async def fold() -> None:
        for _ in range(3):
            await reset(views, REGISTRY)
            at = await load_checkpoint(views, REGISTRY, LOG)
            for i, event in enumerate(history.events, start=1):
                at = await apply_whole(views, REGISTRY, [event], {0: i}, since=at)

    folding = asyncio.create_task(fold())
    seen = set()
    while not folding.done():
        found = await digest_view(views, REGISTRY)
        offset = found.position.offsets.get(0, 0) if found.position else 0
        assert found.digest == known[offset]
        seen.add(offset)
    await folding
    assert len(seen) > 1


async def test_pages_of_packages_are_newest_first_and_stable_under_inserts(views: Views) -> None:
    history = History()
    made = [history.create(f"package {i}") for i in range(7)]
    queries = Queries(views)
    await fold_all(views, history, 500)
    page = await queries.packages(limit=3)
    seen = [package.package_id for package in page.items]
    while page.next is not None:
        done = len(history.events)
        history.create("newcomer")
        at = await load_checkpoint(views, REGISTRY, LOG)
        await apply_whole(views, REGISTRY, history.events[done:], {0: done + 1}, since=at)
        page = await queries.packages(limit=3, cursor=page.next)
        seen += [package.package_id for package in page.items]
    assert seen == made[::-1]


@pytest.mark.parametrize(("page_bytes", "sizes"), [(PAGE_BYTES, [16, 4]), (100, [1] * 20)])
async def test_a_page_of_packages_is_bounded_by_what_their_metadata_takes(
    views: Views, monkeypatch: pytest.MonkeyPatch, page_bytes: int, sizes: list[int]
) -> None:
    monkeypatch.setattr("services.views.queries.PAGE_BYTES", page_bytes)
    history = History()
    largest = f'{{"n":"{"ä" * 32_764}"}}'
    made = [history.create(f"package {n}", metadata=largest) for n in range(20)]
    await fold_all(views, history, 100)
    pages = [await Queries(views).packages(limit=1000)]
    while pages[-1].next is not None:
        pages.append(await Queries(views).packages(limit=1000, cursor=pages[-1].next))
    assert [len(page.items) for page in pages] == sizes
    assert [package.package_id for page in pages for package in page.items] == made[::-1]


async def test_packages_of_one_moment_are_paged_without_loss(views: Views) -> None:
    history = History().fill(packages=5, files=0)
    await fold_all(views, history, 500)
    async with views.writing() as connection:
        await connection.execute(update(artifact_packages).values(created_at=1))
    cursor, seen = None, []
    for _ in range(5):
        page = await Queries(views).packages(limit=1, cursor=cursor)
        seen += [package.package_id for package in page.items]
        cursor = page.next
    assert cursor is None
    assert seen == sorted(seen, reverse=True)
    assert len(set(seen)) == 5


async def test_packages_are_filtered_by_each_field(views: Views) -> None:
    history = History().fill(packages=6, files=1)
    await fold_all(views, history, 500)
    queries = Queries(views)
    everything = (await queries.packages()).items
    assert len(everything) == 6
    digest = next(p.manifest_digest for p in everything if p.manifest_digest)
    for where in (
        {"producer": "p1"},
        {"subject": "main"},
        {"status": "created"},
        {"status": "finalized", "producer": "p2"},
        {"retention_class": "scratch"},
        {"manifest_digest": digest},
        {"producer": "nobody"},
    ):
        found = (await queries.packages(PackageFilter(**where))).items
        assert found == tuple(p for p in everything if all(getattr(p, k) == v for k, v in where.items()))


async def test_files_come_by_the_bytes_of_their_paths(views: Views) -> None:
    history = History()
    package_id = history.create()
    paths = ["b", "a", "B", "é", "z", "c/b", "c-b", "Z", "ż", "𝄞", "\uffee", "c b"]
    history.ingest(package_id, *paths)
    await fold_all(views, history, 500)
    cursor, seen = None, []
    while True:
        page = await Queries(views).files(package_id, limit=5, cursor=cursor)
        seen += [file.relative_path for file in page.items]
        cursor = page.next
        if cursor is None:
            break
    assert seen == sorted(paths, key=str.encode)


@pytest.mark.parametrize("limit", [0, -1, 1001])
async def test_a_limit_out_of_range_is_refused(views: Views, limit: int) -> None:
    with pytest.raises(InvalidRequestError, match="limit"):
        await Queries(views).packages(limit=limit)
    with pytest.raises(InvalidRequestError, match="limit"):
        await Queries(views).files(UUID(int=1), limit=limit)


@pytest.mark.parametrize("cursor", ["", "?", "a", "ü", "gA", "g2hwYWNrYWdlcwFBAA", "g" * 5000])
async def test_a_cursor_that_was_not_given_out_is_refused(views: Views, cursor: str) -> None:
    with pytest.raises(InvalidRequestError, match="cursor"):
        await Queries(views).packages(cursor=cursor)
    with pytest.raises(InvalidRequestError, match="cursor"):
        await Queries(views).files(UUID(int=1), cursor=cursor)


async def test_a_cursor_of_another_listing_is_refused(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.create()
    history.ingest(package_id, "a", "b")
    await fold_all(views, history, 500)
    queries = Queries(views)
    of_packages, of_files = (await queries.packages(limit=1)).next, (await queries.files(package_id, limit=1)).next
    with pytest.raises(InvalidRequestError, match="cursor"):
        await queries.packages(cursor=of_files)
    with pytest.raises(InvalidRequestError, match="cursor"):
        await queries.files(package_id, cursor=of_packages)


async def test_what_no_field_or_path_can_be_is_refused_before_the_database_sees_it(views: Views) -> None:
    queries = Queries(views)
    for text in ("a\0b", "\ud800", ""):
        with pytest.raises(InvalidRequestError, match="producer"):
            await queries.packages(PackageFilter(producer=text))
        with pytest.raises(InvalidPathError):
            await queries.file_at(UUID(int=1), text)


async def test_several_may_migrate_at_once_and_again(views_url: str) -> None:
    many = [Views(views_url) for _ in range(4)]
    await asyncio.gather(*(views.migrate() for views in many))
    await many[0].migrate()
    await many[0].check()
    for views in many:
        await views.close()


async def test_views_that_were_never_migrated_say_what_creates_them(views_url: str) -> None:
    views = Views(views_url)
    with pytest.raises(ConfigurationError, match="artifact-store migrate"):
        await views.check()
    with pytest.raises(ConfigurationError, match="artifact-store migrate"):
        await Queries(views).package(UUID(int=1))
    await views.close()


async def test_tables_of_another_layout_are_refused_until_they_are_folded_again(views: Views) -> None:
    before = await fold_all(views, History().fill(packages=2, files=1), 500)
    async with views.writing() as connection:
        await connection.execute(update(projection_generations).values(layout=0))
        await connection.exec_driver_sql("ALTER TABLE artifact_packages DROP COLUMN created_by")
    with pytest.raises(ConfigurationError, match="artifact-store replay registry"):
        await views.migrate()
    for projection in PROJECTIONS.values():
        await reset(views, projection)
    await views.migrate()
    assert await fold_all(views, History().fill(packages=2, files=1), 500) == before


async def test_catching_up_reaches_the_end_over_holes_and_says_how_far_it_is(views: Views) -> None:
    log = MemoryLog(every=2)
    log.append(*History().fill(packages=4, files=3).events)
    told: list[tuple[int, Position]] = []
    folded = await catch_up(views, log, REGISTRY, batch_events=7, progress=lambda n, at: told.append((n, at)))
    end = await log.end()
    assert await Queries(views).checkpoint("registry") == end
    assert told[-1] == (folded, end)
    assert [n for n, _ in told] == sorted(n for n, _ in told)
    assert await catch_up(views, log, REGISTRY) == 0


@pytest.mark.parametrize("name", NAMES)
async def test_any_number_may_catch_up_at_once(views_url: str, views: Views, reference: Views, name: str) -> None:
    projection, log = PROJECTIONS[name], MemoryLog()
    history = History().fill(packages=6, files=3)
    log.append(*history.events)
    others = [Views(views_url) for _ in range(2)]
    folded = await asyncio.gather(*(catch_up(v, log, projection, batch_events=5) for v in (views, views, *others)))
    await catch_up(reference, log, projection)
    assert sum(folded) == len(history.events)
    assert await digest_view(views, projection) == await digest_view(reference, projection)
    for other in others:
        await other.close()


async def test_a_view_that_stands_beyond_the_end_is_refused(views: Views) -> None:
    log = MemoryLog(partitions=1)
    log.append(*History().fill(packages=2, files=1).events)
    await catch_up(views, log, REGISTRY)
    before = await view_rows(views)
    log.truncate(0)
    with pytest.raises(CorruptError, match="beyond the log's end"):
        await catch_up(views, log, REGISTRY)
    assert await view_rows(views) == before


async def test_a_view_of_another_log_is_refused(views: Views) -> None:
    first, second = MemoryLog(), MemoryLog()
    await catch_up(views, first, REGISTRY)
    with pytest.raises(LogIdentityError, match="artifact-store replay registry"):
        await catch_up(views, second, REGISTRY)


async def test_a_log_that_is_made_anew_before_its_end_is_known_is_not_folded(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    ask = log.end

    async def end_of_another(_covering: Position | None = None) -> Position:
        log.id = UUID(int=8)
        return await ask()

    monkeypatch.setattr(log, "end", end_of_another)
    with pytest.raises(LogIdentityError, match="created again"):
        await catch_up(views, log, REGISTRY)
    assert not any((await view_rows(views)).values())


async def test_a_database_that_is_not_there_is_unavailable_and_its_password_stays_secret(unused_tcp_port: int) -> None:
    views = Views(f"postgresql+asyncpg://someone:geheim@127.0.0.1:{unused_tcp_port}/views")
    for attempt in (views.check, views.migrate):
        with pytest.raises(UnavailableError) as caught:
            await attempt()
        assert_secret("geheim", caught.value)
    await views.close()


@pytest.mark.services
async def test_a_wrong_password_is_a_wrong_setting_and_stays_secret(postgres_url: str) -> None:
    views = Views(make_url(postgres_url).set(password="geheim").render_as_string(hide_password=False))
    with pytest.raises(ConfigurationError) as caught:
        await views.check()
    assert_secret("geheim", caught.value)
    await views.close()


@pytest.mark.parametrize(
    "url",
    [
        "mysql://someone:geheim@host/db",
        "geheim",
        "sqlite+aiosqlite://",
        "sqlite:///geheim",
        "postgresql://a:geheim@b/c",
        "postgresql+asyncpg://a:geheim",
        "postgresql+asyncpg://a:pass@wd:geheim@b/c",
    ],
)
def test_a_url_of_another_kind_is_a_wrong_setting_and_stays_secret(url: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        Views(url)
    assert_secret("geheim", caught.value)


def assert_secret(secret: str, error: ArtifactStoreError) -> None:
    """Neither the error nor what is chained to it shows the secret."""
    shown: BaseException | None = error
    while shown is not None:
        assert secret not in f"{shown} {shown!r}"
        shown = shown.__cause__ or (None if shown.__suppress_context__ else shown.__context__)
