"""How a body comes in: piece by piece, counted, hashed with BLAKE3 and SHA-256, and held against what was declared.

Both adapters pull their bytes through `Intake`, so that limits and declared digests are checked in one place. Hashing
runs in a few threads beside the event loop (both libraries release the interpreter lock for larger pieces), while the
adapter already writes the same piece.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
from collections.abc import AsyncIterable, Iterable
from concurrent.futures import ThreadPoolExecutor

from blake3 import blake3

from services.blobs.port import Declared, Digests
from services.errors import ContentMismatchError, TooLargeError

PIECE_BYTES = 512 * 1024
"""Most bytes that `Intake.take` returns at once; with 64 bodies at a time this keeps what is in flight small."""

_INLINE_BYTES = 64 * 1024  # up to here hashing takes less time than handing the work to a thread
_HASHERS = ThreadPoolExecutor(max_workers=max(2, min(8, os.cpu_count() or 2)), thread_name_prefix="blob-hash")


class BodyHash:
    """Both hashes of one body, fed in its order. One thread at a time."""

    def __init__(self) -> None:
        self._length = 0
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256()

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        self._length += len(data)
        self._blake3.update(data)
        self._sha256.update(data)

    def update_beside(self, pieces: Iterable[bytes]) -> asyncio.Future[None]:
        """Take the next pieces in a thread of its own, which the future stands for."""

        def work() -> None:
            for piece in pieces:
                self.update(piece)

        return asyncio.get_running_loop().run_in_executor(_HASHERS, work)

    def digests(self) -> Digests:
        """Of all that was taken."""
        return Digests(self._length, self._blake3.digest(), self._sha256.digest())


def check_declared(found: Digests, declared: Declared) -> None:
    """Raise ContentMismatchError if a body is not what was declared."""
    if declared.size_bytes is not None and found.length != declared.size_bytes:
        raise ContentMismatchError(f"the body has {found.length} bytes, {declared.size_bytes} were declared")
    for name, is_, said in (
        ("BLAKE3", found.blake3, declared.blake3),
        ("SHA-256", found.sha256, declared.sha256),
    ):
        if said is not None and is_ != said:
            raise ContentMismatchError(f"the {name} of the body is {is_.hex()}, {said.hex()} was declared")


class Intake:
    """One body on its way into a store. Belongs to one task."""

    def __init__(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> None:
        """Raises TooLargeError at once if the declared size is above `max_bytes`."""
        if declared.size_bytes is not None and declared.size_bytes > max_bytes:
            raise TooLargeError(f"{declared.size_bytes} bytes are declared, at most {max_bytes} are taken")
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
        """Bytes that were taken so far."""
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
        """Whether the body has no further byte; waits for its next chunk if need be."""
        while not self._rest and not self._ended:
            try:
                self._rest = memoryview(await anext(self._chunks))
            except StopAsyncIteration:
                self._ended = True
        return not self._rest

    async def digests(self) -> Digests:
        """Length and digests, once the body was taken to its end.

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
            raise TooLargeError(f"the body is larger than the {self._max_bytes} bytes that are taken")

    async def _feed(self, data: bytes) -> None:
        if self._hashing is not None:
            await self._hashing
            self._hashing = None
        if len(data) <= _INLINE_BYTES:
            self._hash.update(data)
        else:
            self._hashing = self._hash.update_beside((data,))
