"""Files whose producers name bytes that are stored already: read back, hashed and secured before an event names them.

Nothing is taken on trust: a digest that fits only says what to look for. The bytes go from the store to this process
and no further.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
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


async def find_named(blobs: BlobStore, files: Sequence[NamedFile]) -> list[Placed]:
    """The files as they lie in the store, in their order, every byte verified. Holds PACK_BYTES at most.

    Raises:
        UnknownContentError: a blob is not there, or its bytes are not what is said of them. One that is damaged is
            stored anew when its bytes are sent to this process.
        UnavailableError: the store cannot be reached.
    """
    by_blob: defaultdict[bytes, list[int]] = defaultdict(list)
    for number, file in enumerate(files):
        by_blob[file.blob].append(number)
    found: dict[int, Placed] = {}
    for blob, numbers in by_blob.items():
        numbers.sort(key=lambda number: files[number].offset)
        for run in _runs(files, numbers):
            first, last = files[run[0]], max(files[number].offset + files[number].size_bytes for number in run)
            try:
                digests = await _hash_run(blobs, content_key(blob), [files[n] for n in run], first.offset, last)
            except (CorruptError, ContentMismatchError) as error:
                await _look_at_whole(blobs, blob, [files[n] for n in run])
                raise UnknownContentError(
                    f"{ContentAddress.of_digest(blob)} is not stored here as {first.relative_path!r} needs it; "
                    f"send the bytes: {error.detail}"
                ) from None
            for number, file_digests in zip(run, digests, strict=True):
                file = files[number]
                stored = StoredBlob(
                    blobs.backend_id,
                    content_key(blob),
                    file.offset,
                    file.size_bytes,
                    file_digests.blake3,
                    file_digests.sha256,
                )
                found[number] = Placed(file.relative_path, file.media_type, stored)
        await blobs.secure(content_key(blob))
    return [found[number] for number in range(len(files))]


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


def _runs(files: Sequence[NamedFile], numbers: Sequence[int]) -> Iterator[list[int]]:
    """The files of one blob, by offset, in runs that are read at once: close together, PACK_BYTES or one file."""
    run: list[int] = []
    start = end = 0
    for number in numbers:
        file = files[number]
        until = max(end, file.offset + file.size_bytes)
        if run and (file.offset > end + _GAP_BYTES or until - start > PACK_BYTES):
            yield run
            run = []
        if not run:
            start, until = file.offset, file.offset + file.size_bytes
        run.append(number)
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
