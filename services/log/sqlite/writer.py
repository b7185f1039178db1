"""Appending to the embedded log: the `CommandWriter` port on the SQLite file.

Requests from many tasks wait in a bounded queue; one thread takes all that wait, up to a bound, and appends their
events in one transaction. Several writers, in one process or many, take turns by the file's write lock.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Thread
from typing import cast
from uuid import UUID

from services.clock import Clock, system_clock
from services.core.commands import Acknowledgement, Command, IngestFiles
from services.core.limits import Limits
from services.errors import ArtifactStoreError, PushBackError, UnavailableError
from services.log.port import PackageExtent, PartitionStatus, PutManifest
from services.log.position import Position
from services.log.sqlite.appender import Answer, Appender, IngestCheck, Request
from services.log.sqlite.file import PARTITION, create_file, open_file
from services.log.sqlite.records import end_offset

MAX_WAITING = 20_000
"""Events that may wait to be appended; one more request is pushed back."""

_BATCH_EVENTS = 1_000
_PUT_SECONDS = 30.0


@dataclass(frozen=True, slots=True)
class _Waiting:
    request: Request
    weight: int
    answer: asyncio.Future[Acknowledgement | None]


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

    async def check_ingest(self, package_id: UUID, relative_paths: Sequence[str], command_id: UUID | None) -> None:
        """See `CommandWriter`."""
        await self._enqueue(IngestCheck(package_id, relative_paths, command_id), 1)

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

    async def _enqueue(self, request: Request, weight: int) -> Acknowledgement | None:
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
