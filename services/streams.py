"""Byte streams: whatever a caller has, as one asynchronous iterator of chunks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Iterable
from typing import IO

CHUNK_BYTES = 1 << 20


async def from_any(
    stream: AsyncIterable[bytes] | Iterable[bytes] | IO[bytes] | bytes,
) -> AsyncGenerator[bytes, None]:
    """Iterate over the stream's bytes; a file object is read in a thread, so that the event loop never waits for it."""
    if isinstance(stream, bytes | bytearray | memoryview):
        yield bytes(stream)
    elif isinstance(stream, AsyncIterable):
        async for chunk in stream:
            yield chunk
    elif hasattr(stream, "read"):
        while chunk := await asyncio.to_thread(stream.read, CHUNK_BYTES):
            yield chunk
    else:
        for chunk in stream:
            yield chunk


async def joined(chunks: AsyncIterable[bytes]) -> bytes:
    """All the bytes at once, for streams that are known to fit into memory."""
    return b"".join([chunk async for chunk in chunks])
