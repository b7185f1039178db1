"""Closing a connection to views on SQLite always ends, even after a cancellation, and leaves no lock."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from services.views.database import SqliteConnection, connect


@pytest.fixture
async def connection(tmp_path: Path) -> SqliteConnection:
    opened = connect(str(tmp_path / "views.db"))
    await opened
    return opened


async def test_stopping_while_it_is_being_closed_lets_the_closing_end(connection: SqliteConnection) -> None:
    task = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # the closing has asked the connection's thread by now
    stopped = connection.stop()
    assert stopped is not None
    async with asyncio.timeout(10):
        await task
        await stopped  # or its thread would tell an event loop that is gone


async def test_closing_after_it_was_stopped_does_nothing(connection: SqliteConnection) -> None:
    stopped = connection.stop()
    assert stopped is not None
    async with asyncio.timeout(10):
        await stopped
        await connection.close()
        await connection.close()


async def test_closing_ends_the_transaction_though_a_cursor_lives_on(
    connection: SqliteConnection, tmp_path: Path
) -> None:
    await connection.execute("CREATE TABLE numbers (n INTEGER)")
    await connection.commit()
    await connection.execute("BEGIN IMMEDIATE")
    await connection.execute("INSERT INTO numbers VALUES (1), (2)")
    unread = await connection.execute("SELECT n FROM numbers")  # as a task that was cancelled leaves it
    await connection.close()
    with closing(sqlite3.connect(tmp_path / "views.db", timeout=0.0, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert other.execute("SELECT count(*) FROM numbers").fetchone() == (0,)
    assert unread.connection is not None
