"""Files whose producers name bytes that are stored already: read back, hashed and secured before an event names them.

Nothing is taken on trust: a digest that fits only says what to look for. The bytes go from the store to this process
and no further.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from blake3 import blake3

from services.blobs.intake import PIECE_BYTES, Intake
from services.blobs.packs import PACK_BYTES, Placed
from services.blobs.port import BlobStore, Declared, Digests, StoredBlob, content_key
from services.bundle import NamedFile
from services.core.content_address import ContentAddress
from services.errors import ContentMismatchError, CorruptError, UnknownContentError
from services.streams import joined

_GAP_BYTES = 64 * 1024
"""So many bytes that nobody asked for are read rather than asking the store once more."""

_Slice = tuple[bytes, int, int, bytes]
"""Blob, offset, length and digest."""


async def find_named(blobs: BlobStore, files: Sequence[NamedFile]) -> list[Placed]:
    """The files as they lie in the store, in their order, every byte verified. Holds PACK_BYTES at most.

    Raises:
        UnknownContentError: a blob is not there, or its bytes are not what is said of them. One that is damaged is
            stored anew when its bytes are sent to this process.
        UnavailableError: the store cannot be reached.
    """
    by_blob: defaultdict[bytes, dict[_Slice, NamedFile]] = defaultdict(dict)
    for file in files:
        by_blob[file.blob].setdefault(_slice(file), file)  # what several names stand for is read once
    found: dict[_Slice, StoredBlob] = {}
    for blob, slices in by_blob.items():
        key = content_key(blob)
        for run in _runs(sorted(slices.values(), key=lambda file: file.offset)):
            first, last = run[0], max(file.offset + file.size_bytes for file in run)
            try:
                digests = await _hash_run(blobs, key, run, first.offset, last)
            except (CorruptError, ContentMismatchError) as error:
                await _look_at_whole(blobs, blob, run)
                raise UnknownContentError(
                    f"{ContentAddress.of_digest(blob)} is not stored here as {first.relative_path!r} needs it; "
                    f"send the bytes: {error.detail}"
                ) from None
            for file, of_file in zip(run, digests, strict=True):
                found[_slice(file)] = StoredBlob(
                    blobs.backend_id, key, file.offset, file.size_bytes, of_file.blake3, of_file.sha256
                )
        await blobs.secure(key)
    return [Placed(file.relative_path, file.media_type, found[_slice(file)]) for file in files]


def _slice(file: NamedFile) -> _Slice:
    return file.blob, file.offset, file.size_bytes, file.blake3


async def _look_at_whole(blobs: BlobStore, blob: bytes, files: Sequence[NamedFile]) -> None:
    """Tell the store if the blob is damaged and not only named wrongly: its bytes come next, and must be stored."""
    key = content_key(blob)
    size = await blobs.size(key)
    if size is None:
        return
    if size <= PACK_BYTES:
        with suppress(CorruptError):  # it is just going away
            data = await joined(blobs.read(key, 0, size))
            if (await asyncio.to_thread(blake3, data)).digest() != blob:
                blobs.mistrust(key)
    elif any((file.blake3, file.offset, file.size_bytes) == (blob, 0, size) for file in files):
        blobs.mistrust(key)  # it was read whole just now


def _runs(files: Iterable[NamedFile]) -> Iterator[list[NamedFile]]:
    """The files of one blob, by offset, in runs that are read at once: close together, PACK_BYTES or one file."""
    run: list[NamedFile] = []
    start = end = 0
    for file in files:
        until = max(end, file.offset + file.size_bytes)
        if run and (file.offset > end + _GAP_BYTES or until - start > PACK_BYTES):
            yield run
            run = []
        if not run:
            start, until = file.offset, file.offset + file.size_bytes
        run.append(file)
        end = until
    if run:
        yield run


async def _hash_run(blobs: BlobStore, key: str, files: Sequence[NamedFile], start: int, end: int) -> list[Digests]:
    if end - start > PACK_BYTES:
        (file,) = files
        declared = Declared(size_bytes=file.size_bytes, blake3=file.blake3)
        intake = Intake(blobs.read(key, start, file.size_bytes), declared=declared, max_bytes=file.size_bytes)
        while await intake.take(PIECE_BYTES):
            pass
        return [await intake.digests()]
    data = await joined(blobs.read(key, start, end - start))
    return await asyncio.to_thread(_hash_slices, memoryview(data), files, start)


def _hash_slices(data: memoryview, files: Sequence[NamedFile], start: int) -> list[Digests]:
    found = []
    for file in files:
        piece = data[file.offset - start : file.offset - start + file.size_bytes]
        digest = blake3(piece).digest()
        if digest != file.blake3:
            raise ContentMismatchError(f"the BLAKE3 of {file.relative_path!r} is {digest.hex()} there")
        found.append(Digests(len(piece), digest, hashlib.sha256(piece).digest()))
    return found
