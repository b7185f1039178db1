"""The connection to a SQLite file that the views use: one that may be closed twice at one time."""

from __future__ import annotations

import asyncio
import sqlite3
from typing import Any

import aiosqlite


class SqliteConnection(aiosqlite.Connection):
    """A connection whose thread is told to stop once.

    A task that is cancelled a second time while its connection is being closed stops it at once, beside the closing
    that is under way. aiosqlite (0.22.1) then waits for an answer of a thread that has ended, for ever, and so does the
    end of the event loop.
    """

    def stop(self) -> asyncio.Future[Any] | None:
        """Stop the thread, which closes the file; nothing happens when it was told before. Returns at once."""
        return super().stop() if self._running else None

    async def close(self) -> None:
        """Close the file and wait until that is done, unless the thread was told to stop before."""
        if self._running:
            await super().close()


def connect(path: str, **options: Any) -> SqliteConnection:
    """A connection to open by awaiting it, with the options of `sqlite3.connect`."""
    made = SqliteConnection(lambda: sqlite3.connect(path, **options), iter_chunk_size=64)
    made._thread.daemon = True  # as SQLAlchemy has it: a connection that was never closed must not hold the process
    return made
