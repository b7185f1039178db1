"""The sources of request bodies.

A `BodySource` can be read again from any offset, so its bytes are sent again after a lost connection. Any other stream
is sent once.
"""

from __future__ import annotations

import asyncio
import os
import stat
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from dataclasses import dataclass
from functools import partial
from io import FileIO
from pathlib import Path
from threading import Event
from typing import IO

from blake3 import blake3

from artifact_store.byte_streams import CHUNK_BYTES, Result, ended, from_any, read_chunk, to_its_end
from artifact_store.errors import ContentMismatchError

_READING = os.O_RDONLY | os.O_NONBLOCK | os.O_NOFOLLOW | os.O_CLOEXEC
"""If the name has become a pipe since the walk, do not block; if it has become a link, do not follow it."""

_HASHERS = ThreadPoolExecutor(thread_name_prefix="file-hash")
"""Separate threads: hashing a large file takes long, and other reads and look-ups of hosts must not wait for it."""


class BodySource(ABC, AsyncIterable[bytes]):
    """A body that can be read any number of times, in chunks of at most 1 MiB.

    `size_bytes` is its length, or None if that is not known in advance.
    """

    size_bytes: int | None

    @property
    def digest(self) -> bytes | None:
        """The BLAKE3 of the whole body (32 raw bytes), or None if it would have to be read for that."""
        return None

    @abstractmethod
    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        """Read from the beginning. Close the iterator if you stop before its end."""

    def behind(self, offset: int) -> BodySource:
        """The body from this offset on."""
        return _Rest(self, offset)

    async def blake3(self) -> bytes:
        """Read the whole body and return its BLAKE3 (32 raw bytes). Raises whatever iterating raises."""
        hashed = blake3()
        async with aclosing(aiter(self)) as chunks:
            async for chunk in chunks:
                await asyncio.to_thread(hashed.update, chunk)
        return hashed.digest()


class _Rest(BodySource):
    """Another source without its first bytes, which are read and dropped."""

    def __init__(self, source: BodySource, offset: int) -> None:
        self._source = source
        self._offset = offset
        self.size_bytes = None if source.size_bytes is None else source.size_bytes - offset

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        left = self._offset
        async with aclosing(aiter(self._source)) as chunks:
            async for chunk in chunks:
                if left < len(chunk):
                    yield chunk[left:]
                left = max(0, left - len(chunk))


class BytesSource(BodySource):
    """A body in memory."""

    def __init__(self, data: bytes | bytearray | memoryview) -> None:
        self._data = memoryview(data).cast("B")
        self.size_bytes = len(self._data)

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        for start in range(0, len(self._data), CHUNK_BYTES):
            yield bytes(self._data[start : start + CHUNK_BYTES])

    @property
    def digest(self) -> bytes:
        return blake3(self._data).digest()


class PiecesSource(BodySource):
    """A body that lies in memory in many small pieces. They are joined as they are sent, 1 MiB at a time."""

    def __init__(self, pieces: Sequence[bytes]) -> None:
        self._pieces = pieces
        self.size_bytes = sum(map(len, pieces))

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        start = size = 0
        for number, piece in enumerate(self._pieces):
            if size and size + len(piece) > CHUNK_BYTES:
                yield b"".join(self._pieces[start:number])
                start, size = number, 0
            size += len(piece)
        if size:
            yield b"".join(self._pieces[start:])


@dataclass(frozen=True, slots=True)
class FileStamp:
    """The size in bytes and the modification time in ns of a file, by which a change is noticed."""

    size_bytes: int
    modified_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> FileStamp:
        return cls(found.st_size, found.st_mtime_ns)


class FileSource(BodySource):
    """A file on disk that must not change from its `stamp`. It is read in threads, so the event loop never waits.

    Iterating raises ContentMismatchError if the file has changed since `stamp`, and OSError if it cannot be read.
    """

    def __init__(self, path: Path | str, stamp: FileStamp, offset: int = 0) -> None:
        """Reading begins at `offset`."""
        self._path = path
        self._stamp = stamp
        self._offset = offset
        self.size_bytes = stamp.size_bytes - offset

    def behind(self, offset: int) -> BodySource:
        return FileSource(self._path, self._stamp, self._offset + offset)

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        opened: list[int] = []  # a descriptor: a file object that is dropped unread would warn
        try:
            await to_its_end(lambda: opened.append(os.open(self._path, _READING)))
            (descriptor,) = opened
            self._check(descriptor)
            at, end = self._offset, self._stamp.size_bytes
            while at < end:
                chunk = await to_its_end(partial(os.pread, descriptor, min(end - at, CHUNK_BYTES), at))
                if not chunk:
                    raise self._changed()
                at += len(chunk)
                yield chunk
            await to_its_end(partial(self._check_end, descriptor))
        finally:
            for descriptor in opened:
                os.close(descriptor)

    async def blake3(self) -> bytes:
        """See `BodySource`. One thread reads and hashes."""
        given_up = Event()
        hashing = asyncio.get_running_loop().run_in_executor(_HASHERS, self._hash_now, given_up)
        return await ended(hashing, given_up)

    def _hash_now(self, given_up: Event) -> bytes:
        hashed = blake3()
        descriptor = os.open(self._path, _READING)
        try:
            self._check(descriptor)
            os.lseek(descriptor, self._offset, os.SEEK_SET)
            left, room = self.size_bytes, memoryview(bytearray(CHUNK_BYTES))
            with FileIO(descriptor, closefd=False) as file:
                while left and not given_up.is_set():
                    size = file.readinto(room[:left])
                    if not size:
                        raise self._changed()
                    hashed.update(room[:size])
                    left -= size
            self._check_end(descriptor)
        finally:
            os.close(descriptor)
        return hashed.digest()

    async def read_whole(self) -> bytes:
        """The file's bytes at once, for files that fit into memory. Raises as iterating does."""
        return await asyncio.to_thread(self.read_now)

    def read_now(self) -> bytes:
        """As `read_whole`; blocks."""
        descriptor = os.open(self._path, _READING)
        try:
            self._check(descriptor)
            data = os.read(descriptor, self._stamp.size_bytes + 1)
            while len(data) < self._stamp.size_bytes and (more := os.read(descriptor, CHUNK_BYTES)):
                data += more
            if len(data) != self._stamp.size_bytes:
                raise self._changed()
            self._check(descriptor)
        finally:
            os.close(descriptor)
        return data

    def _check_end(self, descriptor: int) -> None:
        """Raise as `_check`, also if more bytes follow: files that the kernel generates are longer than they claim."""
        self._check(descriptor)
        if os.pread(descriptor, 1, self._stamp.size_bytes):
            raise self._changed()

    def _check(self, descriptor: int) -> None:
        """Raise ContentMismatchError unless the file still has its stamp."""
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise ContentMismatchError(f"{self._path} is no longer a regular file")
        if (found.st_size, found.st_mtime_ns) != (self._stamp.size_bytes, self._stamp.modified_ns):
            raise self._changed()

    def _changed(self) -> ContentMismatchError:
        return ContentMismatchError(
            f"{self._path} changed while it was pushed; push it again once nothing writes to it"
        )


class SeekableSource(BodySource):
    """A seekable file object, read from its position at the time of construction."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._start = file.tell()
        self._turn = asyncio.Lock()
        self.size_bytes = None

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        await self._do(partial(self._file.seek, self._start))
        while chunk := await self._do(partial(read_chunk, self._file)):
            yield chunk

    async def _do(self, work: Callable[[], Result]) -> Result:
        """Do one step at a time: a read left over from an earlier attempt would move the file's position."""
        async with self._turn:
            return await to_its_end(work)


class CountedSource(BodySource):
    """A source that reports to `advance` how many more bytes were read; negative when bytes are read again."""

    def __init__(self, source: BodySource, advance: Callable[[int], None]) -> None:
        self._source = source
        self._advance = advance
        self._read = 0
        self.size_bytes = source.size_bytes

    @property
    def digest(self) -> bytes | None:
        return self._source.digest

    async def blake3(self) -> bytes:
        """As `BodySource.blake3`; these bytes are not counted."""
        return await self._source.blake3()

    def behind(self, offset: int) -> BodySource:
        return _CountedRest(self, self._source.behind(offset), offset)

    def count(self, read: int) -> None:
        """Report that this many bytes from the beginning have been read."""
        self._advance(read - self._read)
        self._read = read

    def __aiter__(self) -> AsyncGenerator[bytes, None]:
        return aiter(_CountedRest(self, self._source, 0))


class _CountedRest(BodySource):
    """The rest of a counted source."""

    def __init__(self, counted: CountedSource, source: BodySource, offset: int) -> None:
        self._counted = counted
        self._source = source
        self._offset = offset
        self.size_bytes = source.size_bytes

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        read = self._offset
        self._counted.count(read)
        async with aclosing(aiter(self._source)) as chunks:
            async for chunk in chunks:
                read += len(chunk)
                self._counted.count(read)
                yield chunk


def source_of(stream: AsyncIterable[bytes] | Iterable[bytes] | IO[bytes] | bytes) -> AsyncIterable[bytes]:
    """The stream as a BodySource if it can be read again, otherwise as a plain asynchronous iterator."""
    if isinstance(stream, BodySource):
        return stream
    if isinstance(stream, bytes | bytearray | memoryview):
        return BytesSource(stream)
    seekable: Callable[[], bool] | None = getattr(stream, "seekable", None)
    if seekable is not None and hasattr(stream, "read") and seekable():
        return SeekableSource(stream)  # type: ignore[arg-type]  # it reads and seeks: a binary file object
    return from_any(stream)
