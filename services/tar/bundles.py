"""Bundles as tar archives, in both directions, while they stream."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Sequence

from services.bundle import Bundle, Group, SmallFile, StreamedFile
from services.media_types import guess_media_type
from services.tar.reading import EntryBegin, EntryPiece, Found, TarReader, WholeEntry
from services.tar.writing import END, entry_header, padding

FED_BYTES = 512 * 1024
"""About so many bytes of an archive are taken apart at a time, in a thread."""


async def entries_of(reader: TarReader, body: AsyncIterable[bytes]) -> AsyncIterator[Group]:
    """The files of an archive that arrives in `body`, their media types guessed from their names.

    Raises (on iteration) as `TarReader`, and what the body raises.
    """
    steps = _steps(reader, body)
    group: list[SmallFile] = []
    async for found in steps:
        rest = list(reversed(found))
        while rest:
            match rest.pop():
                case WholeEntry(path, data):
                    group.append(SmallFile(path, guess_media_type(path), data))
                case EntryBegin(path, size):
                    if group:
                        yield group
                        group = []
                    pieces = _pieces(size, rest, steps)
                    yield StreamedFile(path, guess_media_type(path), size, pieces)
                    async for _ in pieces:  # what the taker has left
                        pass
        if group:
            yield group
            group = []


async def _pieces(size: int, rest: list[Found], steps: AsyncIterator[list[Found]]) -> AsyncIterator[bytes]:
    left = size
    while left:
        while not rest:
            rest.extend(reversed(await anext(steps)))
        match rest.pop():
            case EntryPiece(data):
                left -= len(data)
                yield data


async def _steps(reader: TarReader, body: AsyncIterable[bytes]) -> AsyncIterator[list[Found]]:
    """What the archive holds, step by step; then the check that it was whole."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        if size >= FED_BYTES:
            yield await asyncio.to_thread(reader.feed, b"".join(waiting))
            waiting, size = [], 0
    yield await asyncio.to_thread(reader.feed, b"".join(waiting))
    reader.close()


async def tar_of(bundle: Bundle, modified: int = 0) -> AsyncGenerator[bytes, None]:
    """The bundle as an archive; every entry's time is `modified`, in seconds since 1970."""
    async for group in bundle:
        if isinstance(group, StreamedFile):
            yield entry_header(group.relative_path, group.size_bytes, modified)
            async for piece in group.body:
                yield piece
            yield padding(group.size_bytes)
        else:
            yield tar_of_small(group, modified)
    yield END


def tar_of_small(files: Sequence[SmallFile], modified: int = 0) -> bytes:
    """The entries of small files, without the archive's end."""
    pieces: list[bytes] = []
    for file in files:
        size = len(file.data)
        pieces += (entry_header(file.relative_path, size, modified), file.data, padding(size))
    return b"".join(pieces)
