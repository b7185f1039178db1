"""Bundles: many files that are transferred together, small ones whole, larger ones as streams, in a fixed order.

A bundle is an asynchronous iterator of groups. A group is a sequence of small files, or one larger file, whose stream
must be read to its end before the next group is requested. Only one group is in memory. `PackLayout` says how a store
packs small files into blobs, so that a client can name the blobs without sending them.
"""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator, Sequence
from dataclasses import dataclass

MAX_BUNDLE_FILES = 10_000
"""The most files that are ingested together, in one command and one transaction."""

SMALL_FILE_BYTES = 256 * 1024
"""Files up to this size are small: they are sent whole and packed. Asking whether one is stored costs as much as
sending it."""

PACK_BYTES = 8 << 20
"""The most bytes of a pack. Every store accepts this in one request."""


@dataclass(frozen=True, slots=True)
class SmallFile:
    """A file with all its bytes, at most SMALL_FILE_BYTES."""

    relative_path: str
    media_type: str
    data: bytes


@dataclass(frozen=True, slots=True)
class StreamedFile:
    """A larger file. `body` gives its `size_bytes` bytes, and can be read once."""

    relative_path: str
    media_type: str
    size_bytes: int
    body: AsyncIterator[bytes]


Group = Sequence[SmallFile] | StreamedFile
Bundle = AsyncIterable[Group]


class HeldFiles(AsyncIterable[Group]):
    """A bundle of small files in memory. It can be iterated, and therefore sent, any number of times."""

    def __init__(self, files: Sequence[SmallFile]) -> None:
        self.files = files

    async def __aiter__(self) -> AsyncIterator[Group]:
        yield self.files


@dataclass(frozen=True, slots=True)
class NamedFile:
    """A file whose bytes the store should have: `size_bytes` at `offset` in the blob with this BLAKE3 (32 raw bytes).

    `blake3` is the file's own digest. A file that is a whole blob has the blob's digest and offset 0.
    """

    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    blob: bytes
    offset: int = 0


class PackLayout:
    """Where each file of a bundle lies in packs. Client and store follow the same rule. Digests are 32 raw bytes."""

    def __init__(self) -> None:
        self._places: dict[bytes, tuple[int, int]] = {}
        self._pack = 0
        self._length = 0

    def place(self, digest: bytes, size: int) -> tuple[int, int, bool] | None:
        """The pack's number, the offset in it, and whether these bytes are new. None: begin another pack first."""
        known = self._places.get(digest)
        if known is not None:
            return *known, False
        if self._length and self._length + size > PACK_BYTES:
            return None
        place = self._places[digest] = (self._pack, self._length)
        self._length += size
        return *place, True

    def begin(self) -> None:
        """Begin the next pack."""
        self._pack += 1
        self._length = 0
