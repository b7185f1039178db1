"""Parked packages: one that cannot be followed is set aside, the others continue, and a retry brings it back."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError
from artifact_store.events import Event, FileIngested, PackageCreated, PackageFinalized
from projector import run_projection
from projector.rebuild import replay_view
from schemas.codec import encode
from services.config import Settings
from services.core.lifecycle import MICROS_PER_DAY
from services.log.port import Batch
from services.registry import open_registry
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import Mark, TooManyParkedError, catch_up, list_marks, retry
from services.views.engine.checkpoints import StaleCheckpointError
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS, Tables
from services.views.projections.registry_fold import RegistryProjection
from services.views.queries import Queries
from services.views.tables import parked_packages
from tests.integration.processes import started
from tests.integration.projector_stage import covers, eventually, projecting
from tests.memory_log import MemoryLog
from tests.views_history import History, view_rows

REGISTRY = PROJECTIONS["registry"]
NONSENSE = b"\xc3\x01nothing that is known"


class Poisoned:
    """A log of nine packages. In one of them an event is left out, in one it is no event, one holds a path twice."""

    def __init__(self, partitions: int = 2) -> None:
        self.history = History(5).fill(packages=9, files=4)
        self.log = MemoryLog(partitions=partitions)
        by_package: dict[UUID, list[Event]] = {}
        for event in self.history.events:
            by_package.setdefault(event.package_id, []).append(event)
        self.gap, self.unreadable, self.twice = list(by_package)[2:5]
        self.good = History()
        for event in self.history.events:
            at = event.sequence
            value = encode(event)
            if event.package_id == self.gap and at == 4:
                continue
            if event.package_id == self.unreadable and at == 3:
                value = NONSENSE
            if event.package_id == self.twice and at == 3:
                before = by_package[self.twice][1].payload
                assert isinstance(before, FileIngested)
                assert isinstance(event.payload, FileIngested)
                value = encode(replace(event, payload=replace(event.payload, relative_path=before.relative_path)))
            key = str(event.package_id).encode()
            self.log.append_raw(self.log.partition_of(event.package_id), value, key)
            if event.package_id not in (self.gap, self.unreadable, self.twice) or at < 3 + (
                event.package_id == self.gap
            ):
                self.good.events.append(event)

    @property
    def bad(self) -> set[UUID | None]:
        return {self.gap, self.unreadable, self.twice}


@pytest.mark.parametrize("batch_events", [1, 7, 1000])
@pytest.mark.parametrize("name", ["registry", "retention", "usage"])
async def test_what_cannot_be_followed_is_parked_and_the_rest_is_as_if_it_had_never_been(
    views: Views, reference: Views, name: str, batch_events: int
) -> None:
    poisoned, good = Poisoned(), MemoryLog()
    good.append(*poisoned.good.events)
    projection = PROJECTIONS[name]
    await catch_up(views, poisoned.log, projection, batch_events=batch_events)
    marks = {mark.package_id: mark for mark in await list_marks(views, name)}
    twice = {poisoned.twice} if name == "registry" else set()  # the others do not mind a path that is there already
    assert set(marks) == {poisoned.gap, poisoned.unreadable, *twice}
    assert "does not follow event 3" in marks[poisoned.gap].cause
    assert "cannot be read" in marks[poisoned.unreadable].cause
    events = {package: sum(e.package_id == package for e in poisoned.history.events) for package in marks}
    assert marks[poisoned.gap].events == events[poisoned.gap] - 4
    assert marks[poisoned.unreadable].events == events[poisoned.unreadable] - 2
    if name == "registry":
        assert marks[poisoned.twice].events == events[poisoned.twice] - 2
        await catch_up(reference, good, projection)
        assert (await digest_view(views, projection)).digest == (await digest_view(reference, projection)).digest


async def test_the_marks_do_not_depend_on_how_batches_are_cut(views: Views, reference: Views) -> None:
    poisoned = Poisoned()
    await catch_up(views, poisoned.log, REGISTRY, batch_events=3)
    await catch_up(reference, poisoned.log, REGISTRY, batch_events=1000)
    plain = [[replace(mark, generation=UUID(int=0)) for mark in await list_marks(v)] for v in (views, reference)]
    cut = [[replace(mark, cause="") for mark in marks] for marks in plain]  # the databases word it differently
    assert cut[0] == cut[1] != []
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


async def test_a_projector_parks_too_and_goes_on_with_the_other_packages(views: Views, reference: Views) -> None:
    poisoned = Poisoned()
    async with projecting(views, poisoned.log, REGISTRY, times=2):
        await covers(views, REGISTRY, await poisoned.log.end())
        poisoned.log.append_raw(poisoned.log.partition_of(poisoned.gap), NONSENSE, str(poisoned.gap).encode())
        newcomer = History(9)
        package_id = newcomer.create("newcomer")
        poisoned.log.append(*newcomer.events)
        await covers(views, REGISTRY, await poisoned.log.end())
    await catch_up(reference, poisoned.log, REGISTRY)
    assert {mark.package_id for mark in await list_marks(views)} == poisoned.bad
    assert await Queries(views).package(package_id) is not None
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


@pytest.mark.parametrize("key", [b"", b"\xff\x00", b"x" * 3000])
async def test_a_record_whose_package_cannot_be_told_is_parked_under_its_key(views: Views, key: bytes) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=2, files=1)
    log.append_raw(0, NONSENSE, key)
    log.append(*history.events)
    log.append_raw(0, NONSENSE, key)
    await catch_up(views, log, REGISTRY)
    (mark,) = await list_marks(views)
    assert (mark.package_id, mark.offset, mark.events) == (None, 0, 2)
    assert mark.package.startswith("key")
    assert len((await view_rows(views))["artifact_packages"]) == 2


async def test_an_event_under_another_key_waits_under_that_key_and_a_retry_takes_no_other(views: Views) -> None:
    history, log = History(), MemoryLog(partitions=1)
    package_id = history.create()
    history.ingest(package_id, "a")
    created, ingested = history.events
    log.append(created)
    log.append_raw(0, NONSENSE, b"no package")
    log.append_raw(0, encode(ingested), b"no package")
    await catch_up(views, log, REGISTRY)
    before = await view_rows(views)
    (mark,) = await list_marks(views)
    assert (mark.package_id, mark.offset, mark.events) == (None, 1, 2)
    retried = await retry(views, log, mark)
    assert (retried.events, retried.mark) == (0, mark)
    assert await list_marks(views) == [mark]
    assert await view_rows(views) == before


async def test_an_event_under_a_key_that_is_not_its_package_is_not_folded(views: Views) -> None:
    history, log = History(), MemoryLog(partitions=1)
    package_id = history.create()
    (event,) = history.events
    log.append_raw(0, encode(event), b"no package")
    await catch_up(views, log, REGISTRY)
    (mark,) = await list_marks(views)
    assert "its key is not its package's id" in mark.cause
    assert await Queries(views).package(package_id) is None


async def test_what_is_wrong_in_a_field_that_no_fold_needs_is_parked_beside_an_event_that_cannot_be_applied(
    views: Views,
) -> None:
    history, log = History(), MemoryLog(partitions=1)
    unreadable, gap, good = (history.create(name) for name in ("unreadable", "gap", "good"))
    for package in (unreadable, gap, good):
        history.ingest(package, "a", "b")
    for event in history.events:
        value = encode(event)
        if event.package_id == unreadable and isinstance(event.payload, FileIngested):
            value = value.replace(b"tester", b"teste\xff")  # the actor, which is UTF-8
        if (event.package_id, event.sequence) != (gap, 2):
            log.append_raw(0, value, str(event.package_id).encode())
    await catch_up(views, log, REGISTRY)
    assert {mark.package_id for mark in await list_marks(views)} == {unreadable, gap}
    assert len((await view_rows(views))["artifact_files"]) == 2


def _kept_too_long(event: Event) -> Event:
    if isinstance(event.payload, PackageCreated):
        return replace(event, payload=replace(event.payload, retention_days=(1 << 31) - 1))
    return event


def _counted_too_late(event: Event) -> Event:
    """Kept to the last moment that a column takes when it is created, and beyond it when it is finalized."""
    if isinstance(event.payload, PackageCreated):
        days = ((1 << 63) - 1 - event.created_at) // MICROS_PER_DAY
        return replace(event, payload=replace(event.payload, retention_days=days))
    return replace(event, created_at=1 << 62) if isinstance(event.payload, PackageFinalized) else event


def _too_large_together(event: Event) -> Event:
    if isinstance(event.payload, FileIngested):
        return replace(event, payload=replace(event.payload, size_bytes=1 << 62))
    return event


@pytest.mark.parametrize("batch_events", [1, 1000])
@pytest.mark.parametrize(
    ("name", "change", "waiting"),
    [("retention", _kept_too_long, 4), ("retention", _counted_too_late, 1), ("usage", _too_large_together, 2)],
)
async def test_a_number_that_no_column_takes_parks_its_package(
    views: Views, name: str, change: Callable[[Event], Event], waiting: int, batch_events: int
) -> None:
    history, log = History(), MemoryLog(partitions=1)
    too_large, good = history.create("too large"), history.create("good")
    for package in (too_large, good):
        history.ingest(package, "a", "b")
        history.finalize(package)
    log.append(*(change(event) if event.package_id == too_large else event for event in history.events))
    await catch_up(views, log, PROJECTIONS[name], batch_events=batch_events)
    (mark,) = await list_marks(views)
    assert (mark.package_id, mark.events) == (too_large, waiting)


@pytest.mark.services
async def test_a_text_that_is_too_long_for_an_index_parks_its_package(postgres_url: str) -> None:
    history, log = History(), MemoryLog(partitions=1)
    package_id, good = history.create(), history.create()
    history.ingest(package_id, "a")
    history.ingest(good, "a")
    path = random.Random(1).randbytes(9_000).hex()  # which does not get shorter when it is compressed
    for event in history.events:
        if isinstance(event.payload, FileIngested) and event.package_id == package_id:
            event = replace(event, payload=replace(event.payload, relative_path=path))
        log.append(event)
    views = Views(postgres_url)
    await views.migrate()
    await catch_up(views, log, REGISTRY)
    for _ in range(2):
        (mark,) = await list_marks(views)
        assert (mark.package_id, mark.events) == (package_id, 1)
        await replay_view(views, log, REGISTRY)
    await views.close()


@pytest.mark.parametrize("name", ["registry", "usage"])
async def test_a_view_that_is_built_anew_beside_parks_the_same(views: Views, name: str) -> None:
    poisoned, projection = Poisoned(), PROJECTIONS[name]
    await catch_up(views, poisoned.log, projection)
    before = {mark.key: (mark.offset, mark.events) for mark in await list_marks(views)}
    done = await replay_view(views, poisoned.log, projection)
    assert {mark.key: (mark.offset, mark.events) for mark in await list_marks(views)} == before != {}
    assert (await digest_view(views, projection)).digest == done.digest
    async with views.reading() as connection:
        assert (await connection.execute(select(func.count()).select_from(parked_packages))).scalar_one() == len(before)


async def test_over_the_limit_a_projector_stops_and_says_what_to_do(views: Views) -> None:
    poisoned = Poisoned(partitions=1)
    views.max_parked = 2
    with pytest.raises(TooManyParkedError, match="artifact-store parked") as raised:
        await run_projection(views, poisoned.log, REGISTRY, asyncio.Event())
    assert "--max-parked" in raised.value.detail
    assert await list_marks(views) == []
    views.max_parked = 3
    await catch_up(views, poisoned.log, REGISTRY)
    assert len(await list_marks(views)) == 3


def forgive(monkeypatch: pytest.MonkeyPatch, package_id: UUID) -> None:
    """Let the registry refuse the package's second event, until the patch is undone."""
    fold = RegistryProjection.fold

    async def refuse(self: RegistryProjection, connection: AsyncConnection, tables: Tables, events: Any) -> None:
        if any(event.package_id == package_id and event.sequence == 2 for event in events):
            raise CorruptError("not understood yet")
        await fold(self, connection, tables, events)

    monkeypatch.setattr(RegistryProjection, "fold", refuse)


async def test_a_retry_brings_a_package_back_as_if_it_had_never_been_parked(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(partitions=2), History().fill(packages=5, files=4)
    log.append(*history.events)
    package_id = history.events[0].package_id
    with monkeypatch.context() as patch:
        forgive(patch, package_id)
        await catch_up(views, log, REGISTRY, batch_events=9)
        (mark,) = await list_marks(views)
        again = await retry(views, log, mark)
        assert (again.events, again.mark) == (0, mark)
        assert (await list_marks(views)) == [mark]
    done = await retry(views, log, mark)
    assert (done.events, done.mark) == (mark.events, None)
    assert await list_marks(views) == []
    await catch_up(reference, log, REGISTRY)
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest
    with pytest.raises(StaleCheckpointError, match="not parked"):
        await retry(views, log, mark)


async def test_a_retry_while_events_arrive_loses_and_doubles_nothing(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=5, files=8)
    package_id = history.events[0].package_id
    with monkeypatch.context() as patch:
        forgive(patch, package_id)
        log.append(*history.events[:40])
        await catch_up(views, log, REGISTRY)
        assert len(await list_marks(views)) == 1
    async with projecting(views, log, REGISTRY):

        async def arrive() -> None:
            for event in history.events[40:]:
                log.append(event)
                await asyncio.sleep(0.002)

        arriving = asyncio.create_task(arrive())

        async def brought_back() -> bool:
            found: list[Mark] = await list_marks(views)
            return not found or (await retry(views, log, found[0])).mark is None

        await eventually(brought_back, "the package is brought back")
        await arriving
        await covers(views, REGISTRY, await log.end())
    await catch_up(reference, log, REGISTRY)
    assert await list_marks(views) == []
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


class _Interrupted(MemoryLog):
    """Does something whenever a retry has read a batch and not yet gone on."""

    async def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        async with aclosing(super().scan(starts, ends)) as batches:
            async for batch in batches:
                meanwhile, self.meanwhile = self.meanwhile, None
                if meanwhile is not None:
                    await meanwhile()
                    self.meanwhile = meanwhile
                yield batch

    meanwhile: Callable[[], Awaitable[None]] | None = None


@pytest.mark.parametrize("batch_events", [3, 2000])
async def test_folds_go_on_while_a_retry_reads_the_log(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch, batch_events: int
) -> None:
    monkeypatch.setattr("services.views.engine.apply.BATCH_EVENTS", batch_events)
    log, history = _Interrupted(partitions=1), History().fill(packages=5, files=20)
    package_id = history.events[0].package_id
    later = [event for event in history.events if event.package_id != package_id][-30:]
    log.append(*(event for event in history.events if event not in later))
    with monkeypatch.context() as patch:
        forgive(patch, package_id)
        await catch_up(views, log, REGISTRY)
        (mark,) = await list_marks(views)

    async def one_more() -> None:
        if later:
            log.append(later.pop(0))
            async with asyncio.timeout(5):
                await catch_up(views, log, REGISTRY)

    log.meanwhile = one_more
    done = await retry(views, log, mark)
    log.meanwhile = None
    assert (done.events, done.mark) == (mark.events, None)
    log.append(*later)
    await catch_up(views, log, REGISTRY)
    await catch_up(reference, log, REGISTRY)
    assert await list_marks(views) == []
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


async def test_a_retry_comes_to_its_end_while_the_package_takes_events_in_every_moment(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = _Interrupted(partitions=1), History()
    package_id = history.create()
    history.ingest(package_id, *(f"{n}.txt" for n in range(40)))
    log.append(*history.events[:10])
    with monkeypatch.context() as patch:
        forgive(patch, package_id)
        await catch_up(views, log, REGISTRY)
        (mark,) = await list_marks(views)
    later, folds = history.events[10:], list[asyncio.Task[int]]()

    async def one_more() -> None:
        if later:
            log.append(later.pop(0))
            folding = asyncio.create_task(catch_up(views, log, REGISTRY))
            if not (await asyncio.wait([folding], timeout=0.5))[0]:  # the retry holds the view for its last events
                later.clear()
            folds.append(folding)

    log.meanwhile = one_more
    done = await retry(views, log, mark)
    log.meanwhile = None
    await asyncio.gather(*folds)
    assert done.mark is None
    assert done.events > mark.events
    await catch_up(views, log, REGISTRY)
    await catch_up(reference, log, REGISTRY)
    assert await list_marks(views) == []
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


async def test_a_package_parks_again_where_its_next_bad_event_is(views: Views, monkeypatch: pytest.MonkeyPatch) -> None:
    log, history = MemoryLog(partitions=1), History()
    package_id = history.create()
    history.ingest(package_id, "a", "b", "c", "d")
    log.append(*history.events[:3])
    log.append_raw(0, NONSENSE, str(package_id).encode())
    log.append(history.events[4])
    with monkeypatch.context() as patch:
        forgive(patch, package_id)
        await catch_up(views, log, REGISTRY)
        (mark,) = await list_marks(views)
    assert (mark.offset, mark.events) == (1, 4)
    again = (await retry(views, log, mark)).mark
    assert again is not None
    assert (again.offset, again.events) == (3, 2)
    assert "cannot be read" in again.cause
    with pytest.raises(StaleCheckpointError, match="not parked"):  # as one that began at the same time, and comes late
        await retry(views, log, mark)
    assert await list_marks(views) == [again]
    assert [file.relative_path for file in (await Queries(views).files(package_id)).items] == ["a", "b"]


async def test_a_package_may_park_again_however_few_may_be_parked(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=2, files=2)
    log.append(*history.events)
    with monkeypatch.context() as patch:
        forgive(patch, history.events[0].package_id)
        await catch_up(views, log, REGISTRY)
        (mark,) = await list_marks(views)
        views.max_parked = 0
        assert (await retry(views, log, mark)).mark == mark


async def test_a_view_that_is_folded_again_begins_without_marks(views: Views) -> None:
    poisoned = Poisoned()
    await catch_up(views, poisoned.log, REGISTRY)
    before = {mark.package for mark in await list_marks(views)}
    await reset(views, REGISTRY)
    assert await list_marks(views) == []
    await catch_up(views, poisoned.log, REGISTRY)
    assert {mark.package for mark in await list_marks(views)} == before


async def test_a_server_is_told_how_many_may_be_parked(embedded_settings: Settings, tmp_path: Path) -> None:
    async with open_registry(embedded_settings) as registry:
        await registry.create_package("name", "producer", "subject", "report")
    with closing(sqlite3.connect(embedded_settings.log_url.removeprefix("sqlite:///"))) as file, file:
        assert file.execute("UPDATE events SET value = x'00'").rowcount == 1
    views = Views(embedded_settings.views_url)
    await views.migrate()
    await reset(views, REGISTRY)
    await views.close()
    with started(embedded_settings, tmp_path, "serve", "--max-parked", "0") as (command, said):

        async def stopped() -> bool:
            assert command.poll() is None, said.read_text()
            return "registry stops: the view registry has parked 0 packages" in said.read_text()

        await eventually(stopped, "the registry's projection stops")
        command.terminate()
    assert command.returncode == 1
