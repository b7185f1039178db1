"""Reading a body, for every store: its pieces are counted, hashed and compared with what was declared.

`Intake` hashes with BLAKE3 and SHA-256 in threads beside the event loop, while the adapter writes the piece. Only
`Intake` checks limits and declared digests. `PartPlan` sets the size of a long body's parts, `Pace` limits how long a
slow body may hold up others, and `Cleanups` removes what a failed upload has left. `Mistrusted` remembers blobs that
must be stored again although the store has them.

S3 takes at most 10,000 parts, each but the last of 5 MiB to 5 GiB (Amazon S3 user guide, "multipart upload limits"). A
body of known size gets parts that fit it: beyond what memory can hold, they are relayed to the store as they arrive. A
body of unknown size cannot be relayed, because a request for a part must name its length first: its parts grow in steps
up to what memory may hold, which bounds how long such a body can be.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
import random
from collections import OrderedDict
from collections.abc import AsyncIterable, AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

from blake3 import blake3

from artifact_store.errors import ContentMismatchError, PushBackError, TooLargeError, UnavailableError
from artifact_store.models import Declared
from services.blobs.port import Digests

PIECE_BYTES = 512 * 1024
"""The most bytes that `Intake.take` returns at once; with 64 bodies at a time, this keeps the bytes in flight few."""

READ_FIRST_BYTES = 64 * 1024
"""A body of at most this size is read before it takes memory of the budget: its connection may hold as much anyway."""

INLINE_BYTES = 64 * 1024
"""Up to this size, hashing takes less time than handing the work to a thread."""

_HASHERS = ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="blob-hash")


class BodyHash:
    """Both hashes of one body, whose bytes are fed in order. For one thread at a time."""

    def __init__(self) -> None:
        self._length = 0
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes | memoryview) -> None:
        """Take the next bytes."""
        self._length += len(data)
        self._blake3.update(data)
        self._sha256.update(data)

    def update_beside(self, pieces: Iterable[bytes | memoryview]) -> asyncio.Future[None]:
        """Take the next pieces in another thread. The future is done when the thread is done."""

        def work() -> None:
            for piece in pieces:
                self.update(piece)

        return asyncio.get_running_loop().run_in_executor(_HASHERS, work)

    def digests(self) -> Digests:
        """The digests of all bytes taken so far."""
        return Digests(self._length, self._blake3.digest(), self._sha256.digest())


async def digests_of(data: bytes) -> Digests:
    """The digests of bytes in memory; computed in a thread if they are many."""
    if len(data) <= INLINE_BYTES:
        return Digests(len(data), blake3(data).digest(), hashlib.sha256(data).digest())
    whole = BodyHash()
    await whole.update_beside((data,))
    return whole.digests()


def check_declared(found: Digests, declared: Declared) -> None:
    """Raise ContentMismatchError if a body differs from its declaration."""
    if declared.size_bytes is not None and found.length != declared.size_bytes:
        raise ContentMismatchError(f"the body has {found.length} bytes, {declared.size_bytes} were declared")
    for name, is_, said in (
        ("BLAKE3", found.blake3, declared.blake3),
        ("SHA-256", found.sha256, declared.sha256),
    ):
        if said is not None and is_ != said:
            raise ContentMismatchError(f"the {name} of the body is {is_.hex()}, {said.hex()} was declared")


class Intake:
    """One body that is being stored. Belongs to one task."""

    def __init__(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> None:
        """Raises TooLargeError at once if the declared size is above `max_bytes`."""
        if declared.size_bytes is not None and declared.size_bytes > max_bytes:
            raise TooLargeError(f"{declared.size_bytes} bytes are declared, but at most {max_bytes} are accepted")
        self._chunks = aiter(body)
        self._declared = declared
        self._max_bytes = max_bytes
        self._rest = memoryview(b"")
        self._ended = False
        self._length = 0
        self._hash = BodyHash()
        self._hashing: asyncio.Future[None] | None = None

    @property
    def length(self) -> int:
        """The number of bytes taken so far."""
        return self._length

    async def take(self, limit: int) -> bytes:
        """The next bytes: min(`limit`, PIECE_BYTES) of them unless the body ends; empty at its end.

        Raises:
            TooLargeError, ContentMismatchError: the body grows beyond `max_bytes` or its declared size.
            Whatever the body raises.
        """
        want = min(limit, PIECE_BYTES)
        pieces: list[bytes | memoryview] = []
        got = 0
        held = 0
        while got < want and not await self.at_end():
            piece = self._rest[: want - got]
            self._rest = self._rest[len(piece) :]
            pieces.append(piece)
            got += len(piece)
            held += 1
            if held == 1024:  # many tiny chunks weigh more as objects than as bytes
                pieces = [b"".join(pieces)]
                held = 1
        data = b"".join(pieces)
        self._count(len(data))
        await self._feed(data)
        return data

    async def at_end(self) -> bool:
        """Whether the body has ended; waits for its next chunk if necessary."""
        while not self._rest and not self._ended:
            try:
                self._rest = memoryview(await anext(self._chunks))
            except StopAsyncIteration:
                self._ended = True
        return not self._rest

    async def digests(self) -> Digests:
        """Length and digests, after the body was taken to its end.

        Raises:
            ContentMismatchError: the body is not what was declared.
        """
        if not await self.at_end():
            raise RuntimeError("the body was not taken to its end")
        if self._hashing is not None:
            await self._hashing
        found = self._hash.digests()
        check_declared(found, self._declared)
        return found

    def _count(self, more: int) -> None:
        self._length += more
        if self._declared.size_bytes is not None and self._length > self._declared.size_bytes:
            raise ContentMismatchError(f"the body is longer than the {self._declared.size_bytes} bytes declared")
        if self._length > self._max_bytes:
            raise TooLargeError(f"the body is larger than the {self._max_bytes} bytes that are accepted")

    async def _feed(self, data: bytes) -> None:
        if self._hashing is not None:
            await self._hashing
            self._hashing = None
        if len(data) <= INLINE_BYTES:
            self._hash.update(data)
        else:
            self._hashing = self._hash.update_beside((data,))


MIB = 1 << 20
MAX_PARTS = 10_000
SMALLEST_PART = 5 * MIB
LARGEST_PART = 5 * 1024 * MIB


@dataclass(frozen=True, slots=True)
class PartPlan:
    """Sizes of the parts of one body, in bytes: `part_bytes` at first, at most `held_bytes` of them in memory."""

    part_bytes: int
    held_bytes: int
    total: int | None = None
    max_parts: int = MAX_PARTS

    def __post_init__(self) -> None:
        if not 0 < self.part_bytes <= self.held_bytes:
            raise ValueError("a part must fit into the memory of an upload")

    def size(self, number: int) -> int:
        """The size of part `number` (from 1); for the last part, the most that it can be.

        Raises:
            TooLargeError: the store does not accept such a part.
        """
        if number > self.max_parts:
            raise TooLargeError(
                f"a body of undeclared size may have {self.longest_unknown()} bytes: declare its size"
                if self.total is None
                else f"{self.total} bytes do not fit into {self.max_parts} parts"
            )
        if self.total is None:
            return self._grown(number)
        fitting = -(-self.total // self.max_parts)
        rounded = -(-fitting // MIB) * MIB
        size = max(self.part_bytes, min(rounded, LARGEST_PART))
        return max(1, min(size, self.total - (number - 1) * size))

    def relayed(self, number: int) -> bool:
        """Whether part `number` is too large to be held in memory."""
        return self.size(number) > self.held_bytes

    def longest_unknown(self) -> int:
        """The most bytes that a body of undeclared size may have."""
        return sum(self._grown(number) for number in range(1, self.max_parts + 1))

    def _grown(self, number: int) -> int:
        tenths = 10 * (number - 1) // self.max_parts
        doublings = 0 if tenths < 1 else 1 if tenths < 2 else 2 if tenths < 4 else 3
        return min(self.part_bytes << doublings, self.held_bytes)


Piece = TypeVar("Piece")
Part = TypeVar("Part")

LOOK_SECONDS = 5.0
SLOW_BYTES_PER_SECOND = 64 * 1024
"""The slowest pace. At this pace, a part of 8 MiB is held for two minutes."""

_MOSTLY = 0.8
_RETRY_SECONDS = 10.0


class Pace(Generic[Piece]):
    """A body and the block that reads it; the block raises PushBackError if the body is slow while others wait.

    About every `look_seconds` it checks whether others are `waiting`. If so, the block is cancelled if it spent most of
    that time waiting for the body, and the body was slower than SLOW_BYTES_PER_SECOND. Time that a slow store takes
    does not count.
    """

    def __init__(
        self,
        body: AsyncIterable[Piece],
        waiting: Callable[[], bool],
        *,
        size: Callable[[Piece], int],
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """`size` gives the number of bytes in a piece of the body."""
        self._body = body
        self._size = size
        self._others_wait = waiting
        self._look_seconds = look_seconds
        self._window = look_seconds
        self._loop = asyncio.get_running_loop()
        self._limit = asyncio.timeout(None)
        self._timer: asyncio.TimerHandle | None = None
        self._got = 0
        self._waited = 0.0
        self._since: float | None = None

    async def __aenter__(self) -> Self:
        await self._limit.__aenter__()
        self._look_later()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None:
        if self._timer is not None:
            self._timer.cancel()
        try:
            await self._limit.__aexit__(kind, error, at)
        except TimeoutError:
            if not self._limit.expired():
                raise
            raise PushBackError(
                f"the body came at less than {SLOW_BYTES_PER_SECOND // 1024} KiB/s while other uploads waited for the "
                "memory that it held; nothing was stored",
                _RETRY_SECONDS,
            ) from None

    def __aiter__(self) -> AsyncIterator[Piece]:
        return self.watched(self._body, self._size)

    async def watched(self, stream: AsyncIterable[Part], size: Callable[[Part], int]) -> AsyncIterator[Part]:
        """A stream that is itself a piece of the body, and is read before the next piece: it counts as the body.

        `size` gives the number of bytes in a part of it.
        """
        self._since = self._loop.time()
        async for part in stream:
            self._waited += self._loop.time() - self._since
            self._since = None
            self._got += size(part)
            yield part
            self._since = self._loop.time()
        self._since = None

    def _look(self) -> None:
        now = self._loop.time()
        if self._since is not None:
            self._waited += now - self._since
            self._since = now
        slow = self._got < self._window * SLOW_BYTES_PER_SECOND
        if slow and self._waited >= _MOSTLY * self._window and self._others_wait():
            self._limit.reschedule(now)
            return
        self._got, self._waited = 0, 0.0
        self._look_later()

    def _look_later(self) -> None:
        # Random, so that one of many slow bodies gives way first, and the others then see that nobody waits any more.
        self._window = self._look_seconds * random.uniform(0.75, 1.25)
        self._timer = self._loop.call_later(self._window, self._look)


_log = logging.getLogger(__name__)


class Cleanups:
    """Runs clean-up work to its end or its time limit, whatever happens to the task that started it."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[None, None, None]) -> None:
        """Wait for `work`. If the caller is cancelled meanwhile, the work continues.

        If the store cannot be reached in time, that is only logged: the error that led here matters more, and `sweep`
        finds the remains.
        """
        task = asyncio.create_task(self._bounded(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task})
        task.result()

    async def drain(self) -> None:
        """Wait for all work that is still running."""
        if self._running:
            await asyncio.wait(set(self._running))

    async def _bounded(self, work: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await work
        except (UnavailableError, TimeoutError) as error:
            _log.warning("an upload could not be cleaned up and is left to the sweep: %s", str(error) or "out of time")


_MISTRUSTED_REMEMBERED = 1_024

Where = TypeVar("Where")


class Mistrusted(Generic[Where]):
    """The latest keys whose bytes turned out wrong, in one store and one process."""

    def __init__(self) -> None:
        self._found: OrderedDict[Where, None] = OrderedDict()

    def __contains__(self, where: Where) -> bool:
        return where in self._found

    def add(self, where: Where) -> None:
        """Note that the bytes at this key are wrong, and must not be relied on."""
        self._found[where] = None
        if len(self._found) > _MISTRUSTED_REMEMBERED:
            self._found.popitem(last=False)

    def discard(self, where: Where) -> None:
        """Note that the right bytes were stored at this key."""
        self._found.pop(where, None)
