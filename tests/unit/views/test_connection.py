"""A views connection that is stopped while it is being closed, as a second cancellation does, ends and hangs nobody."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from services.views.database import SqliteConnection, connect


@pytest.fixture
async def connection(tmp_path: Path) -> SqliteConnection:
    opened = connect(str(tmp_path / "views.db"))
    await opened
    return opened


async def test_stopping_while_it_is_being_closed_lets_the_closing_end(connection: SqliteConnection) -> None:
    closing = asyncio.create_task(connection.close())
    await asyncio.sleep(0)  # the closing has asked the connection's thread by now
    stopped = connection.stop()
    assert stopped is not None
    async with asyncio.timeout(10):
        await closing
        await stopped  # or its thread would tell an event loop that is gone


async def test_closing_after_it_was_stopped_does_nothing(connection: SqliteConnection) -> None:
    stopped = connection.stop()
    assert stopped is not None
    async with asyncio.timeout(10):
        await stopped
        await connection.close()
        await connection.close()
