"""Byte streams: any stream of a caller as an asynchronous iterator of chunks; and work on files in threads.

A thread cannot be stopped, so cancelled work is waited for. Otherwise a file could be closed while the thread uses it,
and its descriptor could be given to another file.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from contextlib import suppress
from threading import Event
from typing import IO, TypeVar

from artifact_store.errors import InvalidRequestError

CHUNK_BYTES = 1 << 20


async def from_any(
    stream: AsyncIterable[bytes] | Iterable[bytes] | IO[bytes] | bytes,
) -> AsyncGenerator[bytes, None]:
    """Iterate over the stream's bytes. File objects are read in a thread, so the event loop never waits for them.

    Raises InvalidRequestError for a non-blocking file object.
    """
    if isinstance(stream, bytes | bytearray | memoryview):
        yield bytes(stream)
    elif isinstance(stream, AsyncIterable):
        async for chunk in stream:
            yield chunk
    elif hasattr(stream, "read"):
        while chunk := await asyncio.to_thread(read_chunk, stream):  # type: ignore[arg-type]  # it reads: a file object
            yield chunk
    else:
        for chunk in stream:
            yield chunk


def read_chunk(file: IO[bytes]) -> bytes:
    """The file object's next bytes, at most CHUNK_BYTES, empty only at its end. Blocks.

    Raises InvalidRequestError if it is non-blocking (`io.RawIOBase.read` then returns None while there are no bytes).
    """
    chunk: bytes | None = file.read(CHUNK_BYTES)
    if chunk is None:
        raise InvalidRequestError("the stream is non-blocking: make it blocking")
    return chunk


async def joined(chunks: AsyncIterable[bytes]) -> bytes:
    """All the bytes at once, for streams that are known to fit into memory."""
    return b"".join([chunk async for chunk in chunks])


Result = TypeVar("Result")


async def to_its_end(work: Callable[[], Result], given_up: Event | None = None) -> Result:
    """Do `work` in a thread and return its result. When cancelled, however often, wait for the thread first.

    Cancelling sets `given_up`, which long work may check.
    """
    return await ended(asyncio.ensure_future(asyncio.to_thread(work)), given_up)


async def ended(doing: asyncio.Future[Result], given_up: Event | None = None) -> Result:
    """As `to_its_end`, for work that a thread is doing already."""
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        if given_up is not None:
            given_up.set()
        while not doing.done():
            with suppress(asyncio.CancelledError):  # a second cancellation must not abandon the thread either
                await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()  # retrieve it; the caller gets the cancellation instead
        raise
