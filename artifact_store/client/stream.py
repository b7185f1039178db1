"""A stream of files into one package. Files that are added within a few milliseconds are sent in one request.

`add` puts a file into a backlog, in memory or in a spool on disk, and returns. Whenever a request may begin, the
waiting files become a batch: one archive, which is sent under one command id until it is answered. Requests overlap;
their acknowledgements are given in the order in which the files were added. A batch is recorded whole or not at all. If
one of its files is refused, the batch is halved until the refused file is alone, and the others are recorded.
"""

from __future__ import annotations

import asyncio
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Awaitable, Generator, Iterable, Sequence
from contextlib import suppress
from types import TracebackType
from typing import NamedTuple
from uuid import UUID, uuid4, uuid5
from weakref import WeakValueDictionary

from blake3 import blake3

from artifact_store.archives.bundle import PACK_BYTES, SMALL_FILE_BYTES, HeldFiles, SmallFile
from artifact_store.client.bodies import BytesSource
from artifact_store.errors import (
    ConfigurationError,
    CorruptError,
    DuplicateRelativePathError,
    InvalidPathError,
    PathConflictError,
    PushBackError,
    RejectedError,
    TooLargeError,
    UnavailableError,
)
from artifact_store.media_types import guess_media_type
from artifact_store.models import Declared, IngestedFile
from artifact_store.registry import Registry
from artifact_store.rules import check_header_text, check_path

BATCH_FILES = 500
"""The most files in one request."""

REQUESTS_AT_ONCE = 3
"""How many requests of a stream may be in flight."""

LINGER_SECONDS = 0.003
"""How long a request waits for more files after the first."""

MEMORY_BYTES = 64 << 20
"""The most bytes that a stream without a spool holds."""

FILE_BYTES = 1024
"""How much each file counts in addition to its data, in bytes."""

_OF_ONE_FILE = (InvalidPathError, DuplicateRelativePathError, PathConflictError, TooLargeError)
"""Refusals that concern a file and not the package. They are permanent: the same file would be refused again."""


class AddedFile(NamedTuple):
    """A file that waits to be sent. `media_type` is None if it is the one that the name suggests."""

    relative_path: str
    media_type: str | None
    data: bytes

    @property
    def travels_alone(self) -> bool:
        """Whether it needs a separate request: archives have no media types, and large files are not bundled."""
        return self.media_type is not None or len(self.data) > SMALL_FILE_BYTES

    @property
    def cost(self) -> int:
        """How much the file counts towards the limit of its backlog, in bytes."""
        return len(self.data) + FILE_BYTES


class Batch(NamedTuple):
    """Files that are sent in one request. `number` is how many files were added before them."""

    number: int
    files: Sequence[AddedFile]
    command_id: UUID


class Refusal(NamedTuple):
    """A file that was permanently refused."""

    file: AddedFile
    error: RejectedError


def first_batch(files: Iterable[AddedFile]) -> list[AddedFile]:
    """The first of these files, as many as can be sent in one request."""
    taken: list[AddedFile] = []
    size = 0
    for file in files:
        size += len(file.data)
        full = len(taken) == BATCH_FILES or size > PACK_BYTES
        if taken and (full or file.travels_alone):
            break
        taken.append(file)
        if file.travels_alone:
            break
    return taken


class Backlog(ABC):
    """Files that were added and not yet acknowledged, in order. Belongs to one event loop."""

    keeps = False
    """Whether the files outlive this process."""

    settled = 0
    """How many files, counted from the first, are acknowledged or refused."""

    held_bytes = 0
    """The bytes of the files that it held when it was opened."""

    def __init__(self) -> None:
        self.files = 0
        """How many files are not in a batch yet."""
        self.arrived = asyncio.Event()
        """Set while there is such a file."""
        self.filled = asyncio.Event()
        """Set while these files fill a request."""
        self._bytes = 0

    def count(self, files: int, size: int) -> None:
        """Count added files, or (negative) files that went into a batch, with the bytes of their data."""
        self.files += files
        self._bytes += size
        for event, there in (
            (self.arrived, self.files > 0),
            (self.filled, self.files >= BATCH_FILES or self._bytes >= PACK_BYTES),
        ):
            if there:
                event.set()
            else:
                event.clear()

    @abstractmethod
    async def open(self) -> int:
        """Begin. Returns how many files were ever added. A spool raises as `Spool.open`."""

    @abstractmethod
    async def put(self, file: AddedFile) -> int:
        """Add a file after all others and return its number. A spool returns when the file is on disk."""

    @abstractmethod
    async def take(self) -> Batch:
        """The next batch. Call it only if there is a file that is not in a batch; one call at a time."""

    @abstractmethod
    async def settle(self, batch: Batch, refused: Sequence[Refusal]) -> None:
        """Forget the oldest batch: it is recorded, except for the refused files."""

    @abstractmethod
    async def close(self) -> None:
        """End. A spool keeps the files that are not settled."""


class MemoryBacklog(Backlog):
    """Files that wait in memory."""

    def __init__(self) -> None:
        super().__init__()
        self._waiting: deque[AddedFile] = deque()
        self._taken = 0

    async def open(self) -> int:
        return 0

    async def put(self, file: AddedFile) -> int:
        self._waiting.append(file)
        self.count(1, len(file.data))
        return self._taken + len(self._waiting) - 1

    async def take(self) -> Batch:
        files = first_batch(self._waiting)
        for _ in files:
            self._waiting.popleft()
        batch = Batch(self._taken, files, uuid4())
        self._taken += len(files)
        self.count(-len(files), -sum(len(file.data) for file in files))
        return batch

    async def settle(self, batch: Batch, refused: Sequence[Refusal]) -> None:
        self.settled = batch.number + len(batch.files)

    async def close(self) -> None:
        self._waiting.clear()


class Added(Awaitable[IngestedFile]):
    """A file that a stream has accepted. Await it for the acknowledgement, as often as you like.

    Awaiting raises the refusal of this file, or the error that ended the stream.
    """

    __slots__ = ("__weakref__", "_done", "awaited")

    def __init__(self) -> None:
        self._done: asyncio.Future[IngestedFile] = asyncio.get_running_loop().create_future()
        self.awaited = False

    def __await__(self) -> Generator[object, None, IngestedFile]:
        self.awaited = True
        # A generator, which keeps this object alive: the stream does not, and does not settle collected objects.
        return (yield from asyncio.shield(self._done).__await__())

    def settle(self, found: IngestedFile | Exception) -> None:
        """Give the acknowledgement, or the error."""
        if self._done.done():
            return
        if isinstance(found, IngestedFile):
            self._done.set_result(found)
        else:
            self._done.set_exception(found)
            self._done.exception()  # retrieve it: the stream itself raises errors that nobody awaits


class FileStream:
    """Adds files to one package. Made by `Client.stream`; use it inside `async with`, from one event loop.

    Without a spool, files that were added are lost with the process until they are acknowledged. With one they are on
    disk when `add` returns: the next stream on the same folder sends what an earlier process or a lost network left.

    Leaving the block waits until everything is acknowledged. It raises the error that ended the stream, or the first
    refusal that nobody awaited; all other files are recorded. If the block raises, files that are not acknowledged are
    dropped, or stay in the spool.
    """

    def __init__(
        self,
        registry: Registry,
        package_id: UUID,
        actor: str,
        backlog: Backlog,
        *,
        max_bytes: int,
        linger_seconds: float = LINGER_SECONDS,
        pause_seconds: float = 5.0,
    ) -> None:
        """`pause_seconds` is the pause after the client has given up an attempt to send a spool's files."""
        self.package_id = package_id
        self._registry = registry
        self._actor = actor
        self._backlog = backlog
        self._max_bytes = max_bytes
        self._linger = linger_seconds
        self._pause = pause_seconds
        self._opened = False
        self._held = 0
        self._added = 0
        self._settled = 0
        self._turn = asyncio.Lock()
        self._changed = asyncio.Event()
        self._slots = asyncio.Semaphore(REQUESTS_AT_ONCE)
        self._unsettled: WeakValueDictionary[int, Added] = WeakValueDictionary()
        self._sends: set[asyncio.Task[None]] = set()
        self._dispatcher: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._away: UnavailableError | PushBackError | None = None
        self._given_up = 0
        self._refusals: list[tuple[RejectedError, Added | None]] = []

    async def __aenter__(self) -> FileStream:
        self._added = await self._backlog.open()
        self._settled = self._backlog.settled
        self._held = self._backlog.held_bytes
        self._opened = True
        self._dispatcher = asyncio.create_task(self._dispatch())
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                await self.flush()
        finally:
            await self._stop()
        if error is None:
            self._raise_refusals()

    async def add(
        self, relative_path: str, data: bytes | bytearray | memoryview, media_type: str | None = None
    ) -> Added:
        """Accept a file. Await the result to wait for its acknowledgement.

        Waits while the stream holds `max_bytes`. With a spool, returns when the file is on disk; files that are added
        at the same time are written together. If this is cancelled meanwhile, the file may have been accepted.

        Without a `media_type`, the file gets the one that its name suggests. Files of other types, and those of more
        than 256 KiB, need a request each.

        Raises:
            InvalidPathError, InvalidRequestError: the path or the media type breaks a rule.
            TooLargeError: the file has more than `max_bytes`.
            PushBackError: the spool's disk is full.
            Anything else: the error that ended the stream. After the errors above, it continues without this file.
        """
        check_path(relative_path)
        if media_type is not None:
            check_header_text("media_type", media_type)
            media_type = None if media_type == guess_media_type(relative_path) else media_type
        data = data if isinstance(data, bytes) else bytes(memoryview(data))
        file = AddedFile(relative_path, media_type, data)
        await self._make_room(file.cost)
        added = Added()
        try:
            number = await self._backlog.put(file)
        except PushBackError:
            self._free(file.cost)
            raise
        except Exception as error:
            self._fail(error)
            raise
        self._added = max(self._added, number + 1)
        self._unsettled[number] = added
        if self._failure is not None:
            added.settle(self._failure)
        if self._backlog.filled.is_set():
            await asyncio.sleep(0)  # otherwise a loop that only adds files would never let a request begin
        return added

    async def flush(self) -> None:
        """Wait until everything that was added is acknowledged or refused.

        Raises the error that ended the stream. With a spool, raises UnavailableError or PushBackError if an attempt is
        given up meanwhile, after the `total_seconds` of the client's policy: the files stay in the spool.
        """
        target, given_up = self._added, self._given_up
        while self._settled < target:
            self._check()
            if self._away is not None and self._given_up > given_up:
                raise self._away
            await self._changed.wait()

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        if not self._opened:
            raise ConfigurationError("the stream is closed; use it inside `async with`")

    async def _make_room(self, size: int) -> None:
        """Wait, first come first served, until the stream may hold this many more bytes."""
        if size > self._max_bytes:
            raise TooLargeError(f"the stream holds at most {self._max_bytes:,} bytes; send larger files one by one")
        async with self._turn:
            self._check()
            while self._held + size > self._max_bytes:
                await self._changed.wait()
                self._check()
            self._held += size

    def _free(self, size: int) -> None:
        self._held -= size
        self._tell()

    def _tell(self) -> None:
        """Wake everyone who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def _dispatch(self) -> None:
        """Form batches, and begin a request for each."""
        previous: asyncio.Task[None] | None = None
        try:
            while True:
                await self._slots.acquire()
                await self._backlog.arrived.wait()
                with suppress(TimeoutError):
                    async with asyncio.timeout(self._linger):
                        await self._backlog.filled.wait()
                if self._failure is not None:
                    return
                previous = asyncio.create_task(self._send(await self._take(), previous))
                self._sends.add(previous)
                previous.add_done_callback(self._sends.discard)
        except Exception as error:  # noqa: BLE001 - whoever adds or flushes gets it
            self._fail(error)

    async def _take(self) -> Batch:
        while True:
            try:
                return await self._backlog.take()
            except PushBackError as error:  # the spool's disk is full
                self._give_up(error)
                await asyncio.sleep(self._pause)

    async def _send(self, batch: Batch, previous: asyncio.Task[None] | None) -> None:
        """Send a batch, and give its acknowledgements after those of the batch before it."""
        try:
            found = await self._insist(batch)
            if previous is not None:
                await asyncio.wait([previous])
            if self._failure is None:
                await self._settle(batch, found)
        except Exception as error:  # noqa: BLE001 - as above
            self._fail(error)
        finally:
            self._slots.release()

    async def _insist(self, batch: Batch) -> list[IngestedFile | RejectedError]:
        """Send a batch until it is answered. Without a spool, only for as long as the client's policy allows."""
        while True:
            try:
                found = await self._deliver(batch.files, batch.command_id)
            except (UnavailableError, PushBackError) as error:
                if not self._backlog.keeps:
                    raise
                self._give_up(error)
                await asyncio.sleep(self._pause)
            else:
                self._away = None
                return found

    def _give_up(self, error: UnavailableError | PushBackError) -> None:
        """Tell callers of `flush` that an attempt failed. Further attempts follow."""
        self._away = error
        self._given_up += 1
        self._tell()

    async def _deliver(self, files: Sequence[AddedFile], command_id: UUID) -> list[IngestedFile | RejectedError]:
        """Send these files. The halves of a refused batch get other ids, which are always the same."""
        try:
            return list(await self._request(files, command_id))
        except _OF_ONE_FILE as error:
            if len(files) == 1:
                return [error]
        middle = len(files) // 2
        first = await self._deliver(files[:middle], uuid5(command_id, "first half"))
        return first + await self._deliver(files[middle:], uuid5(command_id, "second half"))

    async def _request(self, files: Sequence[AddedFile], command_id: UUID) -> Sequence[IngestedFile]:
        """Send these files in one request. Raises CorruptError if other bytes arrived."""
        if len(files) == 1:
            (file,) = files
            done = await self._registry.ingest(
                self.package_id,
                file.relative_path,
                file.media_type or guess_media_type(file.relative_path),
                BytesSource(file.data),
                self._actor,
                declared=Declared(size_bytes=len(file.data)),
                command_id=command_id,
            )
            return done.files
        small, digests = await asyncio.to_thread(_prepare, files)
        done = await self._registry.ingest_files(self.package_id, HeldFiles(small), self._actor, command_id=command_id)
        for digest, ingested in zip(digests, done.files, strict=True):
            if ingested.blake3 != digest:
                raise CorruptError(
                    f"{ingested.relative_path!r} did not arrive as it was sent; do not finalize {self.package_id}"
                )
        return done.files

    async def _settle(self, batch: Batch, found: Sequence[IngestedFile | RejectedError]) -> None:
        refused = [
            Refusal(file, answer)
            for file, answer in zip(batch.files, found, strict=True)
            if isinstance(answer, RejectedError)
        ]
        await self._backlog.settle(batch, refused)
        for number, answer in enumerate(found, batch.number):
            added = self._unsettled.pop(number, None)
            if added is not None:
                added.settle(answer)
            if isinstance(answer, RejectedError) and len(self._refusals) < BATCH_FILES:
                self._refusals.append((answer, added))
        self._settled = batch.number + len(batch.files)
        self._free(sum(file.cost for file in batch.files))

    def _fail(self, error: Exception) -> None:
        """End the stream with this error."""
        if self._failure is None:
            self._failure = error
            self._end_all(error)

    def _end_all(self, error: Exception) -> None:
        for added in self._unsettled.values():
            added.settle(error)
        self._tell()

    def _raise_refusals(self) -> None:
        missed = [error for error, added in self._refusals if added is None or not added.awaited]
        if missed:
            if len(missed) > 1:
                missed[0].add_note(f"and {len(missed) - 1:,} more files were refused")
            raise missed[0]

    async def _stop(self) -> None:
        """Cancel the running requests, and close the backlog."""
        self._opened = False
        tasks = [*self._sends, *([self._dispatcher] if self._dispatcher is not None else [])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._end_all(UnavailableError("the stream was closed before the acknowledgement came; the outcome is unknown"))
        await self._backlog.close()


def _prepare(files: Sequence[AddedFile]) -> tuple[list[SmallFile], list[bytes]]:
    """The files in a bundle's form, and their BLAKE3. Takes processor time."""
    small = [SmallFile(path, guess_media_type(path), data) for path, _, data in files]
    return small, [blake3(file.data).digest() for file in files]
