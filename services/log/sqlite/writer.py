"""Appending to the embedded log: the `CommandWriter` port on the SQLite file.

Requests from many tasks wait in a bounded queue; one thread takes all that wait, up to a bound, and appends their
events in one transaction. Several writers, in one process or many, take turns by the file's write lock.
"""

from __future__ import annotations

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import cast
from uuid import UUID

from blake3 import blake3

from artifact_store.errors import ArtifactStoreError, CorruptError, PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from services.core.commands import Command, IngestFiles
from services.core.decide import accept, acknowledge, check_ingest, decide
from services.core.limits import Limits
from services.log.port import PackageExtent, PartitionStatus, PutManifest
from services.log.sqlite.file import (
    PARTITION,
    LogFile,
    create_file,
    decoded,
    end_offset,
    file_errors,
    open_file,
    records_from,
    write_lock,
)
from services.log.sqlite.package_states import PackageStates
from services.runtime.clock import Clock, system_clock

MAX_WAITING = 20_000
"""Events that may wait to be appended; one more request is pushed back."""

_BATCH_EVENTS = 1_000
_PUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    weight: int
    answer: asyncio.Future[Acknowledgement | str]


class SqliteWriter:
    """The writer of the file at `path`, which `start` creates when it is missing.

    `put_manifest` runs on the event loop while the transaction is open: a manifest holds the time of its event, so it
    cannot be stored before the event's turn has come, and the turn cannot be given away after.
    """

    def __init__(
        self,
        path: Path,
        *,
        limits: Limits,
        put_manifest: PutManifest,
        clock: Clock = system_clock,
        max_waiting: int = MAX_WAITING,
    ) -> None:
        self._path = path
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._max_waiting = max_waiting
        self._changed = Condition()
        self._queue: deque[_Waiting] = deque()
        self._weight = 0
        self._closing = False
        self._thread: Thread | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._since: int | None = None

    async def start(self) -> None:
        """See `CommandWriter`. Raises UnavailableError, ConfigurationError, PushBackError."""
        self._loop = asyncio.get_running_loop()
        identity = await asyncio.to_thread(self._prepare)
        appender = Appender(
            self._path, limits=self._limits, put_manifest=self._put_from_thread, clock=self._clock, identity=identity
        )
        # A daemon, so that a program that dies without closing does not hang; `close` waits for it.
        self._thread = Thread(target=self._serve, args=(appender,), name="log-write", daemon=True)
        self._thread.start()
        self._since = self._clock()

    async def submit(self, command: Command) -> Acknowledgement:
        """See `CommandWriter`."""
        weight = max(1, len(command.files)) if isinstance(command, IngestFiles) else 1
        return cast("Acknowledgement", await self._enqueue(command, weight))

    async def check_ingest(self, package_id: UUID, relative_paths: Sequence[str], command_id: UUID | None) -> str:
        """See `CommandWriter`."""
        return cast("str", await self._enqueue(IngestCheck(package_id, relative_paths, command_id), 1))

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """See `CommandWriter`. Nothing: the file finds a package's events by an index."""
        return None

    async def end(self, partitions: Collection[int]) -> Position:
        """See `CommandWriter`. The file has one writer at a time, and whoever reads it sees all of it."""

        def look() -> Position:
            file = open_file(self._path)
            try:
                return Position(file.identity, {PARTITION: end_offset(file.connection)})
            finally:
                file.close()

        return await asyncio.to_thread(look)

    async def ready(self) -> str | None:
        """See `CommandWriter`."""
        return None if self._since is not None else "the log's writer is not started"

    async def status(self) -> Sequence[PartitionStatus]:
        """See `CommandWriter`. Every writer of the file owns the partition: they take turns."""
        owner = None if self._since is None else "this process"
        return [PartitionStatus(PARTITION, owner, self._since)]

    async def close(self) -> None:
        """See `CommandWriter`."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        thread, self._thread = self._thread, None
        if thread is not None:
            await asyncio.to_thread(thread.join)
        self._since = None

    def _prepare(self) -> UUID:
        create_file(self._path)
        file = open_file(self._path)
        file.close()
        return file.identity

    async def _enqueue(self, request: Request, weight: int) -> Acknowledgement | str:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(request, weight, loop.create_future())
        with self._changed:
            if self._thread is None or self._closing:
                raise UnavailableError("the log's writer is not open")
            if self._queue and self._weight + weight > self._max_waiting:
                raise PushBackError("too many commands are waiting to be appended")
            self._queue.append(waiting)
            self._weight += weight
            self._changed.notify()
        return await waiting.answer

    def _serve(self, appender: Appender) -> None:
        """The writing thread: batch after batch until the queue is closed and empty."""
        try:
            while batch := self._take_batch():
                try:
                    answers: Sequence[Answer] = appender.run([waiting.request for waiting in batch])
                # Every caller learns what happened to the batch; the thread lives on and begins afresh.
                except Exception as error:  # noqa: BLE001 - see above
                    answers = [_for_caller(error)] * len(batch)
                self._deliver(batch, answers)
        finally:
            appender.close()

    def _take_batch(self) -> list[_Waiting]:
        batch: list[_Waiting] = []
        weight = 0
        with self._changed:
            while not self._queue and not self._closing:
                self._changed.wait()
            while self._queue and (not batch or weight + self._queue[0].weight <= _BATCH_EVENTS):
                waiting = self._queue.popleft()
                batch.append(waiting)
                weight += waiting.weight
            self._weight -= weight
        return batch

    def _deliver(self, batch: Sequence[_Waiting], answers: Sequence[Answer]) -> None:
        """Hand the answers to the event loop in one go; a caller that was cancelled meanwhile gets none."""

        def settle() -> None:
            for waiting, answer in zip(batch, answers, strict=True):
                if waiting.answer.done():
                    continue
                if isinstance(answer, Exception):
                    waiting.answer.set_exception(answer)
                else:
                    waiting.answer.set_result(answer)

        if self._loop is not None and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(settle)

    def _put_from_thread(self, manifest: bytes) -> None:
        """Store a manifest from the writing thread; blocks until it is durable."""
        if self._loop is None:
            raise UnavailableError("the log's writer is not open")
        stored = asyncio.run_coroutine_threadsafe(_put(self._put_manifest, manifest), self._loop)
        stored.result()


async def _put(put_manifest: PutManifest, manifest: bytes) -> None:
    try:
        async with asyncio.timeout(_PUT_SECONDS):
            await put_manifest(manifest)
    except TimeoutError:
        raise UnavailableError(
            f"a manifest could not be stored within {_PUT_SECONDS:.0f} s; nothing was recorded"
        ) from None


def _for_caller(error: Exception) -> Exception:
    if isinstance(error, ArtifactStoreError):
        return error
    unknown = UnavailableError(f"the log's writer failed: {type(error).__name__}; the outcome is unknown")
    unknown.__cause__ = error
    return unknown


@dataclass(frozen=True, slots=True)
class IngestCheck:
    """The question whether files of these paths could be ingested now."""

    package_id: UUID
    relative_paths: Sequence[str]
    command_id: UUID | None


Request = Command | IngestCheck
Answer = Acknowledgement | Exception | str
"""What becomes of a request. A string says that the check passed, and of which retention class the package is."""


class Appender:
    """Holds the connection, the package states and what is known of the log's end."""

    def __init__(
        self, path: Path, *, limits: Limits, put_manifest: Callable[[bytes], None], clock: Clock, identity: UUID
    ) -> None:
        self._path = path
        self._limits = limits
        self._put_manifest = put_manifest
        self._clock = clock
        self._identity = identity
        self._states = PackageStates()
        self._file: LogFile | None = None
        self._end = 0
        self._known_end = 0
        """The end of the log when this process saw it last, with what it had acknowledged until then,"""
        self._known_digest = b""
        """and BLAKE3 over the value of the record before it."""
        self._appended = b""
        """The value of the last record that the transaction at hand inserted."""
        self._last_created_at = 0

    def run(self, requests: Sequence[Request]) -> list[Answer]:
        """Answer every request; when it returns, what is acknowledged is on the disk.

        A request that is refused, or that cannot be understood, has no effect on the others.

        Raises (for the whole batch): PushBackError, nothing was recorded; UnavailableError; CorruptError.
        """
        with file_errors(self._path):
            if self._file is None:
                self._file = open_file(self._path, writable=True, identity=self._identity)
            connection = self._file.connection
            try:
                self._file.check_in_place()
            except UnavailableError:
                self.close()
                raise
            self._read_ahead(connection, requests)
            if all(isinstance(request, IngestCheck) for request in requests):
                return self._transaction(connection, "BEGIN", requests)
            with write_lock(self._path):
                return self._transaction(connection, "BEGIN IMMEDIATE", requests)

    def close(self) -> None:
        """Close the connection, undoing what is not committed, and forget the states."""
        self._states.clear()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _read_ahead(self, connection: sqlite3.Connection, requests: Sequence[Request]) -> None:
        """Read what is not at hand before the write lock is taken: a large package takes seconds."""
        package_ids = {request.package_id for request in requests}
        self._states.pin(package_ids)
        others_wrote = end_offset(connection) != self._end
        for package_id in package_ids:
            if others_wrote or package_id not in self._states:
                # A broken package is told to its own requests, in the transaction.
                with suppress(CorruptError):
                    self._states.current(connection, package_id)

    def _transaction(self, connection: sqlite3.Connection, begin: str, requests: Sequence[Request]) -> list[Answer]:
        # Nothing has changed when this raises, because another program holds the file.
        connection.execute(begin)
        self._appended = b""
        try:
            self._see_end(connection)
            answers = [self._answer(connection, request) for request in requests]
            connection.execute("COMMIT")
        except BaseException:
            self.close()
            self._end = self._known_end
            raise
        self._known_end = self._end
        if self._appended:
            self._known_digest = _digest(self._appended)
        return answers

    def _see_end(self, connection: sqlite3.Connection) -> None:
        """Learn what other processes appended meanwhile. Raises CorruptError when the log lacks what it had before."""
        end = end_offset(connection)
        self._require_known(connection, end)
        if end != self._end:
            last = records_from(connection, end - 1, None, 1)[0]
            self._last_created_at = decoded(last).created_at
            self._end = self._known_end = end
            self._known_digest = _digest(last.value)

    def _require_known(self, connection: sqlite3.Connection, end: int) -> None:
        offset = self._known_end - 1
        if offset < 0:
            return
        found = f"ends at offset {end}"
        for record in records_from(connection, offset, offset + 1, 1):
            if (digest := _digest(record.value)) == self._known_digest:
                return
            found = f"holds a record with digest {digest.hex()} there"
        raise CorruptError(
            f"the log {self._path} lost what it had acknowledged: this process knows the record at offset {offset} "
            f"with digest {self._known_digest.hex()}, but the log {found}. Put the newer file back; or accept the loss "
            "by starting this process again"
        )

    def _answer(self, connection: sqlite3.Connection, request: Request) -> Answer:
        try:
            state = self._states.current(connection, request.package_id)
            now = max(self._clock(), self._last_created_at)
            if isinstance(request, IngestCheck):
                asked, paths = request.package_id, request.relative_paths
                return check_ingest(state, asked, paths, request.command_id, now, self._limits)
            decision = decide(state, request, now, self._limits)
            if decision.claim_check is not None:
                self._put_manifest(decision.claim_check)
        except sqlite3.Error:
            raise
        # Nothing of this command is written yet, so whatever it runs into concerns its caller alone: a command that
        # cannot even be encoded must not stop the others.
        except Exception as error:  # noqa: BLE001 - see above
            return error
        if decision.appended is not None:
            package_id, command_id = request.package_id.bytes, request.command_id.bytes
            for sequence, value in enumerate(decision.values, decision.appended.first_sequence):
                row = self._end, package_id, sequence, command_id, value
                connection.execute("INSERT INTO events VALUES (?, ?, ?, ?, ?)", row)
                self._end += 1
            self._appended = decision.values[-1]
            self._last_created_at = decision.created_at
        state = accept(state, decision)
        self._states.keep(state)
        return acknowledge(state, request)


def _digest(value: bytes) -> bytes:
    return blake3(value).digest()
