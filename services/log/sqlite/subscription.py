"""A projection's membership in the embedded log: one member at a time, in any process, has the partition."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path

from artifact_store.errors import CorruptError, UnavailableError
from services.log.port import Batch, Record, StartOffsets
from services.log.sqlite.file import (
    PARTITION,
    LogFile,
    Readers,
    end_offset,
    file_errors,
    open_file,
    records_from,
    store_progress,
    write_lock,
)
from services.runtime.file_system import FileLock


def member_lock(path: Path, projection: str) -> Path:
    """The lock file of the member that has the projection's partition."""
    return path.with_name(f"{path.name}.{projection}.lock")


_NOTHING = Batch((), {})


class SqliteSubscription:
    """See `Subscription`. Having the partition is a lock on a file, which the system frees when a process dies."""

    def __init__(
        self, path: Path, readers: Readers, projection: str, start_offsets: StartOffsets, poll_seconds: float
    ) -> None:
        self._path = path
        self._readers = readers
        self._projection = projection
        self._start_offsets = start_offsets
        self._poll_seconds = poll_seconds
        self._lock = FileLock(member_lock(path, projection))
        self._next: int | None = None
        self._told = False  # whether the member heard that it was assigned nothing
        self._progress: LogFile | None = None

    @property
    def assigned(self) -> frozenset[int]:
        """See `Subscription`."""
        return frozenset() if self._next is None else frozenset({PARTITION})

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        """See `Subscription`. A member without the partition takes it here as soon as it is free."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_seconds
        while True:
            if self._next is None:
                await self._try_to_join()
            if self._next is not None:
                records = await self._read(self._next, max_records)
                if records:
                    self._next = records[-1].offset + 1
                    return Batch(records, {PARTITION: self._next})
            left = deadline - loop.time()
            if left <= 0:
                return _NOTHING
            await asyncio.sleep(min(self._poll_seconds, left))

    async def commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        """See `Subscription`. Raises PushBackError, and UnavailableError if this member does not have the partition."""
        if not next_offsets.keys() <= self.assigned:
            raise UnavailableError(f"{self._projection} commits a partition that is another member's")
        if next_offsets:
            await asyncio.to_thread(self._store, next_offsets[PARTITION], metadata)

    async def close(self) -> None:
        """See `Subscription`."""
        self._leave()
        progress, self._progress = self._progress, None
        if progress is not None:
            await asyncio.to_thread(progress.close)

    async def _try_to_join(self) -> None:
        with file_errors(self._path):
            taken = self._lock.take()
        if not taken:
            if not self._told:
                self._told = True
                await self._start_offsets([])
            return
        try:
            start = (await self._start_offsets([PARTITION]))[PARTITION]
            end = await self._readers.run(lambda file: end_offset(file.connection))
            if not 0 <= start <= end:
                raise CorruptError(
                    f"{self._projection} stands at offset {start}, which lies outside the log (0 to {end})"
                )
            self._next = start
        finally:
            if self._next is None:
                self._leave()

    def _leave(self) -> None:
        self._next = None
        self._lock.release()

    async def _read(self, start: int, max_records: int) -> list[Record]:
        def work(file: LogFile) -> list[Record]:
            found = records_from(file.connection, start, None, max_records)
            if not found and end_offset(file.connection) < start:
                raise CorruptError(f"the log is shorter than it was when {self._projection} stood at offset {start}")
            return found

        return await self._readers.run(work)

    def _store(self, next_offset: int, metadata: str) -> None:
        with file_errors(self._path):
            if self._progress is None:
                self._progress = open_file(self._path, writable=True)
                # Only for people to look at, so it does not wait for the disk, and a power cut may lose the last ones.
                self._progress.connection.execute("PRAGMA synchronous = NORMAL")
            self._progress.check_in_place()
            with write_lock(self._path):
                store_progress(self._progress.connection, self._projection, next_offset, metadata)
