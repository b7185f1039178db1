"""Compressed bodies, decoded while they stream: gzip (RFC 1952) and Zstandard (RFC 8878), bounded in every direction.

A few bytes can expand to gigabytes: each step returns at most one piece, and the ratio of expansion is bounded. The
number of almost empty members or frames is bounded too, because each costs a decoder. A Zstandard window above 8 MiB is
refused, as RFC 9659 requires for content codings.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol

from artifact_store.errors import InvalidArchiveError, TooLargeError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1 << 20
"""Maximum number of bytes that one step returns."""

MAX_RATIO = 200
"""Maximum ratio of decompressed to compressed bytes beyond FREE_BYTES: more is a bomb, not an archive."""

FREE_BYTES = 64 << 20
"""Up to this many decompressed bytes any ratio is allowed: a log full of zeros compresses ten thousand times."""

FREE_FRAMES = 64
"""So many members or frames may have any size. Beyond that, one is allowed for each FRAME_BYTES of the archive."""

FRAME_BYTES = 512

_BEGINNING_BYTES = 1024  # of a frame are decoded first: it may end there, and bytes after its end are copied

_WINDOW_LOG = 23  # 8 MiB
_GZIP_WINDOW = 31  # zlib's number for gzip with the largest window


class _Decoder(Protocol):
    """Decodes one member or frame. `decompress` returns at most `max_length` bytes and keeps the rest.

    It copies input that follows the end into `unused_data`.
    """

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: memoryview, max_length: int) -> bytes: ...


class _Gzip:
    """zlib's decoder with the interface of the others."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(_GZIP_WINDOW)
        self._gave_all = True

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data

    @property
    def needs_input(self) -> bool:
        return self._gave_all and not self._decoder.unconsumed_tail

    def decompress(self, data: memoryview, max_length: int) -> bytes:
        given = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self._gave_all = len(given) < max_length
        return given


def _zstd() -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


_DECODERS = {"gzip": _Gzip, "x-gzip": _Gzip, "zstd": _zstd}

CODINGS = frozenset(_DECODERS)
"""The names of the codings (RFC 9110 §8.4.1, RFC 8878 §7.2)."""


async def decoded(body: AsyncIterable[bytes], coding: str) -> AsyncIterator[bytes]:
    """The decoded body, in pieces of at most PIECE_BYTES; decoding runs in threads.

    On iteration, raises InvalidArchiveError if the body is not in this coding or is cut off, TooLargeError if it
    expands too much.
    """
    decoding = _Decoding(coding)
    async for chunk in body:
        decoding.take(chunk)
        while piece := await asyncio.to_thread(decoding.give):
            yield piece
    decoding.close()


class _Decoding:
    """Decodes a body of one or more consecutive members or frames."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: _Decoder = _DECODERS[coding]()
        self._fresh = True  # whether the decoder has had no input yet
        self._data = memoryview(b"")
        self._at = 0  # how much of it was given to a decoder
        self._frames = 1
        self._in = 0
        self._out = 0

    def take(self, data: bytes) -> None:
        """Take a piece of the body. `give` must have returned all of the previous piece."""
        self._data, self._at = memoryview(data), 0
        self._in += len(data)

    def give(self) -> bytes:
        """The next piece; empty if more has to be taken first. Blocks."""
        pieces: list[bytes] = []
        room = PIECE_BYTES
        while room and (self._at < len(self._data) or not self._decoder.needs_input):
            if self._decoder.eof:
                if self._at == len(self._data):
                    break
                self._begin()
            piece = self._decode(room)
            if piece:
                self._count(len(piece))
                pieces.append(piece)
                room -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def _begin(self) -> None:
        self._frames += 1
        if self._frames > FREE_FRAMES + self._out // FRAME_BYTES:
            raise InvalidArchiveError(
                f"{self._frames:,} members or frames of {self._coding} hold {self._out:,} bytes: pack more into each"
            )
        self._decoder, self._fresh = _DECODERS[self._coding](), True

    def _decode(self, most: int) -> bytes:
        start = self._at
        if self._decoder.needs_input:
            self._at = min(len(self._data), start + _BEGINNING_BYTES) if self._fresh else len(self._data)
            self._fresh = False
        try:
            piece = self._decoder.decompress(self._data[start : self._at], most)
        except (zlib.error, zstd.ZstdError, MemoryError) as error:
            raise InvalidArchiveError(f"the body is not valid {self._coding}: {error}") from None
        if self._decoder.eof:
            self._at -= len(self._decoder.unused_data)
        return piece

    def close(self) -> None:
        """Raises InvalidArchiveError if the body ended within a member or frame, or contained none."""
        if self._fresh or not self._decoder.eof:
            raise InvalidArchiveError(f"the body is cut off: its {self._coding} stream is incomplete")

    def _count(self, more: int) -> None:
        self._out += more
        if self._out > FREE_BYTES and self._out > MAX_RATIO * self._in:
            raise TooLargeError(
                f"{self._in:,} bytes of {self._coding} have become {self._out:,}: at most {MAX_RATIO} times as many "
                f"are taken beyond {FREE_BYTES:,}"
            )
