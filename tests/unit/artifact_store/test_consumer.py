"""A durable consumer: each event is handled once, because its position is in the program's own transaction."""

from __future__ import annotations

import random
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing
from itertools import count
from pathlib import Path

import pytest

from artifact_store import DurableConsumer, EventFilter, EventSource, PositionTable, RecordedEvent, UnavailableError
from artifact_store import consumer as module
from artifact_store.errors import ConflictError, InvalidPositionError
from artifact_store.registry import Since
from services.config import Settings
from services.registry import Registry, open_events, open_registry

PACKAGES = 4
FILES = 3
EVENTS = PACKAGES * (FILES + 2)
FINALIZED = EventFilter(types={"v1.package.finalized"})


@pytest.fixture
async def registry(embedded_settings: Settings) -> AsyncIterator[Registry]:
    """Some packages of two producers."""
    async with open_registry(embedded_settings) as found:
        for number in range(PACKAGES):
            package = await found.create_package(f"p{number}", f"lab {number % 2}", "s", "report", "ada", {})
            for name in range(FILES):
                await found.ingest_file(package, f"{name}", "text/plain", b"x", "ada")
            await found.finalize_package(package, "ada")
        yield found


@pytest.fixture
def database(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    """The program's own, with a table of what was handled."""
    with closing(sqlite3.connect(tmp_path / "own.db")) as connection:
        connection.execute("CREATE TABLE handled (package TEXT, sequence INTEGER)")
        connection.execute("CREATE TABLE artifact_store_positions (consumer TEXT PRIMARY KEY, position TEXT NOT NULL)")
        yield connection


class Program:
    """Writes down each event in its database; fails where it is told to, before or after it has written."""

    def __init__(self, database: sqlite3.Connection, failures: Iterator[str | None] | None = None) -> None:
        self.database = database
        self._failures = failures or iter(())

    @asynccontextmanager
    async def begin(self) -> AsyncIterator[sqlite3.Connection]:
        with self.database:
            yield self.database

    async def handle(self, transaction: sqlite3.Connection, event: RecordedEvent) -> None:
        failure = next(self._failures, None)
        if failure == "before":
            raise RuntimeError
        transaction.execute("INSERT INTO handled VALUES (?, ?)", (str(event.package_id), event.sequence))
        if failure == "after":
            raise RuntimeError

    def consumer(self, source: EventSource, where: EventFilter | None = None) -> DurableConsumer[sqlite3.Connection]:
        return DurableConsumer(source, self.begin, PositionTable.sqlite3("mine"), where=where)

    @property
    def handled(self) -> list[tuple[str, int]]:
        return self.database.execute("SELECT package, sequence FROM handled ORDER BY rowid").fetchall()


async def all_events(registry: Registry) -> list[tuple[str, int]]:
    return [(str(event.package_id), event.sequence) async for event in registry.read_events()]


async def test_a_program_that_fails_again_and_again_handles_each_event_once(
    registry: Registry, database: sqlite3.Connection
) -> None:
    rng = random.Random(7)
    program = Program(database, (rng.choice(["before", "after", None]) for _ in count()))
    failures = 0
    while True:
        try:
            await program.consumer(registry).run(program.handle, follow=False)
            break
        except RuntimeError:
            failures += 1
    assert failures > EVENTS // 2
    assert program.handled == await all_events(registry)


async def test_what_comes_later_is_handled_by_the_next_run(registry: Registry, database: sqlite3.Connection) -> None:
    program = Program(database)
    await program.consumer(registry).run(program.handle, follow=False)
    await registry.create_package("later", "lab", "s", "report", "ada", {})
    await program.consumer(registry).run(program.handle, follow=False)
    assert program.handled == await all_events(registry)


async def test_of_two_consumers_with_one_position_the_slower_one_stops(
    registry: Registry, database: sqlite3.Connection
) -> None:
    program = Program(database)
    slower = Program(database)

    async def overtaken(transaction: sqlite3.Connection, event: RecordedEvent) -> None:
        if not program.handled:
            await program.consumer(registry, FINALIZED).run(program.handle, follow=False)
        await slower.handle(transaction, event)

    with pytest.raises(ConflictError, match="another consumer"):
        await slower.consumer(registry, FINALIZED).run(overtaken, follow=False)
    assert len(program.handled) == len(set(program.handled)) == PACKAGES


async def test_events_come_from_the_log_alone_as_they_come_from_the_registry(
    registry: Registry, embedded_settings: Settings, database: sqlite3.Connection
) -> None:
    program = Program(database)
    where = EventFilter(producers={"lab 1"}, types={"v1.package.finalized"})
    async with open_events(embedded_settings) as source:
        await program.consumer(source, where).run(program.handle, follow=False)
    assert program.handled == [
        (str(e.package_id), e.sequence) async for e in registry.events(where=where, follow=False)
    ]
    assert len(program.handled) == PACKAGES // 2


class Flaky:
    """A source that is away now and then, in the middle of a pass too."""

    def __init__(self, registry: Registry, away: list[bool]) -> None:
        self._registry = registry
        self._away = away
        self.begins: list[Since] = []

    async def read_events(
        self, since: Since = None, *, where: EventFilter | None = None, follow: bool = False
    ) -> AsyncIterator[RecordedEvent]:
        self.begins.append(since)
        async for event in self._registry.read_events(since, where=where):
            if self._away and self._away.pop(0):
                raise UnavailableError("away")
            yield event


async def test_a_source_that_is_away_is_waited_for(
    registry: Registry, database: sqlite3.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_FIRST_PAUSE_SECONDS", 0.001)
    program, source = Program(database), Flaky(registry, [True, False, False, True, True])
    await program.consumer(source).run(program.handle)
    assert program.handled == await all_events(registry)
    assert source.begins[0] is source.begins[1] is None
    assert source.begins[2] == source.begins[3]
    with database:
        database.execute("DELETE FROM artifact_store_positions")
    with pytest.raises(UnavailableError):
        await Program(database).consumer(Flaky(registry, [True]), FINALIZED).run(program.handle, follow=False)


async def test_a_stored_text_that_is_no_position_is_refused(registry: Registry, database: sqlite3.Connection) -> None:
    with database:
        database.execute("INSERT INTO artifact_store_positions VALUES ('mine', 'elsewhere')")
    program = Program(database)
    with pytest.raises(InvalidPositionError):
        await program.consumer(registry).run(program.handle, follow=False)
    assert program.handled == []
