"""Compressed bodies are decoded however they are split, at a cost that is bounded by their contents."""

from __future__ import annotations

import gzip
import random
import sys
from collections.abc import AsyncIterator
from typing import Any

import pytest

from artifact_store.errors import InvalidArchiveError
from ingest_gateway.protocol import codings
from ingest_gateway.protocol.codings import FRAME_BYTES, FREE_FRAMES, PIECE_BYTES, decoded

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

COMPRESS = {"gzip": lambda data: gzip.compress(data, 1), "zstd": zstd.compress}


async def chunks(body: bytes, size: int) -> AsyncIterator[bytes]:
    for start in range(0, len(body), size):
        yield body[start : start + size]


async def read(body: bytes, coding: str, size: int = 65_536) -> bytes:
    found = bytearray()
    async for piece in decoded(chunks(body, size), coding):
        assert 0 < len(piece) <= PIECE_BYTES
        found += piece
    return bytes(found)


@pytest.mark.parametrize("coding", COMPRESS)
@pytest.mark.parametrize("size", [1, 1000, 65_536, 1 << 24])
async def test_frames_are_one_body_however_it_is_cut(coding: str, size: int) -> None:
    rng = random.Random(size)
    lengths = [0, 1, 600, 5000] if size == 1 else [0, 1, 600, 3 * PIECE_BYTES, 70_000, 0, PIECE_BYTES]
    parts = [rng.randbytes(length // 2) + bytes(length - length // 2) for length in lengths]
    body = b"".join(map(COMPRESS[coding], parts))
    assert await read(body, coding, size) == b"".join(parts)
    with pytest.raises(InvalidArchiveError, match="cut off"):
        await read(body[:-3], coding, size)


@pytest.mark.parametrize("coding", COMPRESS)
async def test_what_follows_a_small_frame_is_not_copied_with_each(coding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    copied = 0

    class Watched:
        def __init__(self) -> None:
            self._decoder = decoder()

        def __getattr__(self, name: str) -> Any:
            found = getattr(self._decoder, name)
            if name == "unused_data":
                nonlocal copied
                copied += len(found)
            return found

    decoder = codings._DECODERS[coding]
    monkeypatch.setitem(codings._DECODERS, coding, Watched)
    body = COMPRESS[coding](b"x" * FRAME_BYTES) * 1000
    assert len(await read(body, coding)) == 1000 * FRAME_BYTES
    assert copied < 1000 * 1024


@pytest.mark.parametrize("coding", COMPRESS)
async def test_frames_that_hold_nothing_are_refused_beyond_a_few(coding: str) -> None:
    empty, full = COMPRESS[coding](b""), COMPRESS[coding](b"x" * FRAME_BYTES * 10)
    assert await read(empty * FREE_FRAMES, coding) == b""
    assert len(await read(full + empty * FREE_FRAMES, coding)) == FRAME_BYTES * 10
    with pytest.raises(InvalidArchiveError, match="pack more into each"):
        await read(empty * (FREE_FRAMES + 1), coding)
