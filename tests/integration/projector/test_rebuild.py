"""Rebuild: a view is built beside the live one, which is still read and folded, and then replaces it."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import Any
from uuid import UUID

import pytest
from sqlalchemy import Column, Index, MetaData, Table, Text, inspect, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import ConfigurationError, CorruptError, InvalidRequestError, PushBackError, UnavailableError
from artifact_store.events import Event
from artifact_store.position import Position
from projector import DigestMismatchError, RebuildOptions, rebuild
from projector.rebuild import ReplayProgress, replay_view
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up, list_marks
from services.views.engine.build_tables import create_index
from services.views.engine.generations import begin_build, building, drop_build, read_build, switch, this_process
from services.views.projections import PROJECTIONS, Projection
from services.views.projections.retention_fold import RetentionProjection
from services.views.queries import Queries
from services.views.tables import artifact_packages, projection_checkpoints, projection_generations, retention_state
from tests.integration.projector_stage import (
    covers,
    eventually,
    opened,
    position_of,
    projecting,
    same_as_a_fresh_fold,
)
from tests.memory_log import MemoryLog
from tests.views_history import History, view_rows

REGISTRY = PROJECTIONS["registry"]
VERIFY = RebuildOptions(verify=True)


async def schema_of(views: Views) -> Mapping[str, Any]:
    """Tables with their columns, keys and indexes; by name where names last (SQLite cannot rename an index)."""

    def look(connection: Any) -> Mapping[str, Any]:
        inspector, named = inspect(connection), views.dialect == "postgresql"
        found = {}
        for table in inspector.get_table_names():
            indexes = inspector.get_indexes(table)
            found[table] = (
                [(c["name"], str(c["type"]), c["nullable"]) for c in inspector.get_columns(table)],
                inspector.get_pk_constraint(table),
                sorted((i["name"] if named else "", i["column_names"], i["unique"]) for i in indexes),
            )
        return found

    async with views.reading() as connection:
        return await connection.run_sync(look)


async def building_of(views: Views, projection: Projection = REGISTRY) -> Any:
    async with views.reading(snapshot=True) as connection:
        return await read_build(connection, projection)


@pytest.mark.parametrize("name", PROJECTIONS)
async def test_a_view_that_was_built_anew_has_the_same_rows_tables_keys_and_indexes(views: Views, name: str) -> None:
    log, projection = MemoryLog(), PROJECTIONS[name]
    log.append(*History().fill(packages=6, files=3).events)
    for known in PROJECTIONS.values():
        await catch_up(views, log, known)
    rows, schema = await view_rows(views), await schema_of(views)
    for _ in range(2):  # the second meets the names that the first has left
        done = await replay_view(views, log, projection, options=VERIFY)
        assert done.matches is True
        assert await view_rows(views) == rows
        assert await schema_of(views) == schema
    async with views.reading() as connection:
        table = projection_checkpoints.c
        generations = (await connection.execute(select(table.generation).distinct())).scalars().all()
    assert len(generations) == len(PROJECTIONS)
    await views.migrate()


async def test_readers_see_no_gap_and_no_step_back_while_a_view_is_built_and_switched(
    views: Views, reference: Views
) -> None:
    log, history = MemoryLog(), History().fill(packages=12, files=6)
    first = len(history.events) // 3
    log.append(*history.events[:first])
    stop = asyncio.Event()
    known = sorted({event.package_id for event in history.events[:first]})
    queries, reads = Queries(views), 0

    async def read() -> None:
        nonlocal reads
        seen: dict[UUID, int] = {}
        listed, position = 0, Position(log.id, {})
        while not stop.is_set():
            for package_id in known:
                package = await queries.package(package_id)
                assert package is not None, "a package that was there is gone"
                assert package.last_event_sequence >= seen.get(package_id, 0)
                seen[package_id] = package.last_event_sequence
                files = (await queries.files(package_id, limit=100)).items
                finalized = package.status == "finalized"
                assert len(files) >= package.last_event_sequence - 1 - finalized
            packages = len((await queries.packages(limit=100)).items)
            at = await queries.checkpoint("registry")
            assert packages >= listed
            assert at is not None
            assert at.covers(position)
            listed, position = packages, at
            reads += 1

    async def write(events: list[Event]) -> None:
        for event in events:
            log.append(event)
            await asyncio.sleep(0.004)

    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        readers = [asyncio.create_task(read()) for _ in range(3)]
        writing = asyncio.create_task(write(history.events[first:]))
        rebuilt = 0
        while not writing.done() or rebuilt < 2 or reads <= 10:
            at_call = await log.end()
            done = await replay_view(views, log, REGISTRY, options=VERIFY if rebuilt == 1 else None)
            assert done.position.covers(at_call)
            rebuilt += 1
        await writing
        await covers(views, REGISTRY, await log.end())
        stop.set()
        await asyncio.gather(*readers)
    await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_what_is_folded_just_before_the_switch_is_in_the_view_behind_it(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events[:-5])
    await catch_up(views, log, REGISTRY)

    async def fold_and_switch(*given: Any) -> None:
        log.append(*history.events[-5:])
        await catch_up(views, log, REGISTRY)
        await switch(*given)

    monkeypatch.setattr(rebuild, "switch", fold_and_switch)
    done = await replay_view(views, log, REGISTRY)
    assert done.position.covers(await log.end())
    await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_build_that_is_behind_the_live_view_does_not_take_its_place(views: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=3, files=1).events)
    await catch_up(views, log, REGISTRY)
    before = await digest_view(views, REGISTRY)
    build = await begin_build(views, REGISTRY, log.id)

    async def fold_nothing(*_given: object) -> None:
        return

    with pytest.raises(UnavailableError, match="ahead of the build"):
        await switch(views, REGISTRY, build.generation, log.end, fold_nothing)
    assert await digest_view(views, REGISTRY) == before


async def test_projectors_go_on_in_the_new_generation(views: Views, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=4)
    half = len(history.events) // 2
    log.append(*history.events[:half])
    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        await replay_view(views, log, REGISTRY)
        log.append(*history.events[half:])
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)
        async with views.reading() as connection:
            generation = (
                await connection.execute(
                    select(projection_generations.c.generation).where(projection_generations.c.projection == "registry")
                )
            ).scalar_one()

        async def shown() -> bool:
            return str(generation) in {metadata for _, metadata in log.groups["registry"].values()}

        await eventually(shown, "the group's offsets carry the new generation")


class WiderRetention(RetentionProjection):
    """The next version of a projection: another column, another index."""

    layout = 2
    tables = (
        Table(
            "retention_state",
            MetaData(),
            *(Column(c.name, c.type, primary_key=c.primary_key, nullable=c.nullable) for c in retention_state.columns),
            Column("note", Text),
            Index("retention_state_by_class", "retention_class"),
        ),
    )

    async def fold(self, connection: AsyncConnection, tables: Mapping[str, Table], events: Any) -> None:
        await super().fold(connection, {"retention_state": _without_note(tables["retention_state"])}, events)
        await connection.execute(update(tables["retention_state"]).values(note="wider"))


def _without_note(table: Table) -> Table:
    columns = [Column(c.name, c.type, primary_key=c.primary_key) for c in table.columns if c.name != "note"]
    return Table(table.name, MetaData(), *columns)


async def test_a_changed_layout_is_built_beside_the_old_one(views: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=2)
    log.append(*history.events)
    old, wider = PROJECTIONS["retention"], WiderRetention()
    await catch_up(views, log, old)
    with pytest.raises(InvalidRequestError, match="layout"):
        await replay_view(views, log, wider, options=VERIFY)
    with pytest.raises(ConfigurationError, match="replay retention"):
        await catch_up(views, log, wider)
    before = (await view_rows(views))["retention_state"]
    done = await replay_view(views, log, wider)
    async with views.reading() as connection:
        rows = [tuple(row) for row in await connection.execute(select(wider.tables[0]).order_by("package_id"))]
    assert rows == [(*row, "wider") for row in before]
    assert done.position.covers(await log.end())
    with pytest.raises(ConfigurationError, match="layout 2"):
        await catch_up(views, log, old)


async def test_a_comparison_under_writes_and_projectors_finds_equal_digests(views: Views, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=6)
    log.append(*history.events[:60])

    async def write() -> None:
        for event in history.events[60:]:
            log.append(event)
            await asyncio.sleep(0.005)

    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        writing = asyncio.create_task(write())
        assert (await replay_view(views, log, REGISTRY, options=VERIFY)).matches is True
        await writing
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_view_that_is_not_what_the_log_says_is_found_and_replaced_when_told_to(
    views: Views, reference: Views
) -> None:
    log, history = MemoryLog(), History().fill(packages=4, files=2)
    log.append(*history.events)
    await catch_up(views, log, REGISTRY)
    async with views.writing() as connection:
        await connection.execute(update(artifact_packages).values(name="tampered"))
    wrong = await digest_view(views, REGISTRY)
    with pytest.raises(DigestMismatchError, match=str(wrong.digest)) as refused:
        await replay_view(views, log, REGISTRY, options=VERIFY)
    assert "artifact-store replay registry --drop" in refused.value.detail
    assert await digest_view(views, REGISTRY) == wrong
    kept = await building_of(views)
    assert kept.position.covers(await log.end())
    done = await replay_view(views, log, REGISTRY)
    assert done.events == 0, "what was built is used"
    await same_as_a_fresh_fold(views, reference, log, REGISTRY)
    async with views.writing() as connection:
        await connection.execute(update(artifact_packages).values(name="tampered"))
    options = RebuildOptions(verify=True, even_if_different=True)
    assert (await replay_view(views, log, REGISTRY, options=options)).matches is False
    await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_comparison_brings_a_view_that_lags_up_to_the_build(views: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=4, files=4)
    log.append(*history.events[:20])
    await catch_up(views, log, REGISTRY)
    log.append(*history.events[20:])
    assert (await replay_view(views, log, REGISTRY, options=VERIFY)).matches is True


async def test_one_builds_at_a_time_and_a_second_is_told_who(views: Views, views_url: str) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=3, files=1).events)
    await catch_up(views, log, REGISTRY)
    await begin_build(views, REGISTRY, log.id)
    async with opened(views_url) as other, building(other, REGISTRY):
        with pytest.raises(PushBackError, match=this_process()):
            await replay_view(views, log, REGISTRY)
        await replay_view(views, log, PROJECTIONS["retention"])
    await replay_view(views, log, REGISTRY)


async def interrupted(views: Views, log: MemoryLog, events: int) -> None:
    """A replay that ends early, as soon as so many events are folded."""

    def stop(seen: Any) -> None:
        if seen.events >= events:
            raise KeyError("interrupted")

    with pytest.raises(KeyError):
        await replay_view(views, log, REGISTRY, options=RebuildOptions(max_rate=500), progress=stop)


async def test_an_interrupted_build_is_gone_on_with_dropped_or_begun_anew(views: Views, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=30, files=6)
    log.append(*history.events)
    await catch_up(views, log, REGISTRY)
    schema = await schema_of(views)

    await interrupted(views, log, 100)
    left = await building_of(views)
    done = await replay_view(views, log, REGISTRY)
    assert done.events == len(history.events) - 100, "goes on at the build's checkpoint"

    await interrupted(views, log, 100)
    assert (await building_of(views)).generation != left.generation
    assert (await replay_view(views, log, REGISTRY, options=RebuildOptions(restart=True))).events == len(history.events)

    await interrupted(views, log, 100)
    assert await drop_build(views, REGISTRY) is True
    assert await drop_build(views, REGISTRY) is False
    assert await building_of(views) is None
    assert await schema_of(views) == schema
    await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_a_build_of_another_log_or_layout_is_begun_anew(views: Views) -> None:
    old, new = MemoryLog(), MemoryLog()
    old.append(*History(seed=1).fill(packages=30, files=6).events)
    history = History(seed=2).fill(packages=4, files=1)
    new.append(*history.events)
    await interrupted(views, old, 100)
    done = await replay_view(views, new, REGISTRY)
    assert done.events == len(history.events)
    assert done.position.covers(await new.end())
    # What the log has lost is in the build: it would not be what the log says.
    await interrupted(views, old, 100)
    for partition in range(3):
        old.truncate(partition)
    old.append(*history.events)
    assert (await replay_view(views, old, REGISTRY)).events == len(history.events)


async def test_a_live_view_beyond_the_log_s_end_is_replaced_by_what_the_log_has(views: Views) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=4, files=2)
    log.append(*history.events)
    await catch_up(views, log, REGISTRY)
    log.truncate(0)
    log.append(*history.events[:5])
    with pytest.raises(CorruptError, match="replay registry"):
        await catch_up(views, log, REGISTRY)
    done = await replay_view(views, log, REGISTRY)
    assert done.events == 5
    assert done.position.covers(await log.end())


async def test_a_rate_is_kept(views: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=10, files=6)
    log.append(*history.events)
    began = time.monotonic()
    done = await replay_view(views, log, REGISTRY, options=RebuildOptions(max_rate=100))
    assert time.monotonic() - began >= (done.events - 10) / 100


async def test_a_rate_below_that_of_what_arrives_is_told_and_ends_once_less_arrives(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("projector.rebuild._NEAR_EVENTS", 5)
    log, history = MemoryLog(), History().fill(packages=4, files=5)
    log.append(*history.events)
    told: list[ReplayProgress] = []

    def arrive(seen: ReplayProgress) -> None:
        told.append(seen)
        if not any(earlier.outrun for earlier in told):
            for _ in range(30):  # and no more than 20 are folded between two times
                history.create()
                log.append(history.events[-1])

    done = await replay_view(views, log, REGISTRY, options=RebuildOptions(max_rate=200), progress=arrive)
    assert any(seen.outrun and seen.phase == "catch up" for seen in told)
    assert done.position.covers(await log.end())


async def test_a_build_parks_what_the_live_view_has_parked(views: Views) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=3, files=2)
    behind_a_gap, doubled = history.create(), history.create()
    history.ingest(behind_a_gap, "a", "b", "c")
    history.ingest(doubled, "a", "b", "c")
    *rest, a, b, c = history.events
    log.append(*(event for event in rest if (event.package_id, event.sequence) != (behind_a_gap, 3)))
    log.append(a, replace(b, payload=a.payload), c)
    await catch_up(views, log, REGISTRY)
    live = await list_marks(views, "registry")
    assert {mark.package_id for mark in live} == {behind_a_gap, doubled}
    assert (await replay_view(views, log, REGISTRY, options=VERIFY)).matches is True
    built = await list_marks(views, "registry")
    alike: Any = {"generation": UUID(int=0), "cause": ""}
    assert [replace(mark, **alike) for mark in built] == [replace(mark, **alike) for mark in live]


@pytest.mark.services
async def test_no_index_of_a_build_is_still_made_when_the_next_build_begins(
    postgres_url: str, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    running: set[str] = set()
    both = asyncio.Barrier(2)
    begun: list[set[str]] = []

    async def make(connection: AsyncConnection, statement: str, **options: Any) -> None:
        running.add(statement)
        try:
            if await both.wait() == 0:
                raise CorruptError("a row that no key allows")
            await asyncio.Event().wait()
        finally:
            running.discard(statement)

    async def begin(*arguments: Any, **options: Any) -> Any:
        begun.append(set(running))
        if len(begun) == 2:
            monkeypatch.setattr(rebuild, "create_index", create_index)
        return await begin_build(*arguments, **options)

    monkeypatch.setattr(rebuild, "create_index", make)
    monkeypatch.setattr(rebuild, "begin_build", begin)
    monkeypatch.setattr(rebuild, "_cores", lambda: 2)
    async with opened(postgres_url) as views:
        await replay_view(views, log, REGISTRY)
        assert begun == [set(), set()]
        await same_as_a_fresh_fold(views, reference, log, REGISTRY)


async def test_what_is_built_is_named_after_its_process(views: Views) -> None:
    log = MemoryLog()
    built = await begin_build(views, REGISTRY, log.id)
    found = await building_of(views)
    assert (found.generation, found.builder) == (built.generation, this_process())
    assert str(os.getpid()) in found.builder
    assert await position_of(views, REGISTRY) is None
