"""Filling a log's file that nobody writes to with events of another log."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

from artifact_store.errors import ConflictError
from services.log.port import Record
from services.log.sqlite.file import decoded, end_offset, file_errors, open_file, write_lock


class SqliteFiller:
    """See `LogFiller`. Takes events alone: the file lists each by package and sequence."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end: int | None = None

    async def begin(self) -> None:
        """See `LogFiller`."""
        await asyncio.to_thread(self._see_end)

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        """See `LogFiller`. Raises CorruptError: a record is no event, or its package has one of its number."""
        await asyncio.to_thread(self._append, records)

    async def settle(self) -> None:
        """See `LogFiller`. What is committed can be read at once."""

    async def close(self) -> None:
        """See `LogFiller`."""

    def _see_end(self) -> None:
        with file_errors(self._path), closing(open_file(self._path)) as file:
            self._end = end_offset(file.connection)

    def _append(self, records: Sequence[Record]) -> None:
        events = [decoded(record) for record in records]
        # A transaction that is not committed ends with its connection, before the lock is released.
        with file_errors(self._path), write_lock(self._path), closing(open_file(self._path, writable=True)) as file:
            file.connection.execute("BEGIN IMMEDIATE")
            end = end_offset(file.connection)
            if end != self._end:
                raise ConflictError(f"another process has written to {self._path}: end it, and try again")
            rows = [
                (offset, event.package_id.bytes, event.sequence, event.command_id.bytes, record.value)
                for offset, (event, record) in enumerate(zip(events, records, strict=True), end)
            ]
            file.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
            file.connection.execute("COMMIT")
        self._end = end + len(records)
