"""Appending to the embedded log.

`SqliteWriter` is the `CommandWriter` port on the sequencer, with one partition and no router. `SqliteFiller` fills a
log's file with events of another log, while nobody else writes to it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence
from contextlib import closing
from pathlib import Path
from typing import cast
from uuid import UUID

from artifact_store.errors import ConflictError, UnavailableError
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from services.core.decide import Command, IngestCheck, Limits
from services.log.port import PackageExtent, PartitionStatus, PutManifest, Record
from services.log.sequencer.partition_writer import FairLock, PartitionWriter, WriterContext
from services.log.sequencer.queue import Counts
from services.log.sqlite.driver import SqliteDriver
from services.log.sqlite.file import PARTITION, create_file, decoded, end_offset, file_errors, open_file, write_lock
from services.runtime.clock import Clock, system_clock

SUBMIT_SECONDS = 30.0
"""How long a request may wait for its answer."""


class SqliteWriter:
    """The writer of the file at `path`, which `start` creates if it is missing."""

    def __init__(self, path: Path, *, limits: Limits, put_manifest: PutManifest, clock: Clock = system_clock) -> None:
        self._path = path
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._writer: PartitionWriter | None = None
        self._since: int | None = None

    async def start(self) -> None:
        """See `CommandWriter`. Raises UnavailableError, ConfigurationError, PushBackError."""
        context = WriterContext(
            driver=SqliteDriver(self._path, await asyncio.to_thread(self._prepare)),
            limits=self._limits,
            put_manifest=self._put_manifest,
            clock=self._clock,
            loop=asyncio.get_running_loop(),
            submit_seconds=SUBMIT_SECONDS,
            counts=Counts(),
            fair_lock=FairLock(),
        )
        self._writer = PartitionWriter(PARTITION, context)
        self._writer.start()
        self._since = self._clock()

    async def submit(self, command: Command) -> Acknowledgement:
        """See `CommandWriter`."""
        return cast("Acknowledgement", await self._started().submit(command))

    async def check_ingest(self, asked: IngestCheck) -> str:
        """See `CommandWriter`."""
        return cast("str", await self._started().submit(asked))

    def announce(self, package_id: UUID) -> None:
        """See `CommandWriter`. Does nothing: a write to the file takes so long that commands gather anyway."""

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """See `CommandWriter`. Always None: the file finds a package's events by an index."""
        return None

    async def end(self, partitions: Collection[int]) -> Position:
        """See `CommandWriter`. The file gives the end: it has one writer at a time, and readers see all of it."""

        def look() -> Position:
            with closing(open_file(self._path)) as file:
                return Position(file.identity, {PARTITION: end_offset(file.connection)})

        return await asyncio.to_thread(look)

    async def ready(self) -> str | None:
        """See `CommandWriter`."""
        return None if self._writer is not None else "the log's writer is not started"

    async def status(self) -> Sequence[PartitionStatus]:
        """See `CommandWriter`. Every writer of the file owns the partition: they take turns."""
        owner = None if self._since is None else "this process"
        return [PartitionStatus(PARTITION, owner, self._since)]

    async def close(self) -> None:
        """See `CommandWriter`."""
        writer, self._writer, self._since = self._writer, None, None
        if writer is not None:
            while waiting := writer.unanswered():
                await asyncio.wait(waiting)
            writer.stop()
            await asyncio.to_thread(writer.join, SUBMIT_SECONDS)

    def _prepare(self) -> UUID:
        create_file(self._path)
        with closing(open_file(self._path)) as file:
            return file.identity

    def _started(self) -> PartitionWriter:
        if self._writer is None:
            raise UnavailableError("the log's writer is not open")
        return self._writer


class SqliteFiller:
    """See `LogFiller`. Takes only events, because the file lists each by package and sequence."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._end: int | None = None

    async def begin(self) -> None:
        """See `LogFiller`."""
        await asyncio.to_thread(self._see_end)

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        """See `LogFiller`. Raises CorruptError: a record is not an event, or its package already has its sequence."""
        await asyncio.to_thread(self._append, records)

    async def settle(self) -> None:
        """See `LogFiller`. Does nothing: committed events can be read at once."""

    async def close(self) -> None:
        """See `LogFiller`."""

    def _see_end(self) -> None:
        with file_errors(self._path), closing(open_file(self._path)) as file:
            self._end = end_offset(file.connection)

    def _append(self, records: Sequence[Record]) -> None:
        events = [decoded(record) for record in records]
        # An uncommitted transaction ends with its connection, before the lock is released.
        with file_errors(self._path), write_lock(self._path), closing(open_file(self._path, writable=True)) as file:
            file.connection.execute("BEGIN IMMEDIATE")
            end = end_offset(file.connection)
            if end != self._end:
                raise ConflictError(f"another process has written to {self._path}: stop it, and try again")
            rows = [
                (offset, event.package_id.bytes, event.sequence, event.command_id.bytes, record.value)
                for offset, (event, record) in enumerate(zip(events, records, strict=True), end)
            ]
            file.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
            file.connection.execute("COMMIT")
        self._end = end + len(records)
