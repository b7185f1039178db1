"""Bundles in a blob store: stored as packs, found by the names of their blobs, and read with few requests.

Memory is bounded. Each bundle takes the memory of one pack from a budget of the process. There is one budget for
storing and another for reading, so that readers never keep out producers. A bundle that gets no memory in time is
pushed back before anything of it is read.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterator, Iterable, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace

from blake3 import blake3

from artifact_store.archives.bundle import (
    PACK_BYTES,
    SMALL_FILE_BYTES,
    Bundle,
    Group,
    NamedFile,
    SmallFile,
    StreamedFile,
)
from artifact_store.byte_streams import joined
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.manifest import content_key
from services.blobs.intake import LOOK_SECONDS, Pace
from services.blobs.memory import TURN_SECONDS, ByteBudget
from services.blobs.packs import Packing, Placed, find_named
from services.blobs.port import BlobStore
from services.blobs.verified_reads import SoundReads
from services.views.queries import PlacedFile

BUNDLES_AT_ONCE = 12
"""How many bundles are stored at a time, and how many are read."""

_RETRY_SECONDS = 2.0
_GROUP_BYTES = 1 << 20
_ASKED_AT_ONCE = 32
_WORTH_READING = 4  # a pack is read as a whole if at least every fourth byte of it is wanted


class BundleStore:
    """Bundles on one blob store. Belongs to one event loop."""

    def __init__(
        self,
        blobs: BlobStore,
        *,
        at_once: int = BUNDLES_AT_ONCE,
        turn_seconds: float = TURN_SECONDS,
        look_seconds: float = LOOK_SECONDS,
    ) -> None:
        """Stores `at_once` bundles at a time, and reads as many; another one waits up to `turn_seconds`.

        While others wait to be stored, bundles are checked every `look_seconds`, and slow ones are given up.
        """
        self.reads = SoundReads(blobs)
        self._blobs = blobs
        self._storing = _Turns(at_once, turn_seconds)
        self._reading = _Turns(at_once, turn_seconds)
        self._look_seconds = look_seconds

    async def store(self, bundle: Bundle, max_file_bytes: int) -> list[Placed]:
        """As `Packing.store`. Also raises PushBackError: no turn came, or the bundle was slow while others waited."""
        pace = Pace(bundle, lambda: self._storing.contended, size=_size, look_seconds=self._look_seconds)
        async with self._storing.turn(), pace:
            return await Packing(self._blobs, max_file_bytes).store(_paced(pace))

    async def find(self, files: Sequence[NamedFile]) -> list[Placed]:
        """As `find_named`. Also raises PushBackError."""
        async with self._storing.turn():
            return await find_named(self._blobs, files)

    async def known(self, digests: Iterable[bytes]) -> frozenset[bytes]:
        """The digests among these whose blobs are stored. Raises UnavailableError."""
        waiting = iter(dict.fromkeys(digests))
        found: set[bytes] = set()

        async def ask() -> None:
            for digest in waiting:
                if await self._blobs.size(content_key(digest)) is not None:
                    found.add(digest)

        await asyncio.gather(*(ask() for _ in range(_ASKED_AT_ONCE)))
        return frozenset(found)

    async def read(self, pages: AsyncIterator[Sequence[PlacedFile]]) -> AsyncGenerator[Group, None]:
        """The files of these pages with their bytes, in the same order.

        Holds its turn until it is exhausted or closed. Call `aclose` if you stop before the end.

        Raises (on iteration): CorruptError: bytes are missing. UnavailableError, PushBackError.
        """
        async with self._reading.turn():
            async for page in pages:
                async with aclosing(_Page(self._blobs, self.reads, page).groups()) as groups:
                    async for group in groups:
                        yield group


class _Turns:
    """Admits `at_once` bundles at a time, each with the memory of one pack. Belongs to one event loop."""

    def __init__(self, at_once: int, seconds: float) -> None:
        self._memory = ByteBudget(at_once * PACK_BYTES)
        self._seconds = seconds

    @property
    def contended(self) -> bool:
        """Whether anybody waits for a turn."""
        return self._memory.contended

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """A turn that lasts as long as the block. Raises PushBackError: none came within `seconds`."""
        with self._memory.share() as share:
            await share.take_in_turn(
                PACK_BYTES,
                others="other bundles",
                nothing="read",
                retry_after=_RETRY_SECONDS,
                seconds=self._seconds,
            )
            yield


@dataclass(slots=True)
class _Span:
    """The range of one blob in which the small files of a page lie."""

    start: int
    end: int
    wanted: int = 0
    read: bool = False

    def include(self, file: PlacedFile) -> None:
        self.start = min(self.start, file.offset)
        self.end = max(self.end, file.offset + file.size_bytes)
        self.wanted += file.size_bytes

    @property
    def worth_reading(self) -> bool:
        length = self.end - self.start
        return not self.read and length <= PACK_BYTES and length <= _WORTH_READING * self.wanted


class _Page:
    """The files of one page. Files in the same pack are read with one request, unless other packs come in between."""

    def __init__(self, blobs: BlobStore, reads: SoundReads, files: Sequence[PlacedFile]) -> None:
        self._blobs = blobs
        self._reads = reads
        self._files = files
        self._spans: dict[str, _Span] = {}
        self._held: tuple[str, int, bytes] | None = None
        for file in files:
            if file.size_bytes <= SMALL_FILE_BYTES:
                self._spans.setdefault(file.key, _Span(file.offset, file.offset)).include(file)

    async def groups(self) -> AsyncGenerator[Group, None]:
        group: list[SmallFile] = []
        size = 0
        for file in self._files:
            if file.size_bytes > SMALL_FILE_BYTES:
                if group:
                    yield group
                    group, size = [], 0
                async with aclosing(await self._reads.whole(places(file), file.blake3, file.size_bytes)) as body:
                    yield StreamedFile(file.relative_path, file.media_type, file.size_bytes, body)
                continue
            group.append(SmallFile(file.relative_path, file.media_type, await self._small(file)))
            size += file.size_bytes
            if size >= _GROUP_BYTES:
                yield group
                group, size = [], 0
        if group:
            yield group

    async def _small(self, file: PlacedFile) -> bytes:
        if not file.size_bytes:
            return b""
        held = self._held
        if held is None or held[0] != file.key:
            held = await self._load(file.key)
        if held is not None:
            at = file.offset - held[1]
            data = held[2][at : at + file.size_bytes]
            if blake3(data).digest() == file.blake3:
                return data
        return await self._reads.held(places(file), file.blake3, file.size_bytes)

    async def _load(self, key: str) -> tuple[str, int, bytes] | None:
        """Read the span of a blob in one request; None if that does not pay, or was done before for this page."""
        span = self._spans[key]
        if not span.worth_reading:
            return None
        span.read = True
        self._held = None  # one pack at a time
        try:
            data = await joined(self._blobs.read(key, span.start, span.end - span.start))
        except (CorruptError, UnavailableError):
            return None  # read file by file: another place may have the bytes that this one lost
        self._held = (key, span.start, data)
        return self._held


async def _paced(pace: Pace[Group]) -> AsyncIterator[Group]:
    async for group in pace:
        yield replace(group, body=pace.watched(group.body, len)) if isinstance(group, StreamedFile) else group


def _size(group: Group) -> int:
    return 0 if isinstance(group, StreamedFile) else sum(len(file.data) for file in group)


def places(file: PlacedFile) -> list[tuple[str, int]]:
    """The places of a file's bytes, as key and offset, in the order in which to try them."""
    return [(file.key, file.offset), (content_key(file.blake3), 0)]
