"""Reads a file's bytes from its possible locations, skipping those that fail or have wrong bytes.

Whole files are hashed while they are read. A small file is checked before its first byte is sent, and the next location
is tried if it is wrong. The last piece of a larger file is held back until the whole file has been verified: a reader
gets the right bytes, or an error before the end. A retry gets them from the next location, because a location that had
wrong bytes is tried last from then on. Ranges cannot be checked.

A returned stream may hold a file or a connection until its end or its `aclose`, which must be called if it is left
early.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing

from blake3 import blake3
from prometheus_client import Counter

from artifact_store.byte_streams import from_any, joined
from artifact_store.errors import CorruptError, UnavailableError
from services.blobs.hot_blocks import HotBlocks
from services.blobs.intake import Mistrusted
from services.blobs.port import BlobStore

Place = tuple[str, int]
"""Key and offset."""

HELD_BYTES = 1 << 20
"""The most bytes of a file that is held in memory: as many as one chunk may have."""
_BEGUN = b""
"""The first item of a generator, so that it has begun before it is handed on."""
_log = logging.getLogger(__name__)

BAD_READS = Counter(
    "artifact_store_bad_reads",
    "Reads that found a file's bytes `lost` at every place, or other bytes than were acknowledged at one (`damaged`)",
    ("found",),
    registry=None,
)
"""Counts for this process since it began. A gateway shows it."""

_LOST, _DAMAGED = (
    BAD_READS.labels("lost"),
    BAD_READS.labels("damaged"),
)  # shown from the start, so that the first counts


class SoundReads:
    """Reads from one blob store. Belongs to one event loop."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self._hot = HotBlocks(blobs)
        self._wrong = Mistrusted[Place]()

    async def close(self) -> None:
        """End reads that no caller waits for."""
        await self._hot.close()

    async def whole(self, places: Sequence[Place], digest: bytes, size: int) -> AsyncGenerator[bytes, None]:
        """All `size` bytes with this BLAKE3 digest (32 raw bytes), from the first place that has them.

        Errors before the first byte are raised here.

        Raises (here or on iteration): CorruptError: no place has them, or this one turned out to have other bytes.
            UnavailableError.
        """
        if size <= HELD_BYTES:
            data = await self.held(places, digest, size)
            return from_any((data,) if data else ())
        missing: CorruptError | UnavailableError | None = None
        for place in self._ordered(places):
            try:
                return await _begun(self._checked(place, digest, await _begun(self._read(place, 0, size))))
            except (CorruptError, UnavailableError) as error:  # another place may have the bytes
                missing = missing or error
        raise _reported(missing)

    async def held(self, places: Sequence[Place], digest: bytes, size: int) -> bytes:
        """As `whole`, but returns the bytes of a file that has at most HELD_BYTES. Raises as `whole`."""
        missing: CorruptError | UnavailableError | None = None
        for place in self._ordered(places):
            try:
                data = await self._hot.read(*place, size)
                if data is not None and blake3(data).digest() == digest:
                    return data
                if data is not None:
                    self._hot.forget(place[0])  # it may have been repaired meanwhile
                data = await joined(self._read(place, 0, size))
            except (CorruptError, UnavailableError) as error:
                missing = missing or error
                continue
            if blake3(data).digest() == digest:
                return data
            missing = missing or self._mistrust(place)
        raise _reported(missing)

    async def part(self, places: Sequence[Place], offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """`length` bytes at `offset` of the file, from the first place that has as many. Raises as `whole`."""
        missing: CorruptError | UnavailableError | None = None
        for place in self._ordered(places):
            try:
                return await _begun(self._read(place, offset, length))
            except (CorruptError, UnavailableError) as error:
                missing = missing or error
        raise _reported(missing)

    async def _read(self, place: Place, offset: int, length: int) -> AsyncGenerator[bytes, None]:
        """A generator that must be begun, so that a missing blob is noticed at once. No bytes need no place."""
        if not length:
            yield _BEGUN
            return
        key, start = place
        chunks = self._blobs.read(key, start + offset, length)
        async with aclosing(chunks):  # type: ignore[type-var]  # every adapter's is a generator
            first = await anext(chunks)
            yield _BEGUN
            yield first
            async for chunk in chunks:
                yield chunk

    async def _checked(
        self, place: Place, digest: bytes, chunks: AsyncGenerator[bytes, None]
    ) -> AsyncGenerator[bytes, None]:
        """A generator that must be begun."""
        hasher = blake3()
        held = _BEGUN
        async with aclosing(chunks):
            async for chunk in chunks:
                yield held
                held = chunk
                hasher.update(chunk)
        if hasher.digest() != digest:
            raise self._mistrust(place)
        yield held

    def _ordered(self, places: Sequence[Place]) -> list[Place]:
        return sorted(dict.fromkeys(places), key=lambda place: place in self._wrong)

    def _mistrust(self, place: Place) -> CorruptError:
        _DAMAGED.inc()
        _log.error(
            "blob %s has other bytes than were acknowledged; `artifact-store verify --bytes` names all", place[0]
        )
        self._wrong.add(place)
        return CorruptError(f"blob {place[0]} has other bytes than were acknowledged")


def _reported(missing: CorruptError | UnavailableError | None) -> CorruptError | UnavailableError:
    """The error to raise when no location has the bytes. A loss is also logged, because a person has to repair it."""
    error = missing or CorruptError("the file has no place where its bytes lie")
    if isinstance(error, CorruptError):
        _LOST.inc()
        _log.error("the bytes of a file are lost: %s; `artifact-store verify` names all", error.detail)
    return error


async def _begun(chunks: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """The generator after its `_BEGUN`: a generator that never began would not close what it reads from."""
    await anext(chunks)
    return chunks
