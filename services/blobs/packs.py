"""Packs: many small files as one blob, so that a store writes one object where it would write a thousand.

A pack is the bytes of the small files of a bundle, one behind the other in the bundle's order, equal ones once; when
the next would not fit any more, the next pack begins. It is a blob like any other, at the key of its own BLAKE3: the
same files in the same order make the same packs, which are stored once, and whoever has the files can name the packs
without having seen the store.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections import defaultdict
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from blake3 import blake3

from artifact_store.archives.bundle import PACK_BYTES, Bundle, NamedFile, PackLayout, SmallFile, StreamedFile
from artifact_store.byte_streams import joined
from artifact_store.errors import ContentMismatchError, CorruptError, TooLargeError, UnknownContentError
from artifact_store.manifest import ContentAddress, content_key
from artifact_store.models import Declared
from services.blobs.intake import PIECE_BYTES, Cleanups, Intake
from services.blobs.memory import PartBuffer
from services.blobs.port import UPLOADS, BlobStore, Digests, StoredBlob

_SLICE = 1 << 20


@dataclass(frozen=True, slots=True)
class Placed:
    """A file of a bundle whose bytes are durable, and where they lie."""

    relative_path: str
    media_type: str
    blob: StoredBlob


class Packing:
    """Stores one bundle. Belongs to one task; holds one pack in memory."""

    def __init__(self, blobs: BlobStore, max_file_bytes: int) -> None:
        self._blobs = blobs
        self._max_file_bytes = max_file_bytes
        self._layout = PackLayout()
        self._buffer = PartBuffer(PACK_BYTES)
        self._hash = blake3()
        self._packs: list[StoredBlob] = []
        self._found: list[Placed | _Packed] = []

    async def store(self, bundle: Bundle) -> list[Placed]:
        """Store every file of the bundle; returns them in its order, once all their bytes are durable.

        Raises what iterating over the bundle raises, and as `BlobStore.store`. What was stored before under keys of
        its own is removed then, since nobody has heard of them; packs stay, since others may share them.
        """
        try:
            async for group in bundle:
                if isinstance(group, StreamedFile):
                    self._found.append(await self._store_alone(group))
                else:
                    await self._pack(group)
            if any(isinstance(found, _Packed) for found in self._found):
                await self._store_pack()
        except BaseException:
            await Cleanups().run(self._discard())
            raise
        finally:
            self._buffer.close()
        return [found if isinstance(found, Placed) else found.placed(self._packs) for found in self._found]

    async def _store_alone(self, file: StreamedFile) -> Placed:
        declared = Declared(size_bytes=file.size_bytes)
        blob = await self._blobs.store(file.body, declared=declared, max_bytes=self._max_file_bytes)
        return Placed(file.relative_path, file.media_type, blob)

    async def _discard(self) -> None:
        for found in self._found:
            if isinstance(found, Placed) and found.blob.key.startswith(UPLOADS):
                await self._blobs.delete_object(found.blob.key)

    async def _pack(self, files: Sequence[SmallFile]) -> None:
        at = 0
        while (at := await asyncio.to_thread(self._fill, files, at)) < len(files):
            await self._store_pack()

    def _fill(self, files: Sequence[SmallFile], start: int) -> int:
        """Pack files from number `start` on until one needs another pack; the number of that one. Blocks."""
        for number in range(start, len(files)):
            file = files[number]
            size = len(file.data)
            if size > min(PACK_BYTES, self._max_file_bytes):
                raise TooLargeError(f"{file.relative_path!r} has {size:,} bytes; {self._max_file_bytes:,} are taken")
            digest = blake3(file.data).digest()
            place = self._layout.place(digest, size)
            if place is None:
                return number
            pack, offset, new = place
            if new:
                self._buffer.append(file.data)
                self._hash.update(file.data)
            sha256 = hashlib.sha256(file.data).digest()
            self._found.append(_Packed(file.relative_path, file.media_type, pack, offset, size, digest, sha256))
        return len(files)

    async def _store_pack(self) -> None:
        """Store what is packed, and begin anew."""
        declared = Declared(size_bytes=len(self._buffer), blake3=self._hash.digest())
        self._packs.append(await self._blobs.store(self._bytes(), declared=declared, max_bytes=PACK_BYTES))
        self._buffer.clear()
        self._hash = blake3()
        self._layout.begin()

    async def _bytes(self) -> AsyncIterator[bytes]:
        for start in range(0, len(self._buffer), _SLICE):
            yield self._buffer.read(start, start + _SLICE)


@dataclass(frozen=True, slots=True)
class _Packed:
    """A file that lies in the pack of this number."""

    relative_path: str
    media_type: str
    pack: int
    offset: int
    size: int
    blake3: bytes
    sha256: bytes

    def placed(self, packs: Sequence[StoredBlob]) -> Placed:
        pack = packs[self.pack]
        blob = StoredBlob(pack.backend_id, pack.key, self.offset, self.size, self.blake3, self.sha256)
        return Placed(self.relative_path, self.media_type, blob)


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
