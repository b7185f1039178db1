"""Packs: many small files in one blob, so that a store writes one object instead of a thousand.

A pack is a blob like any other, at the key of its BLAKE3, in which each file has a range. There are two kinds.

`Packing` packs a bundle: the bytes of its small files, one after the other in the bundle's order, equal ones once; a
file that does not fit begins the next pack. The same files in the same order make the same packs, which are stored
once. A client that has the files can compute the names of the packs without the store; `find_named` looks for them.

`SharedPacks` packs small bodies of different requests that arrive at the same time, as commands share a transaction. A
store writes a thousand small objects a second at best, whatever their size. So while packs of a retention class are
being stored, the small bodies of that class gather, and then become one pack (docs/decisions/shared-packs.md). There
is no timer: a body that comes alone is stored at once, under the key of its own BLAKE3. A body joins a pack only when
it is completely in memory and matches its declaration. So a slow or wrong body never affects the others.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections import defaultdict, deque
from collections.abc import AsyncIterable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from blake3 import blake3

from artifact_store.archives.bundle import (
    PACK_BYTES,
    SMALL_FILE_BYTES,
    Bundle,
    NamedFile,
    PackLayout,
    SmallFile,
    StreamedFile,
)
from artifact_store.byte_streams import joined
from artifact_store.errors import (
    ContentMismatchError,
    CorruptError,
    TooLargeError,
    UnavailableError,
    UnknownContentError,
)
from artifact_store.manifest import ContentAddress, content_key
from artifact_store.models import Declared
from services.blobs.intake import (
    LOOK_SECONDS,
    MIB,
    PIECE_BYTES,
    READ_FIRST_BYTES,
    Cleanups,
    Intake,
    Pace,
    check_declared,
    digests_of,
)
from services.blobs.memory import TURN_SECONDS
from services.blobs.port import UPLOADS, BlobStore, Digests, StoredBlob


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
        self._pieces: list[bytes] = []
        self._packs: list[StoredBlob] = []
        self._found: list[Placed | _Packed] = []

    async def store(self, bundle: Bundle) -> list[Placed]:
        """Store every file of the bundle. Returns them in the same order, when all their bytes are durable.

        Raises whatever iterating over the bundle raises, and as `BlobStore.store`. If it raises, files that were stored
        under separate keys are removed, because nobody else knows these; packs stay, because others may share them.
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
        """Pack files from number `start` on until one needs another pack. Returns the number of that one. Blocks."""
        for number in range(start, len(files)):
            file = files[number]
            size = len(file.data)
            if size > min(PACK_BYTES, self._max_file_bytes):
                raise TooLargeError(
                    f"{file.relative_path!r} has {size:,} bytes; at most {self._max_file_bytes:,} are accepted"
                )
            digest = blake3(file.data).digest()
            place = self._layout.place(digest, size)
            if place is None:
                return number
            pack, offset, new = place
            if new:
                self._pieces.append(file.data)
            sha256 = hashlib.sha256(file.data).digest()
            self._found.append(_Packed(file.relative_path, file.media_type, pack, offset, size, digest, sha256))
        return len(files)

    async def _store_pack(self) -> None:
        """Store the pack, and begin another."""
        pack = b"".join(self._pieces)
        self._pieces.clear()
        self._packs.append(await self._blobs.store_bytes(pack, await digests_of(pack)))
        self._layout.begin()


@dataclass(frozen=True, slots=True)
class _Packed:
    """A file in the pack with this number."""

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
"""Gaps of up to this many unneeded bytes are read, which takes less time than another request."""

_Slice = tuple[bytes, int, int, bytes]
"""Blob, offset, length and digest."""


async def find_named(blobs: BlobStore, files: Sequence[NamedFile]) -> list[Placed]:
    """The files' locations in the store, in the order of the files, with every byte verified. Holds PACK_BYTES at most.

    Raises:
        UnknownContentError: a blob is missing, or its bytes do not match the claims. A damaged one is stored again when
            its bytes are sent to this process.
        UnavailableError: the store cannot be reached.
    """
    by_blob: defaultdict[bytes, dict[_Slice, NamedFile]] = defaultdict(dict)
    for file in files:
        by_blob[file.blob].setdefault(_slice(file), file)  # bytes that several files share are read once
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
    """Tell the store if the blob is damaged and not just named wrongly: its bytes will be sent, and must be stored."""
    key = content_key(blob)
    size = await blobs.size(key)
    if size is None:
        return
    if size <= PACK_BYTES:
        with suppress(CorruptError):  # it is being removed
            data = await joined(blobs.read(key, 0, size))
            if (await asyncio.to_thread(blake3, data)).digest() != blob:
                blobs.mistrust(key)
    elif any((file.blake3, file.offset, file.size_bytes) == (blob, 0, size) for file in files):
        blobs.mistrust(key)  # it has just been read whole


def _runs(files: Iterable[NamedFile]) -> Iterator[list[NamedFile]]:
    """The files of one blob by offset, in runs to read at once: close together, up to PACK_BYTES or one file."""
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


SHARED_PACK_BYTES = 4 * MIB
"""The most bytes of a pack. A pack that is being stored takes this much memory in addition to its bodies."""

PACKS_AT_ONCE = 2
"""How many packs of a retention class are stored at a time; further bodies gather meanwhile."""

HOPELESS_SECONDS = 10.0
"""When a pack fails after as long, the store hangs: bodies that wait behind the pack would wait as long once more."""

SALT_BYTES = 32
"""Random bytes at the end of a pack of several bodies."""


def is_small(declared: Declared) -> bool:
    """Whether a body with this declaration may share a pack."""
    return declared.size_bytes is not None and declared.size_bytes <= SMALL_FILE_BYTES


class SharedPacks:
    """Stores small bodies in one blob store. Belongs to one event loop."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        at_once: int = PACKS_AT_ONCE,
        pack_bytes: int = SHARED_PACK_BYTES,
        turn_seconds: float = TURN_SECONDS,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Bodies take memory of the store's budget, for which they wait `turn_seconds`.

        `at_once` packs of a retention class are stored at a time, each of at most `pack_bytes`. While others wait for
        memory, slow bodies are given up every `look_seconds`.
        """
        self._blobs = blobs
        self._memory = blobs.parts.memory
        self._at_once = at_once
        self._pack_bytes = pack_bytes
        self._turn_seconds = turn_seconds
        self._look_seconds = look_seconds
        self._lanes: defaultdict[str, _Lane] = defaultdict(_Lane)
        self._storing: set[asyncio.Task[None]] = set()

    async def store(
        self, body: AsyncIterable[bytes] | bytes, *, declared: Declared, max_bytes: int, retention_class: str
    ) -> StoredBlob:
        """As `BlobStore.store`, for a body that `is_small`, in a pack with others of the retention class."""
        size = declared.size_bytes
        if size is None or not is_small(declared):
            raise ValueError("a body that shares a pack is small, and its size is declared")
        with self._memory.share() as share:
            if isinstance(body, bytes):
                held = await _take(body, declared, max_bytes)
                await share.take_in_turn(max(1, size), seconds=self._turn_seconds)
            elif size <= READ_FIRST_BYTES:
                held = await _read(Intake(body, declared=declared, max_bytes=max_bytes), size)
                await share.take_in_turn(max(1, size), seconds=self._turn_seconds)
            else:
                await share.take_in_turn(size, seconds=self._turn_seconds)
                async with Pace(
                    body, lambda: self._memory.contended, size=len, look_seconds=self._look_seconds
                ) as pace:
                    held = await _read(Intake(pace, declared=declared, max_bytes=max_bytes), size)
            return await self._join(held, self._lanes[retention_class])

    async def close(self) -> None:
        """Wait for the packs that are being stored, even if the senders of their bodies are gone."""
        while self._storing:
            await asyncio.wait(self._storing)

    async def _join(self, held: _Held, lane: _Lane) -> StoredBlob:
        """Wait until a pack with this body is durable."""
        place: asyncio.Future[StoredBlob] = asyncio.get_running_loop().create_future()
        lane.waiting.append((held, place))
        if not lane.called and lane.under_way < self._at_once:
            lane.called = True  # after all ready tasks, so that bodies that came together share the first pack
            asyncio.get_running_loop().call_soon(self._send, lane)
        return await place

    def _send(self, lane: _Lane) -> None:
        lane.called = False
        while lane.under_way < self._at_once and (pack := _Pack.of(lane.waiting, self._pack_bytes)) is not None:
            lane.under_way += 1
            task = asyncio.create_task(self._store(pack, lane))
            self._storing.add(task)
            task.add_done_callback(self._storing.discard)

    async def _store(self, pack: _Pack, lane: _Lane) -> None:
        """A separate task, so that a sender that disconnects does not affect the others."""
        clock = asyncio.get_running_loop().time
        began = clock()
        try:
            stored = await self._blobs.store_bytes(*await pack.content())
        # The whole pack failed, so every sender gets the error.
        except BaseException as error:
            pack.fail(error)
            if isinstance(error, UnavailableError) and clock() - began >= HOPELESS_SECONDS:
                while (next_one := _Pack.of(lane.waiting, self._pack_bytes)) is not None:
                    next_one.fail(error)
            if not isinstance(error, Exception):
                raise
        else:
            pack.settle(stored)
        finally:
            lane.under_way -= 1
            self._send(lane)


@dataclass(frozen=True, slots=True)
class _Held:
    """A body that is completely in memory and matches its declaration."""

    data: bytes
    digests: Digests


async def _take(data: bytes, declared: Declared, max_bytes: int) -> _Held:
    """As `_read`, for a body that is in memory already."""
    if len(data) > max_bytes:
        raise TooLargeError(f"the body is larger than the {max_bytes} bytes that are accepted")
    digests = await digests_of(data)
    check_declared(digests, declared)
    return _Held(data, digests)


async def _read(intake: Intake, size: int) -> _Held:
    data = await intake.take(size)
    if not await intake.at_end():
        await intake.take(1)  # longer than declared: raises
    return _Held(data, await intake.digests())


_Waiting = tuple[_Held, "asyncio.Future[StoredBlob]"]


@dataclass(slots=True)
class _Lane:
    """Bodies of one retention class that wait for a pack, in the order of their arrival."""

    waiting: deque[_Waiting] = field(default_factory=deque)
    under_way: int = 0
    """How many packs are being stored."""
    called: bool = False
    """Whether `_send` is about to run."""


class _Pack:
    """Consecutive bodies, equal ones once, and the futures that wait for them."""

    def __init__(self) -> None:
        self._bodies: dict[bytes, tuple[_Held, int]] = {}
        """The bodies with their offsets, by BLAKE3."""
        self._waiting: list[_Waiting] = []
        self._length = 0

    @classmethod
    def of(cls, waiting: deque[_Waiting], most_bytes: int) -> _Pack | None:
        """Take the bodies that fit into a pack; None if nobody waits any more."""
        pack = cls()
        while waiting and (not pack._waiting or pack._length + len(waiting[0][0].data) <= most_bytes):
            held, place = waiting.popleft()
            if place.done():  # its sender has disconnected
                continue
            pack._waiting.append((held, place))
            if held.digests.blake3 not in pack._bodies:
                pack._bodies[held.digests.blake3] = held, pack._length
                pack._length += len(held.data)
        return pack if pack._waiting else None

    async def content(self) -> tuple[bytes, Digests]:
        """The bytes of the pack, with their digests. Random bytes follow several bodies.

        Events name the digest of the pack. Without the random bytes, somebody who knows one body could use the digest
        to guess the others.
        """
        bodies = [held for held, _ in self._bodies.values()]
        if len(bodies) == 1:
            return bodies[0].data, bodies[0].digests
        data = b"".join([*(held.data for held in bodies), secrets.token_bytes(SALT_BYTES)])
        return data, await digests_of(data)

    def settle(self, stored: StoredBlob) -> None:
        """Give everyone who still waits the location of their body."""
        for held, place in self._waiting:
            if not place.done():
                digests, offset = held.digests, self._bodies[held.digests.blake3][1]
                place.set_result(
                    StoredBlob(stored.backend_id, stored.key, offset, digests.length, digests.blake3, digests.sha256)
                )

    def fail(self, error: BaseException) -> None:
        """Tell everyone who still waits that nothing was stored."""
        for _, place in self._waiting:
            if not place.done():
                if isinstance(error, asyncio.CancelledError):
                    place.cancel()
                else:
                    place.set_exception(error)
