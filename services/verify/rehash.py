"""Reading an object once and hashing it whole and in every range that somebody claims something of."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterable, Callable, Sequence
from itertools import groupby

from blake3 import blake3

from services.verify.notes import Claim

_INLINE_BYTES = 64 * 1024  # up to here hashing takes less time than handing the work to a thread


class Rehash:
    """The object of `size` bytes under one key. `sound` are the claims that its bytes bear out, `broken` the others."""

    def __init__(self, size: int, claims: Sequence[Claim]) -> None:
        """`claims` come by their start, then by their length."""
        ordered = [
            (place, list(same)) for place, same in groupby(claims, key=lambda claim: (claim.start, claim.length))
        ]
        self._waiting = [_Range(start, length, same) for (start, length), same in ordered]
        self._waiting.reverse()
        self._reading: list[_Range] = []
        self._size = size
        self._at = 0
        self._whole = blake3()
        self.sound: list[Claim] = []
        self.broken: list[Claim] = []
        self.digest = b""
        """BLAKE3 of the whole (32 raw bytes)."""

    async def read(self, chunks: AsyncIterable[bytes], count: Callable[[int], None]) -> None:
        """Read the object to its end; `count` is told the length of each piece. Raises what the chunks raise."""
        async for chunk in chunks:
            if len(chunk) <= _INLINE_BYTES:
                self._feed(chunk)
            else:
                await asyncio.to_thread(self._feed, chunk)
            count(len(chunk))
        for range_ in (*self._reading, *self._waiting):
            self._finish(range_)
        self.digest = self._whole.digest()

    def _feed(self, chunk: bytes) -> None:
        begin, end = self._at, self._at + len(chunk)
        view = memoryview(chunk)
        while self._waiting and self._waiting[-1].start < end:
            self._reading.append(self._waiting.pop())
        self._whole.update(view)
        for range_ in self._reading:
            range_.feed(view[max(range_.start - begin, 0) : max(range_.end - begin, 0)])
            if range_.end <= end:
                self._finish(range_)
        self._reading = [range_ for range_ in self._reading if range_.end > end]
        self._at = end

    def _finish(self, range_: _Range) -> None:
        for claim in range_.claims:
            whole = not claim.whole or self._size == claim.length
            (self.sound if whole and range_.bears_out(claim) else self.broken).append(claim)


class _Range:
    def __init__(self, start: int, length: int, claims: list[Claim]) -> None:
        self.start = start
        self.end = start + length
        self.claims = claims
        self._left = length
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256()

    def feed(self, data: memoryview) -> None:
        self._left -= len(data)
        self._blake3.update(data)
        self._sha256.update(data)

    def bears_out(self, claim: Claim) -> bool:
        found = self._blake3.digest() == claim.blake3 and claim.sha256 in (b"", self._sha256.digest())
        return found and not self._left
