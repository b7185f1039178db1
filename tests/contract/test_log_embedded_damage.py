"""Readers and writers on an embedded log whose rows or file are damaged."""

from __future__ import annotations

import sqlite3
from collections.abc import AsyncIterator
from contextlib import closing
from pathlib import Path
from uuid import UUID

import pytest

from artifact_store.errors import CorruptError
from artifact_store.position import Position
from services.core.decide import Limits
from services.log.port import Record
from services.log.sqlite import SqliteLog, SqliteWriter
from tests.commands import create, ingest
from tests.contract.log_stage import no_manifest

MADE = create()
PACKAGE = MADE.package_id


@pytest.fixture
async def log(tmp_path: Path) -> AsyncIterator[SqliteLog]:
    """A log with three events of one package, at offsets 0 to 2."""
    path = tmp_path / "log.db"
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    for command in (MADE, ingest(PACKAGE, "a", name="a"), ingest(PACKAGE, "b", name="b")):
        await writer.submit(command)
    await writer.close()
    log = SqliteLog(path)
    yield log
    await log.close()


def change(log: Path, statement: str) -> None:
    with closing(sqlite3.connect(log)) as file, file:
        assert file.execute(statement).rowcount == 1


async def refused(path: Path) -> None:
    """A writer that knows nothing yet appends nothing to the package."""
    writer = SqliteWriter(path, limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    try:
        with pytest.raises(CorruptError):
            await writer.submit(ingest(PACKAGE, "c", name="c"))
    finally:
        await writer.close()


async def read(log: SqliteLog, package_id: UUID | None, since: Position | None = None) -> list[int]:
    return [event.sequence async for event in log.read(since, package_id=package_id)]


async def records(log: SqliteLog) -> list[Record]:
    return [record async for batch in log.scan({0: 0}, (await log.end()).offsets) for record in batch.records]


@pytest.mark.parametrize("offset", [1, 2])
@pytest.mark.parametrize("number", ["30", "'no number'", "x'ff'", "CAST(x'ff' AS TEXT)"])
async def test_an_event_that_is_listed_under_another_number_stops_readers_and_writers_of_its_package(
    log: SqliteLog, tmp_path: Path, number: str, offset: int
) -> None:
    change(tmp_path / "log.db", f"UPDATE events SET sequence = {number} WHERE offset = {offset}")
    since = Position(await log.identity(), {0: offset + 1})
    for start in (None, since):
        with pytest.raises(CorruptError, match=r"is listed as event|event 2 .* is gone from the log"):
            await read(log, PACKAGE, start)
    await refused(tmp_path / "log.db")
    assert await read(log, None) == [1, 2, 3]  # the events themselves are whole


@pytest.mark.parametrize("value", ["7", "'text'", "CAST(x'ff' AS TEXT)", "x''"])
async def test_a_record_whose_value_is_no_event_stops_readers_and_writers_by_its_place(
    log: SqliteLog, tmp_path: Path, value: str
) -> None:
    change(tmp_path / "log.db", f"UPDATE events SET value = {value} WHERE offset = 1")
    for package_id in (PACKAGE, None):
        with pytest.raises(CorruptError, match="partition 0, offset 1"):
            await read(log, package_id)
    await refused(tmp_path / "log.db")
    assert [record.offset for record in await records(log)] == [0, 1, 2]


@pytest.mark.parametrize("package_id", ["7", "'text'", "CAST(x'ff' AS TEXT)", "x'00'"])
async def test_a_record_whose_package_id_is_none_is_a_record_without_key(
    log: SqliteLog, tmp_path: Path, package_id: str
) -> None:
    change(tmp_path / "log.db", f"UPDATE events SET package_id = {package_id} WHERE offset = 1")
    key = str(PACKAGE).encode()
    assert [record.key for record in await records(log)] == [key, b"", key]
    assert await read(log, None) == [1, 2, 3]
    with pytest.raises(CorruptError, match=r"event 2 .* is gone from the log"):
        await read(log, PACKAGE)
    await refused(tmp_path / "log.db")


@pytest.mark.parametrize("statement", ["UPDATE log SET identity = x'00'", "DELETE FROM log"])
async def test_a_log_that_does_not_say_which_it_is_is_damaged(log: SqliteLog, tmp_path: Path, statement: str) -> None:
    change(tmp_path / "log.db", statement)
    with pytest.raises(CorruptError, match="which log it is"):
        await log.end()
    with pytest.raises(CorruptError, match="which log it is"):
        await SqliteWriter(tmp_path / "log.db", limits=Limits(), put_manifest=no_manifest).start()


async def test_a_whole_file_shows_no_damage_also_while_it_is_written_to(log: SqliteLog, tmp_path: Path) -> None:
    writer = SqliteWriter(tmp_path / "log.db", limits=Limits(), put_manifest=no_manifest)
    await writer.start()
    await writer.submit(ingest(PACKAGE, "c", name="c"))
    assert list(await log.damage()) == []
    await writer.close()
