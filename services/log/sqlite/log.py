"""Reading the embedded log: the port `Log` on the SQLite file."""

from __future__ import annotations

import asyncio
import re
import sqlite3
from collections import OrderedDict
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from uuid import UUID

from artifact_store.errors import ConfigurationError, CorruptError, InvalidPositionError, UnavailableError
from artifact_store.events import Event, PackageCreated, RecordedEvent
from artifact_store.position import Position
from schemas.headers import headers as headers_of
from services.log.port import Batch, PackageExtent, Record, Settled, StartOffsets, Subscription
from services.log.sqlite.file import (
    BATCH_RECORDS,
    PARTITION,
    LogFile,
    Readers,
    create_file,
    decoded,
    end_offset,
    file_errors,
    numbered,
    open_file,
    package_records_from,
    progress_of,
    records_from,
    sequence_before,
    store_progress,
    write_lock,
)
from services.runtime.file_system import FileLock

_FIELDS = tuple(Event.__slots__)
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
"""The form of a projection's name, which becomes part of a file name."""


class SqliteLog:
    """The log in the file at `path`. The file need not exist until `migrate` is called or a writer has started.

    Subscriptions look for new events, and for a partition that has become free, every `poll_seconds`.
    """

    def __init__(self, path: Path, *, poll_seconds: float = 0.1) -> None:
        self._path = path
        self._poll_seconds = poll_seconds
        self._readers = Readers(path)

    async def identity(self) -> UUID:
        """See `Log`."""
        return await self._readers.run(lambda file: file.identity)

    async def partitions(self) -> int:
        """Always one."""
        return 1

    @property
    def topic(self) -> None:
        """See `Log`."""
        return None

    def partition_of(self, package_id: UUID) -> int:
        """Always the only one."""
        return PARTITION

    async def end(self, covering: Position | None = None) -> Position:
        """See `Log`."""
        return await self._readers.run(lambda file: Position(file.identity, {PARTITION: end_offset(file.connection)}))

    async def at_time(self, created_at: int) -> Position:
        """See `Log`. A binary search over all events, because times never decrease."""

        def work(file: LogFile) -> Position:
            earliest, end = 0, end_offset(file.connection)
            latest = end
            while earliest < latest:
                middle = (earliest + latest) // 2
                record = next(iter(records_from(file.connection, middle, end, 1)))
                if decoded(record).created_at < created_at:
                    earliest = record.offset + 1
                else:
                    latest = middle
            return Position(file.identity, {PARTITION: earliest})

        return await self._readers.run(work)

    async def read(
        self,
        since: Position | None = None,
        *,
        package_id: UUID | None = None,
        extent: PackageExtent | None = None,
        until: Position | None = None,
        follow: bool = False,
        poll_seconds: float = 0.1,
    ) -> AsyncGenerator[RecordedEvent]:
        """See `Log`."""
        cursor = await self._readers.run(lambda file: _Cursor(file, since, package_id, until, follow))
        while True:
            events = await self._readers.run(cursor.next_batch)
            for event in events:
                yield event
            if not events:
                if not follow:
                    return
                await asyncio.sleep(poll_seconds)

    async def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        """See `Log`."""
        at, end = starts.get(PARTITION, 0), ends.get(PARTITION, 0)
        derived = _DerivedHeaders() if headers else None
        while at < end:
            records = await self._readers.run(_between(at, end))
            if derived is not None:
                records = await self._readers.run(derived.added_to(records))
            if not records:
                raise CorruptError("the log is shorter than it was: events that were read before are gone")
            at = records[-1].offset + 1
            yield Batch(records, {PARTITION: at})

    async def subscribe(
        self, projection: str, start_offsets: StartOffsets, settled: Settled | None = None
    ) -> Subscription:
        """See `Log`. The partition belongs to one member at a time, in any process; the others wait."""
        if not _NAME.fullmatch(projection):
            raise ConfigurationError(f"{projection!r} is not a valid name of a projection")
        return SqliteSubscription(self._path, self._readers, projection, start_offsets, self._poll_seconds)

    async def damage(self) -> Sequence[str]:
        """See `Log`. SQLite checks every page, and looks up every event by package and sequence, in bounded memory.

        Takes a few seconds per GiB, plus the time to read the disk. Meanwhile the `-wal` file can only grow.
        """
        looking: list[sqlite3.Connection] = []

        def work(file: LogFile) -> list[str]:
            looking.append(file.connection)
            try:
                found = file.connection.execute("PRAGMA integrity_check").fetchall()  # at most a hundred problems
            finally:
                looking.clear()
            return [" ".join(str(text).split()) for (text,) in found if text != "ok"]

        try:
            return await self._readers.run(work)
        except asyncio.CancelledError:
            for connection in looking:  # so that closing the log does not wait for it
                with suppress(sqlite3.ProgrammingError):
                    connection.interrupt()
            raise

    async def committed(self, projection: str) -> Mapping[int, tuple[int, str]]:
        """See `Log`."""
        return await self._readers.run(lambda file: progress_of(file.connection, projection))

    async def show(self, projection: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        """See `Log`."""

        def work() -> bool:
            lock = FileLock(member_lock(self._path, projection))
            with file_errors(self._path):
                if not lock.take():
                    return False
                try:
                    with closing(open_file(self._path, writable=True)) as file, write_lock(self._path):
                        store_progress(file.connection, projection, next_offsets[PARTITION], metadata)
                finally:
                    lock.release()
            return True

        return await asyncio.to_thread(work)

    async def lag(self, projection: str) -> Mapping[int, int]:
        """See `Log`."""

        def work(file: LogFile) -> Mapping[int, int]:
            committed, _ = progress_of(file.connection, projection).get(PARTITION, (0, ""))
            return {PARTITION: max(0, end_offset(file.connection) - committed)}

        return await self._readers.run(work)

    async def migrate(self) -> None:
        """See `Log`. Also creates the folder."""
        await asyncio.to_thread(create_file, self._path)

    async def check(self) -> None:
        """See `Log`."""
        await self._readers.run(lambda file: end_offset(file.connection))

    async def close(self) -> None:
        """See `Log`."""
        await self._readers.close()


class _Cursor:
    """How far one reader has read. Its methods block and are called one after another."""

    def __init__(
        self, file: LogFile, since: Position | None, package_id: UUID | None, until: Position | None, follow: bool
    ) -> None:
        end = end_offset(file.connection)
        self._offset = 0 if since is None else _start(since, file.identity, end)
        if until is not None:
            until.require(file.identity)
            end = min(end, until.offsets.get(PARTITION, 0))
        self._end = None if follow else end
        self._package_id = package_id
        self._sequence = 0 if package_id is None else sequence_before(file.connection, package_id, self._offset)

    def next_batch(self, file: LogFile) -> list[RecordedEvent]:
        """Read the next events; empty if there are none at the moment."""
        if self._package_id is None:
            read, records = decoded, records_from(file.connection, self._offset, self._end, BATCH_RECORDS)
        else:
            by = self._package_id, self._sequence
            read, records = numbered, package_records_from(file.connection, *by, self._end, BATCH_RECORDS)
        events = []
        for record in records:
            event = read(record)
            if self._package_id is not None and event.sequence != self._sequence + 1:
                raise CorruptError(
                    f"event {self._sequence + 1} of package {self._package_id} is gone from the log, or from its index"
                )
            self._sequence = event.sequence
            position = Position(file.identity, {PARTITION: record.offset + 1})
            events.append(RecordedEvent(**{name: getattr(event, name) for name in _FIELDS}, position=position))
        if records:
            self._offset = records[-1].offset + 1
        elif end_offset(file.connection) < self._offset:
            raise CorruptError("the log is shorter than it was: events that were read before are gone")
        return events


def _between(offset: int, end: int) -> Callable[[LogFile], list[Record]]:
    return lambda file: records_from(file.connection, offset, end, BATCH_RECORDS)


_REMEMBERED = 10_000
"""The number of packages whose creation is remembered."""


class _DerivedHeaders:
    """Adds the headers that records would have in a Kafka log. For one scan."""

    def __init__(self) -> None:
        self._created: OrderedDict[UUID, PackageCreated] = OrderedDict()

    def added_to(self, records: list[Record]) -> Callable[[LogFile], list[Record]]:
        """The records with time and headers. Raises CorruptError if one is not an event."""
        return lambda file: [self._with_headers(file, record) for record in records]

    def _with_headers(self, file: LogFile, record: Record) -> Record:
        event = decoded(record)
        found = headers_of(event, file.identity, self._creation(file, event))
        return record._replace(timestamp=event.created_at // 1000, headers=tuple(found.items()))

    def _creation(self, file: LogFile, event: Event) -> PackageCreated | None:
        package = event.package_id
        created = event.payload if isinstance(event.payload, PackageCreated) else self._created.pop(package, None)
        if created is None:
            for record in package_records_from(file.connection, package, 0, None, 1):
                payload = decoded(record).payload
                created = payload if isinstance(payload, PackageCreated) else None
        if created is not None:
            self._created[package] = created
            if len(self._created) > _REMEMBERED:
                self._created.popitem(last=False)
        return created


def _start(since: Position, identity: UUID, end: int) -> int:
    since.require(identity)
    offset = since.offsets.get(PARTITION, 0)
    if not since.offsets.keys() <= {PARTITION}:
        raise InvalidPositionError("the position names partitions that this log does not have")
    if offset > end:
        raise InvalidPositionError(f"the position is beyond the log's end: offset {offset}, end {end}")
    return offset


def member_lock(path: Path, projection: str) -> Path:
    """The lock file that the member with the projection's partition holds."""
    return path.with_name(f"{path.name}.{projection}.lock")


_NOTHING = Batch((), {})


class SqliteSubscription:
    """A projection's membership: one member at a time, in any process, has the partition. See `Subscription`.

    The member that has the partition holds a file lock, which the system frees when its process dies.
    """

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
        self._told = False  # whether the member was told that nothing is assigned to it
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
            raise UnavailableError(f"{self._projection} commits a partition that another member has")
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
                # Progress is only shown to people, so commits do not wait for the disk. A power cut may lose the last.
                self._progress.connection.execute("PRAGMA synchronous = NORMAL")
            self._progress.check_in_place()
            with write_lock(self._path):
                store_progress(self._progress.connection, self._projection, next_offset, metadata)
