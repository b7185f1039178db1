"""The embedded log's promises beyond the contract: many processes, sudden death, and foreign files."""

from __future__ import annotations

import asyncio
import random
import sqlite3
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import chain, islice
from pathlib import Path
from threading import Event
from typing import Any
from uuid import UUID

import pytest

from artifact_store.errors import ConfigurationError, CorruptError, LogIdentityError, PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from services.core.decide import Command, IngestCheck, Limits
from services.log.sequencer import queue
from services.log.sqlite import SqliteLog, SqliteWriter, file
from services.log.sqlite.driver import PackageStates, SqliteDriver
from services.runtime.file_system import FileLock
from tests.commands import create, finalize, ingest
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_process import hold_projection, process, reports_of, write, write_with_little_room
from tests.contract.log_stage import Projection, no_manifest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where the log is to be: neither it nor its folder is there yet."""
    return tmp_path / "a" / "new folder" / "log?.db"


@pytest.fixture
async def log(path: Path) -> AsyncIterator[SqliteLog]:
    log = SqliteLog(path, poll_seconds=0.01)
    yield log
    await log.close()


@pytest.fixture
async def writer(path: Path) -> AsyncIterator[SqliteWriter]:
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    yield writer
    await writer.close()


# Many processes


@pytest.mark.processes
async def test_processes_that_write_at_once_lose_nothing_and_share_packages(path: Path, log: SqliteLog) -> None:
    def run() -> list[tuple[Command, Acknowledgement]]:
        with ExitStack() as stack:
            running = [stack.enter_context(process(write, path, name, 25))[1] for name in ("ada", "bob", "cy")]
            return list(chain.from_iterable(reports_of(reports) for reports in running))

    done = await asyncio.to_thread(run)

    events = await read_valid(log)
    assert len(done) == 3 * 25 * 5
    assert len(events) == 25 + 3 * 25 * (2 + 1 + 3 + 1)
    assert_recorded_once(events, done)


@pytest.mark.processes
async def test_a_killed_writer_loses_nothing_that_it_acknowledged(path: Path, log: SqliteLog) -> None:
    chance = random.Random(20)
    answers: dict[Command, Acknowledgement] = {}

    def run_and_kill(reports_before: int) -> list[tuple[Command, Acknowledgement]]:
        with process(write, path, "ada", None) as (child, reports):
            some = list(islice(reports_of(reports), reports_before))
            child.kill()
            return some + list(reports_of(reports))

    for _ in range(6):
        # Every run repeats the commands of those before it: what was acknowledged must be answered alike.
        for command, answer in await asyncio.to_thread(run_and_kill, chance.randint(1, len(answers) + 150)):
            assert answers.setdefault(command, answer) == answer
        assert_recorded_once(await read_valid(log), answers.items())

    assert len(answers) > 100
    with closing(sqlite3.connect(path)) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchall() == [("ok",)]


async def test_a_projection_s_partition_is_free_again_when_its_holder_is_killed(
    path: Path, log: SqliteLog, writer: SqliteWriter
) -> None:
    await writer.submit(create())
    with process(hold_projection, path, "registry") as (child, reports):
        assert await asyncio.to_thread(reports.recv) == "assigned"
        projection = Projection(log)
        waiting = await projection.subscribe()
        await projection.poll(waiting)
        await projection.poll(waiting)
        assert (waiting.assigned, projection.asked, projection.records) == (frozenset(), [[]], [])

        other = Projection(log, "retention")
        beside = await other.subscribe()
        await other.catch_up(beside)
        await beside.close()

        child.kill()
        await projection.catch_up(waiting)
        await waiting.close()
    assert len(projection.records) == 1


async def test_a_member_without_the_partition_cannot_commit(log: SqliteLog, writer: SqliteWriter) -> None:
    await writer.submit(create())
    projection = Projection(log)
    one, two = await projection.subscribe(), await projection.subscribe()
    await projection.catch_up(one)
    await projection.poll(two)
    with pytest.raises(UnavailableError):
        await two.commit({0: 1}, "")
    await one.commit({0: 1}, "")
    await one.close()
    await two.close()

    assert await log.lag("registry") == {0: 0}


# Trouble


async def test_a_full_disk_refuses_commands_and_the_writer_goes_on_when_there_is_room(
    path: Path, log: SqliteLog
) -> None:
    await log.migrate()

    def run() -> list[Any]:
        with process(write_with_little_room, path, 300_000) as (_, reports):
            return list(reports_of(reports))

    found = await asyncio.to_thread(run)

    errors = [report for report in found if isinstance(report, str)]
    assert len(errors) == 1
    done = [report for report in found if not isinstance(report, str)]
    assert len(done) > 10
    events = await read_valid(log)
    assert len(events) == len(done)
    assert_recorded_once(events, done)


async def test_a_process_that_holds_the_file_pushes_others_back_without_a_trace(
    path: Path, log: SqliteLog, writer: SqliteWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "LOCK_SECONDS", 0.05)
    made = create()
    await writer.submit(made)
    held = FileLock(path.with_name(path.name + ".lock"))
    assert held.take()
    with pytest.raises(PushBackError):
        await writer.submit(ingest(made.package_id, "a"))
    # Questions do not wait for the lock.
    await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))
    held.release()

    assert len(await read_valid(log)) == 1
    await writer.submit(ingest(made.package_id, "a"))


async def test_a_full_queue_pushes_back_and_keeps_what_it_accepted(
    path: Path, log: SqliteLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    made = create()
    monkeypatch.setattr(queue, "MAX_WAITING_BYTES", 10 * queue.size_of(ingest(made.package_id, "a")))
    await writer.submit(made)
    held = FileLock(path.with_name(path.name + ".lock"))
    assert held.take()
    commands: list[Command] = [ingest(made.package_id, f"{n}", name=n) for n in range(100)]
    asked = [asyncio.ensure_future(writer.submit(command)) for command in commands]
    await asyncio.wait(asked, return_when=asyncio.FIRST_COMPLETED)
    held.release()
    answers = await asyncio.gather(*asked, return_exceptions=True)
    await writer.close()

    done = [(c, a) for c, a in zip(commands, answers, strict=True) if isinstance(a, Acknowledgement)]
    refused = [answer for answer in answers if not isinstance(answer, Acknowledgement)]
    assert {type(answer) for answer in refused} == {PushBackError}
    events = await read_valid(log)
    assert len(events) == 1 + len(done) > 10
    assert_recorded_once(events, done)


async def test_a_command_whose_commit_was_in_doubt_is_looked_up_and_recorded_once(
    log: SqliteLog, writer: SqliteWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, doubts = SqliteDriver.commit, iter(["recorded", "not recorded"])

    def in_doubt(driver: SqliteDriver, values: Sequence[bytes]) -> None:
        doubt = next(doubts, None)
        if doubt != "not recorded":
            commit(driver, values)
        if doubt is not None:
            raise UnavailableError("the disk gave no answer")

    monkeypatch.setattr(SqliteDriver, "commit", in_doubt)
    made = create()
    done = [(command, await writer.submit(command)) for command in (made, ingest(made.package_id, "a"))]

    events = await read_valid(log)
    assert len(events) == 2
    assert_recorded_once(events, done)


async def test_a_large_package_is_read_while_others_are_written_to(
    path: Path, log: SqliteLog, writer: SqliteWriter, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = create("large")
    for command in (large, ingest(large.package_id, *map(str, range(30)))):
        await writer.submit(command)
    monkeypatch.setattr("services.log.sqlite.driver.PackageStates", partial(PackageStates, large=20))
    loading, read = PackageStates.loading, Event()

    def load_late(states: PackageStates, package_id: UUID) -> Any:
        load = loading(states, package_id)

        def late() -> Any:
            assert read.wait(30)
            return load()

        return late

    monkeypatch.setattr(PackageStates, "loading", load_late)
    another = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await another.start()
    waiting = asyncio.ensure_future(another.submit(ingest(large.package_id, "later", name="later")))
    await another.submit(create("other"))
    # What others append meanwhile is read as well.
    await writer.submit(ingest(large.package_id, "meanwhile", name="meanwhile"))
    assert not waiting.done()
    read.set()
    assert (await waiting).sequence == 33
    await another.close()
    assert len(await read_valid(log)) == 34


async def test_a_writer_that_is_not_open_takes_nothing(path: Path, log: SqliteLog) -> None:
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    assert await writer.ready() is not None
    with pytest.raises(UnavailableError):
        await writer.submit(create())
    await writer.start()
    assert await writer.ready() is None
    await writer.close()
    with pytest.raises(UnavailableError):
        await writer.submit(create())

    assert await read_valid(log) == []


async def test_a_file_that_is_taken_away_is_noticed_and_another_one_refused(
    path: Path, log: SqliteLog, writer: SqliteWriter
) -> None:
    await writer.submit(create())
    position = await log.end()
    for part in path.parent.iterdir():
        part.unlink()
    with pytest.raises(UnavailableError):
        await writer.submit(create("later"))
    with pytest.raises(UnavailableError):
        await log.end()

    other = SqliteLog(path)
    await other.migrate()
    with pytest.raises(LogIdentityError):
        await writer.submit(create("later"))
    with pytest.raises(LogIdentityError):
        await log.end()
    with pytest.raises(LogIdentityError):
        await anext(other.read(position))
    assert await read_valid(other) == []
    await other.close()


async def test_a_log_that_became_shorter_stops_writer_reader_and_projection(
    path: Path, log: SqliteLog, writer: SqliteWriter
) -> None:
    made = create()
    await writer.submit(made)
    await writer.submit(ingest(made.package_id, "a"))
    projection = Projection(log)
    subscription = await projection.subscribe()
    await projection.catch_up(subscription)
    reading = log.read(follow=True)
    assert [(await anext(reading)).sequence for _ in range(2)] == [1, 2]
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM events WHERE offset = 1")

    with pytest.raises(CorruptError):
        await writer.submit(ingest(made.package_id, "b", name="b"))
    with pytest.raises(CorruptError):
        await anext(reading)
    with pytest.raises(CorruptError):
        await projection.poll(subscription)
    await subscription.close()
    assert len(await read_valid(log)) == 1


async def test_a_log_that_was_restored_from_an_older_copy_and_written_on_takes_nothing_more(
    path: Path, writer: SqliteWriter
) -> None:
    """As long as a process lives that knows what is missing; the file has as many events as it had."""
    await writer.submit(create("first"))
    with closing(sqlite3.connect(path)) as live, closing(sqlite3.connect(path.with_name("older"))) as older:
        live.backup(older)
        await writer.submit(create("lost"))
        older.backup(live)
    another = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await another.start()
    for name in ("after it", "and more"):
        await another.submit(create(name))
        with pytest.raises(CorruptError, match=r"record at offset 1 with .* the log holds a record"):
            await writer.submit(create("last"))
    await another.close()


async def test_a_log_with_a_gap_stops_reader_scan_and_projection(
    path: Path, log: SqliteLog, writer: SqliteWriter
) -> None:
    for name in ("first", "taken away", "last"):
        await writer.submit(create(name))
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("DELETE FROM events WHERE offset = 1")

    projection = Projection(log)
    subscription = await projection.subscribe()
    with pytest.raises(CorruptError, match="offset 1 is gone"):
        await projection.poll(subscription)
    await subscription.close()
    with pytest.raises(CorruptError, match="offset 1 is gone"):
        await read_valid(log)
    for start in (0, 1):
        with pytest.raises(CorruptError, match="offset 1 is gone"):
            _ = [batch async for batch in log.scan({0: start}, {0: 3})]
    assert [len(batch.records) async for batch in log.scan({0: 2}, {0: 3})] == [1]


async def test_a_record_that_cannot_be_decoded_is_named_and_nothing_behind_it_is_read(
    path: Path, log: SqliteLog, writer: SqliteWriter
) -> None:
    made, other = create(), create("other")
    for command in (made, ingest(made.package_id, "a"), other):
        await writer.submit(command)
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("UPDATE events SET value = x'c301' WHERE offset = 1")

    found: list[int] = []
    with pytest.raises(CorruptError, match="partition 0, offset 1"):
        found.extend([event.sequence async for event in log.read()])
    fresh = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await fresh.start()
    with pytest.raises(CorruptError, match="partition 0, offset 1"):
        await fresh.submit(finalize(made.package_id))
    await fresh.submit(finalize(other.package_id))
    await fresh.close()


# Files


async def test_a_log_is_created_with_its_folder_once_and_keeps_its_identity(path: Path, log: SqliteLog) -> None:
    with pytest.raises(UnavailableError, match="migrate"):
        await log.check()
    with pytest.raises(UnavailableError, match="migrate"):
        await log.identity()
    await log.migrate()
    identity = await log.identity()
    await log.migrate()
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    await writer.close()

    other = SqliteLog(path)
    assert await other.identity() == identity
    await other.close()


async def test_two_logs_never_have_the_same_identity(path: Path, log: SqliteLog) -> None:
    other = SqliteLog(path.with_name("other.db"))
    await log.migrate()
    await other.migrate()
    assert await log.identity() != await other.identity()
    await other.close()


@pytest.mark.parametrize("kind", ["text", "database", "newer"])
async def test_a_file_that_is_not_a_log_of_this_version_is_refused_and_left_alone(
    path: Path, log: SqliteLog, kind: str
) -> None:
    path.parent.mkdir(parents=True)
    if kind == "text":
        path.write_text("a shopping list\n" * 100)
    elif kind == "database":
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("CREATE TABLE shopping (item TEXT)")
    else:
        await log.migrate()
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("PRAGMA user_version = 99")
    before = path.read_bytes()

    with pytest.raises(ConfigurationError):
        await log.migrate()
    with pytest.raises(ConfigurationError):
        await log.check()
    with pytest.raises(ConfigurationError):
        await SqliteWriter(path, limits=Limits(), put_manifest=no_manifest).start()
    assert path.read_bytes() == before


async def test_creation_that_was_cut_short_is_completed(path: Path, log: SqliteLog) -> None:
    path.parent.mkdir(parents=True)
    path.touch()
    with pytest.raises(UnavailableError, match="migrate"):
        await log.check()
    await log.migrate()
    await log.check()


async def test_a_place_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    log = SqliteLog(tmp_path / "file" / "log.db")
    with pytest.raises(UnavailableError):
        await log.migrate()
    await log.close()


async def test_a_projection_s_name_cannot_leave_the_folder(log: SqliteLog) -> None:
    with pytest.raises(ConfigurationError):
        await Projection(log, "../registry").subscribe()


async def test_commits_reach_the_disk_before_they_return(path: Path, log: SqliteLog) -> None:
    await log.migrate()
    with closing(file.open_file(path, writable=True)) as opened:
        assert opened.connection.execute("PRAGMA synchronous").fetchone() == (2,)
        assert opened.connection.execute("PRAGMA journal_mode").fetchone() == ("wal",)
