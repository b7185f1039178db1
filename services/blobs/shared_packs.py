"""Small bodies that arrive at the same time share an object of the store, as commands share a transaction.

A store writes a thousand small objects a second at best, whatever their size. So while packs of a retention class are
being stored, the small bodies of that class gather, and then become one pack: a blob like any other, under the key of
its own BLAKE3, in which each body has a range (docs/decisions/shared-packs.md). There is no timer: a body that comes
alone is stored at once, under the key of its own BLAKE3.

A body joins a pack only when all of it is in memory and matches what was declared. So a slow or wrong body never
affects the others.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterable
from dataclasses import dataclass, field

from artifact_store.archives.bundle import SMALL_FILE_BYTES
from artifact_store.errors import TooLargeError
from artifact_store.models import Declared
from services.blobs.intake import LOOK_SECONDS, MIB, Intake, Pace, check_declared, digests_of
from services.blobs.memory import TURN_SECONDS, Share
from services.blobs.port import BlobStore, Digests, StoredBlob

SHARED_PACK_BYTES = 4 * MIB
"""Most bytes of a pack. A pack that is being stored takes this much memory in addition to its bodies."""

PACKS_AT_ONCE = 2
"""How many packs of a retention class are stored at a time; further bodies gather meanwhile."""

_READ_FIRST_BYTES = 64 * 1024
"""A body of at most this size is read before it takes memory of the budget: its connection may hold as much anyway."""

_RETRY_SECONDS = 5.0

SALT_BYTES = 32
"""Random bytes at the end of a pack of several bodies."""


def is_small(declared: Declared) -> bool:
    """Whether a body with this declaration may share a pack."""
    return declared.size_bytes is not None and declared.size_bytes <= SMALL_FILE_BYTES


class SharedPacks:
    """Stores small bodies in one blob store. Belongs to one event loop."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        at_once: int = PACKS_AT_ONCE,
        pack_bytes: int = SHARED_PACK_BYTES,
        turn_seconds: float = TURN_SECONDS,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Bodies take memory of the store's budget, for which they wait `turn_seconds`.

        `at_once` packs of a retention class are stored at a time, of `pack_bytes` at most. Slow bodies are looked for
        every `look_seconds` while others wait for memory.
        """
        self._blobs = blobs
        self._memory = blobs.parts.memory
        self._at_once = at_once
        self._pack_bytes = pack_bytes
        self._turn_seconds = turn_seconds
        self._look_seconds = look_seconds
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._storing: set[asyncio.Task[None]] = set()

    async def store(
        self, body: AsyncIterable[bytes] | bytes, *, declared: Declared, max_bytes: int, retention_class: str
    ) -> StoredBlob:
        """As `BlobStore.store`, for a body that `is_small`, in a pack with others of the retention class."""
        size = declared.size_bytes
        if size is None or not is_small(declared):
            raise ValueError("a body that shares a pack is small, and its size is declared")
        with self._memory.share() as share:
            if isinstance(body, bytes):
                held = await _take(body, declared, max_bytes)
                await self._await_turn(share, max(1, size))
            elif size <= _READ_FIRST_BYTES:
                held = await _read(Intake(body, declared=declared, max_bytes=max_bytes), size)
                await self._await_turn(share, max(1, size))
            else:
                await self._await_turn(share, size)
                async with Pace(
                    body, lambda: self._memory.contended, size=len, look_seconds=self._look_seconds
                ) as pace:
                    held = await _read(Intake(pace, declared=declared, max_bytes=max_bytes), size)
            return await self._join(held, self._lanes[retention_class])

    async def close(self) -> None:
        """Wait for the packs that are being stored, even if the senders of their bodies are gone."""
        while self._storing:
            await asyncio.wait(self._storing)

    async def _await_turn(self, share: Share, amount: int) -> None:
        await share.take_in_turn(
            amount,
            others="uploads under way",
            nothing="stored",
            retry_after=_RETRY_SECONDS,
            seconds=self._turn_seconds,
        )

    async def _join(self, held: _Held, lane: _Lane) -> StoredBlob:
        """Wait until a pack with this body is durable."""
        place: asyncio.Future[StoredBlob] = asyncio.get_running_loop().create_future()
        lane.waiting.append((held, place))
        if not lane.called and lane.under_way < self._at_once:
            lane.called = True  # after all that is ready now: bodies that came together share a pack from the first
            asyncio.get_running_loop().call_soon(self._send, lane)
        return await place

    def _send(self, lane: _Lane) -> None:
        lane.called = False
        while lane.under_way < self._at_once and (pack := _Pack.of(lane.waiting, self._pack_bytes)) is not None:
            lane.under_way += 1
            task = asyncio.create_task(self._store(pack, lane))
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)

    async def _store(self, pack: _Pack, lane: _Lane) -> None:
        """A task of its own: a sender that leaves takes nothing from the others."""
        try:
            stored = await self._blobs.store_bytes(*await pack.content())
        # It ended the whole pack, so every sender hears of it.
        except BaseException as error:
            pack.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            pack.settle(stored)
        finally:
            lane.under_way -= 1
            self._send(lane)


@dataclass(frozen=True, slots=True)
class _Held:
    """A body that is completely in memory and matches what was declared."""

    data: bytes
    digests: Digests


async def _take(data: bytes, declared: Declared, max_bytes: int) -> _Held:
    """As `_read`, for a body that is in memory already."""
    if len(data) > max_bytes:
        raise TooLargeError(f"the body is larger than the {max_bytes} bytes that are taken")
    digests = await digests_of(data)
    check_declared(digests, declared)
    return _Held(data, digests)


async def _read(intake: Intake, size: int) -> _Held:
    data = await intake.take(size)
    if not await intake.at_end():
        await intake.take(1)  # longer than declared: raises
    return _Held(data, await intake.digests())


_Waiting = tuple[_Held, "asyncio.Future[StoredBlob]"]


@dataclass(slots=True)
class _Lane:
    """Bodies of one retention class that wait for a pack, in the order in which they came."""

    waiting: deque[_Waiting] = field(default_factory=deque)
    under_way: int = 0
    """How many packs are being stored."""
    called: bool = False
    """Whether `_send` is about to run."""


class _Pack:
    """Bodies one after the other, equal ones once, and the futures that wait for them."""

    def __init__(self) -> None:
        self._bodies: dict[bytes, tuple[_Held, int]] = {}
        """With their offsets, by BLAKE3."""
        self._waiting: list[_Waiting] = []
        self._length = 0

    @classmethod
    def of(cls, waiting: deque[_Waiting], most_bytes: int) -> _Pack | None:
        """Take what fits into a pack; None if nobody waits any more."""
        pack = cls()
        while waiting and (not pack._waiting or pack._length + len(waiting[0][0].data) <= most_bytes):
            held, place = waiting.popleft()
            if place.done():  # its sender left
                continue
            pack._waiting.append((held, place))
            if held.digests.blake3 not in pack._bodies:
                pack._bodies[held.digests.blake3] = held, pack._length
                pack._length += len(held.data)
        return pack if pack._waiting else None

    async def content(self) -> tuple[bytes, Digests]:
        """The bytes of the pack, with their digests. Several bodies are followed by random bytes.

        Events name the digest of the pack. Without the random bytes, somebody who knows one body could use the digest
        to guess the others.
        """
        bodies = [held for held, _ in self._bodies.values()]
        if len(bodies) == 1:
            return bodies[0].data, bodies[0].digests
        data = b"".join([*(held.data for held in bodies), secrets.token_bytes(SALT_BYTES)])
        return data, await digests_of(data)

    def settle(self, stored: StoredBlob) -> None:
        """Tell everyone who still waits where their body lies."""
        for held, place in self._waiting:
            if not place.done():
                digests, offset = held.digests, self._bodies[held.digests.blake3][1]
                place.set_result(
                    StoredBlob(stored.backend_id, stored.key, offset, digests.length, digests.blake3, digests.sha256)
                )

    def fail(self, error: BaseException) -> None:
        """Tell everyone who still waits that nothing was stored."""
        for _, place in self._waiting:
            if not place.done():
                if isinstance(error, asyncio.CancelledError):
                    place.cancel()
                else:
                    place.set_exception(error)
