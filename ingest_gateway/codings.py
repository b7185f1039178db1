"""Compressed bodies, decoded while they stream: gzip (RFC 1952) and Zstandard (RFC 8878), bounded in every direction.

A few bytes can stand for gigabytes: no step gives more than a piece, and an archive may grow so much and no more. A
Zstandard window above 8 MiB is refused, as RFC 9659 has it for content codings.
"""

from __future__ import annotations

import asyncio
import sys
import zlib
from collections.abc import AsyncIterable, AsyncIterator
from typing import Protocol

from services.errors import InvalidArchiveError, TooLargeError

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

PIECE_BYTES = 1 << 20
"""Most bytes that one step gives."""

MAX_RATIO = 200
"""So many bytes may stand behind each compressed one; beyond FREE_BYTES more is a bomb rather than an archive."""

FREE_BYTES = 64 << 20
"""Up to here the ratio does not matter: a log full of zeros compresses by ten thousand."""

_WINDOW_LOG = 23  # 8 MiB
_GZIP_WINDOW = 31  # zlib's number for gzip with the largest window


class _Decoder(Protocol):
    """One member or frame. `decompress` takes bytes and gives at most `max_length`, keeping the rest."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    @property
    def needs_input(self) -> bool: ...

    def decompress(self, data: bytes, max_length: int) -> bytes: ...


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

    def decompress(self, data: bytes, max_length: int) -> bytes:
        given = self._decoder.decompress(self._decoder.unconsumed_tail + data, max_length)
        self._gave_all = len(given) < max_length
        return given


def _zstd() -> _Decoder:
    return zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: _WINDOW_LOG})


_DECODERS = {"gzip": _Gzip, "x-gzip": _Gzip, "zstd": _zstd}

CODINGS = frozenset(_DECODERS)
"""The names of the codings (RFC 9110 §8.4.1, RFC 8878 §7.2)."""


async def decoded(body: AsyncIterable[bytes], coding: str) -> AsyncIterator[bytes]:
    """The body without its coding, in pieces of at most PIECE_BYTES; decoding runs in threads.

    Raises (on iteration): InvalidArchiveError: it is not so coded, or cut off. TooLargeError: it grows too much.
    """
    decoding = _Decoding(coding)
    async for chunk in body:
        decoding.take(chunk)
        while piece := await asyncio.to_thread(decoding.give):
            yield piece
    decoding.close()


class _Decoding:
    """A body of one or more members or frames, one behind the other."""

    def __init__(self, coding: str) -> None:
        self._coding = coding
        self._decoder: _Decoder = _DECODERS[coding]()
        self._fresh = True
        self._waiting = b""
        self._in = 0
        self._out = 0

    def take(self, data: bytes) -> None:
        self._waiting += data
        self._in += len(data)

    def give(self) -> bytes:
        """The next piece; empty when more has to be taken first. Blocks."""
        while self._waiting or not self._decoder.needs_input:
            if self._decoder.eof:
                if not self._waiting:
                    return b""
                self._decoder = _DECODERS[self._coding]()
            data, self._waiting = self._waiting, b""
            self._fresh = False
            try:
                piece = self._decoder.decompress(data, PIECE_BYTES)
            except (zlib.error, zstd.ZstdError, MemoryError) as error:
                raise InvalidArchiveError(f"the body is not {self._coding} that can be read: {error}") from None
            if self._decoder.eof:
                self._waiting = self._decoder.unused_data
            if piece:
                self._count(len(piece))
                return piece
        return b""

    def close(self) -> None:
        """Raises InvalidArchiveError: the body ended within a member or frame, or held none."""
        if self._fresh or not self._decoder.eof:
            raise InvalidArchiveError(f"the body is cut off: its {self._coding} has no end")

    def _count(self, more: int) -> None:
        self._out += more
        if self._out > FREE_BYTES and self._out > MAX_RATIO * self._in:
            raise TooLargeError(
                f"{self._in:,} bytes of {self._coding} have become {self._out:,}: at most {MAX_RATIO} times as many "
                f"are taken beyond {FREE_BYTES:,}"
            )
