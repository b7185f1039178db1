"""The projector: at least once in, exactly once in effect, through rebalances, failures, crashes and bad events."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import delete

from artifact_store.errors import CorruptError, InvalidRequestError, LogIdentityError, UnavailableError
from projector import run_projection, run_projectors
from projector.rebuild import replay_view
from services.config import Settings
from services.core.decide import Limits
from services.log.sqlite import SqliteLog, SqliteWriter
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import apply, catch_up, fold
from services.views.engine.checkpoints import Checkpoint, load_checkpoint
from services.views.engine.generations import reset
from services.views.engine.source import read_range
from services.views.projections import PROJECTIONS
from services.views.projections.registry_fold import RegistryProjection
from services.views.tables import artifact_files
from tests import commands
from tests.integration.projector_stage import WAIT_SECONDS, covers, eventually, projecting
from tests.memory_log import MemoryLog
from tests.views_history import History, view_rows

REGISTRY = PROJECTIONS["registry"]


async def same_as_one_fold(views: Views, reference: Views, log: MemoryLog) -> None:
    """The view is what one undisturbed fold of the log makes."""
    await catch_up(reference, log, REGISTRY)
    assert (await view_rows(views))["artifact_files"] == (await view_rows(reference))["artifact_files"]
    assert (await digest_view(views, REGISTRY)).digest == (await digest_view(reference, REGISTRY)).digest


async def test_what_is_appended_is_projected_and_shown_as_committed(views: Views, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=5, files=3)
    log.append(*history.events[:20])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
        log.append(*history.events[20:])
        await covers(views, REGISTRY, await log.end())

        async def shown() -> bool:
            return not any((await log.lag("registry")).values())

        await eventually(shown, "the lag is nothing")
    await same_as_one_fold(views, reference, log)
    generation = (await load_checkpoint(views, REGISTRY, log.id)).generation
    assert {metadata for _, metadata in log.groups["registry"].values()} == {str(generation)}


async def test_stopping_leaves_the_group(views: Views) -> None:
    log = MemoryLog()
    async with projecting(views, log, REGISTRY):

        async def joined() -> bool:
            return len(log.members) == 1

        await eventually(joined, "the projector joins")
    assert log.members == []


async def test_several_projectors_and_rebalances_apply_everything_once(views: Views, reference: Views) -> None:
    log, history = MemoryLog(partitions=4), History().fill(packages=12, files=4)
    async with projecting(views, log, REGISTRY, times=3):
        for i in range(0, len(history.events), 9):
            log.append(*history.events[i : i + 9])
            log.rebalance("registry")
            await asyncio.sleep(0)
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_two_that_own_the_same_partitions_apply_everything_once(views: Views, reference: Views) -> None:
    """Two groups that know nothing of each other, as when one member was cut off and does not know it yet."""
    log, history = MemoryLog(), History().fill(packages=8, files=4)
    stop = asyncio.Event()
    other = MemoryLog()
    other.id, other._records, other._ends, other._changed = log.id, log._records, log._ends, log._changed
    runs = [asyncio.create_task(run_projection(views, each, REGISTRY, stop)) for each in (log, other)]
    for i in range(0, len(history.events), 7):
        log.append(*history.events[i : i + 7])
        await asyncio.sleep(0.005)
    await covers(views, REGISTRY, await log.end())
    stop.set()
    await asyncio.gather(*runs)
    await same_as_one_fold(views, reference, log)


async def test_a_crash_between_the_view_and_the_log_applies_nothing_twice(views: Views, reference: Views) -> None:
    log, history = MemoryLog(partitions=1), History().fill(packages=4, files=2)
    log.append(*history.events)
    at = await load_checkpoint(views, REGISTRY, log.id)
    async with aclosing(read_range(log, at, {0: 10})) as batches:  # 5 events, a hole, 4 events
        await apply(views, REGISTRY, await anext(batches))
    assert log.groups == {}
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_progress_that_was_never_shown_is_shown_by_whoever_comes_next(views: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=4, files=2).events)
    await catch_up(views, log, REGISTRY)
    assert log.groups == {}
    async with projecting(views, log, REGISTRY):

        async def shown() -> bool:
            return not any((await log.lag("registry")).values())

        await eventually(shown, "the lag is nothing although nothing is left to fold")


async def test_an_answer_that_was_lost_after_the_commit_applies_nothing_twice(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(), History().fill(packages=4, files=2)
    lost = 0

    async def fold_and_lose(*args: Any, **more: Any) -> Checkpoint:
        nonlocal lost
        after = await fold(*args, **more)
        if lost < 3:
            lost += 1
            raise UnavailableError("the connection was lost while committing")
        return after

    monkeypatch.setattr("projector.runner.fold", fold_and_lose)
    async with projecting(views, log, REGISTRY):
        for event in history.events:
            log.append(event)
            await asyncio.sleep(0)
        await covers(views, REGISTRY, await log.end())
    assert lost > 0
    await same_as_one_fold(views, reference, log)


async def test_a_log_that_goes_away_for_a_while_costs_nothing(
    views: Views, reference: Views, caplog: pytest.LogCaptureFixture
) -> None:
    log, history = MemoryLog(), History().fill(packages=4, files=2)
    async with projecting(views, log, REGISTRY):
        log.append(*history.events[:10])
        await covers(views, REGISTRY, await log.end())
        log.unavailable = True

        async def noticed() -> bool:
            return "the log cannot be reached" in caplog.text

        await eventually(noticed, "the projector says that the log is away")
        log.unavailable = False
        log.append(*history.events[10:])
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_a_reset_under_a_running_projector_folds_everything_again(views: Views, reference: Views) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events[:-1])
    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        await reset(views, REGISTRY)
        log.append(history.events[-1])  # by which the member that has this partition sees that it is behind the times
        log.rebalance("registry")
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_a_reset_under_projectors_to_which_nothing_comes_folds_everything_again(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.views.engine.source.IDENTITY_SECONDS", 0.1)
    log = MemoryLog()
    log.append(*History().fill(packages=6, files=3).events)
    async with projecting(views, log, REGISTRY, times=2):
        await covers(views, REGISTRY, await log.end())
        await reset(views, REGISTRY)
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_a_log_that_lost_what_the_view_has_stops_the_projector(views: Views) -> None:
    log = MemoryLog(partitions=1)
    log.append(*History().fill(packages=2, files=2).events)
    await catch_up(views, log, REGISTRY)
    rows = await view_rows(views)
    log.truncate(0)
    with pytest.raises(CorruptError, match="replay registry"):
        await run_projection(views, log, REGISTRY, asyncio.Event())
    assert await view_rows(views) == rows


async def test_another_log_under_the_view_stops_the_projector(views: Views) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=2).events)
    await catch_up(views, log, REGISTRY)
    rows = await view_rows(views)
    log.id = uuid4()
    with pytest.raises(LogIdentityError):
        await run_projection(views, log, REGISTRY, asyncio.Event())
    assert await view_rows(views) == rows


async def test_another_log_in_the_place_of_a_silent_one_stops_the_projector(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.views.engine.source.IDENTITY_SECONDS", 0.1)
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=2).events)
    running = asyncio.create_task(run_projection(views, log, REGISTRY, asyncio.Event()))
    await covers(views, REGISTRY, await log.end())
    log.id = uuid4()  # and not one record comes
    with pytest.raises(LogIdentityError, match="created again"):
        await asyncio.wait_for(running, WAIT_SECONDS)


@pytest.mark.parametrize("members", [1, 3])
async def test_a_group_that_was_set_back_with_other_tools_folds_the_view_again_and_once(
    views: Views, reference: Views, members: int
) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events[:-5])
    async with projecting(views, log, REGISTRY, times=members):
        await covers(views, REGISTRY, await log.end())
    before = (await load_checkpoint(views, REGISTRY, log.id)).generation
    log.groups["registry"] = dict.fromkeys(range(3), (0, ""))
    async with views.writing() as connection:  # what only a fold of everything mends
        await connection.execute(delete(artifact_files))
    async with projecting(views, log, REGISTRY, times=members):

        async def shown() -> bool:
            return all(metadata for _, metadata in log.groups["registry"].values())

        await eventually(shown, "every partition carries a generation again")
        await covers(views, REGISTRY, await log.end())
        anew = (await load_checkpoint(views, REGISTRY, log.id)).generation
        for event in history.events[-5:]:
            log.rebalance("registry")
            log.append(event)
            await covers(views, REGISTRY, await log.end())
        assert (await load_checkpoint(views, REGISTRY, log.id)).generation == anew != before
    await same_as_one_fold(views, reference, log)


Groups = dict[int, tuple[int, str]]


def _one_to_the_start(ours: Groups) -> Groups:
    return {**ours, 1: (0, "")}


def _all_but_one_to_the_start(ours: Groups) -> Groups:
    return {**dict.fromkeys(ours, (0, "")), 2: ours[2]}


def _to_the_start_and_one_deleted(ours: Groups) -> Groups:
    return dict.fromkeys([0, 1], (0, ""))


def _to_the_end(ours: Groups) -> Groups:
    return {p: (offset + 7, "") for p, (offset, _) in ours.items()}


def _to_a_time(ours: Groups) -> Groups:
    return {p: (offset // 2, "") for p, (offset, _) in ours.items()}


SET = (_one_to_the_start, _all_but_one_to_the_start, _to_the_start_and_one_deleted, _to_the_end, _to_a_time)


@pytest.mark.parametrize("set_to", SET)
async def test_a_group_that_other_tools_set_elsewhere_stops_the_projector_and_leaves_the_view(
    views: Views, reference: Views, set_to: Callable[[Groups], Groups]
) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events[:-5])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    rows, before = await view_rows(views), await load_checkpoint(views, REGISTRY, log.id)
    log.groups["registry"] = set_to(log.groups["registry"])
    log.append(*history.events[-5:])
    with pytest.raises(CorruptError, match="artifact-store replay registry"):
        await asyncio.wait_for(run_projection(views, log, REGISTRY, asyncio.Event()), WAIT_SECONDS)
    assert await view_rows(views) == rows
    assert await load_checkpoint(views, REGISTRY, log.id) == before

    await replay_view(views, log, REGISTRY)
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


def _expired(ours: Groups) -> Groups:
    return {}


def _one_deleted(ours: Groups) -> Groups:
    return {p: ours[p] for p in ours if p != 1}


def _to_where_the_view_stands(ours: Groups) -> Groups:
    return {p: (offset, "") for p, (offset, _) in ours.items()}


@pytest.mark.parametrize("left", [_expired, _one_deleted, _to_where_the_view_stands])
async def test_offsets_that_are_gone_or_say_nothing_new_are_no_reset(
    views: Views, reference: Views, left: Callable[[Groups], Groups]
) -> None:
    log, history = MemoryLog(), History().fill(packages=6, files=3)
    log.append(*history.events[:-5])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    before = await load_checkpoint(views, REGISTRY, log.id)
    log.groups["registry"] = left(log.groups["registry"])
    log.append(*history.events[-5:])
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    assert (await load_checkpoint(views, REGISTRY, log.id)).generation == before.generation
    assert all(metadata for _, metadata in log.groups["registry"].values())
    await same_as_one_fold(views, reference, log)


async def test_a_projector_says_that_it_folds_again_before_the_view_is_empty(
    views: Views, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=3, files=2).events)
    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
    log.groups["registry"] = dict.fromkeys(range(3), (0, ""))
    said = []

    async def watched(*given: Any, **named: Any) -> UUID:
        said.append("is emptied and folded again" in caplog.text)
        return await reset(*given, **named)

    monkeypatch.setattr("services.views.engine.source.reset", watched)
    async with projecting(views, log, REGISTRY):
        await eventually(_returned(log), "every partition carries a generation again")
    assert said == [True]


def _returned(log: MemoryLog) -> Callable[[], Awaitable[bool]]:
    async def shown() -> bool:
        return all(metadata for _, metadata in log.groups["registry"].values())

    return shown


async def test_a_mistake_in_a_fold_is_shown_whole_and_tried_again(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("projector.runner._LONGEST_PAUSE", 0.05)
    log = MemoryLog()
    log.append(*History().fill(packages=3, files=2).events)

    async def mistaken(_self: RegistryProjection, *_given: Any) -> None:
        raise KeyError("a mistake in the fold")

    async def told() -> bool:
        return caplog.text.count("Traceback") > 1 and "a mistake in the fold" in caplog.text

    with monkeypatch.context() as patch:
        patch.setattr(RegistryProjection, "fold", mistaken)
        async with projecting(views, log, REGISTRY):
            await eventually(told, "the mistake is logged more than once")
            patch.undo()
            await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_a_table_that_is_away_for_a_while_holds_a_projector_up_and_ends_none_that_ran(
    views: Views, reference: Views, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("projector.runner._LONGEST_PAUSE", 0.05)
    log, history = MemoryLog(), History().fill(packages=3, files=2)
    log.append(*history.events[:-3])

    async def run(statement: str) -> None:
        async with views.writing() as connection:
            await connection.exec_driver_sql(statement)

    async def told() -> bool:
        return "trying again" in caplog.text

    async with projecting(views, log, REGISTRY):
        await covers(views, REGISTRY, await log.end())
        await run("ALTER TABLE artifact_packages RENAME TO away")
        log.append(*history.events[-3:])
        await eventually(told, "the projector is held up")
        await run("ALTER TABLE away RENAME TO artifact_packages")
        await covers(views, REGISTRY, await log.end())
    await same_as_one_fold(views, reference, log)


async def test_one_projection_that_stops_leaves_the_others_running(
    embedded_settings: Settings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    error = LogIdentityError("this is another log")

    async def refuse(_self: RegistryProjection, *_given: Any) -> None:
        raise error

    monkeypatch.setattr(RegistryProjection, "fold", refuse)
    log, views = SqliteLog(tmp_path / "log.db"), Views(embedded_settings.views_url)
    await log.migrate()
    await views.migrate()

    async def no_claim_check(_manifest: bytes) -> None:
        raise AssertionError("no manifest here is so large")

    writer = SqliteWriter(tmp_path / "log.db", limits=Limits(), put_manifest=no_claim_check)
    await writer.start()
    await writer.submit(commands.create())
    stop = asyncio.Event()
    running = asyncio.create_task(run_projectors(embedded_settings, [], stop))
    await covers(views, PROJECTIONS["retention"], await log.end())

    async def told() -> bool:
        return "registry stops" in caplog.text and str(error) in caplog.text

    await eventually(told, "the failure is logged")
    await writer.submit(commands.create("another"))
    await covers(views, PROJECTIONS["retention"], await log.end())
    stop.set()
    failed = await running
    assert list(failed) == ["registry"]
    assert any(record.levelno == logging.ERROR for record in caplog.records)
    for part in (writer, log, views):
        await part.close()


async def test_an_unknown_projection_is_refused(embedded_settings: Settings) -> None:
    with pytest.raises(InvalidRequestError, match="known: registry, retention, usage"):
        await run_projectors(embedded_settings, ["registry", "search"], asyncio.Event())
