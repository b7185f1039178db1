"""Parts of uploads as separate named objects, copied into one blob at the end: for folders, and for small uploads.

The copy costs no extra read, because the bytes have to be read for their digests anyway.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from uuid import UUID, uuid4

from artifact_store.errors import TooLargeError, UploadNotFoundError
from artifact_store.models import Declared
from services.blobs.intake import LARGEST_PART, MAX_PARTS, MIB
from services.blobs.memory import ByteBudget, PartBuffer
from services.blobs.port import RESUMABLE, BlobStore, Digests, DirectPart, Part, PartAddress, PartsKey, StoredBlob

PART_BYTES = 8 * MIB
_MEMORY_BYTES = 96 * MIB


class ObjectParts:
    """See `PartStore`. The blob is at its content-addressed key, where others may share it."""

    def __init__(self, blobs: BlobStore, *, part_bytes: int = PART_BYTES, memory: ByteBudget | None = None) -> None:
        self._blobs = blobs
        self._part_bytes = part_bytes
        self._memory = memory or ByteBudget(max(_MEMORY_BYTES, part_bytes))

    @property
    def memory(self) -> ByteBudget:
        """See the port."""
        return self._memory

    @property
    def longest(self) -> int:
        """See the port."""
        return MAX_PARTS * LARGEST_PART

    @property
    def max_number(self) -> int:
        """See the port. Only the form of the names limits it."""
        return 99_999_999

    def part_bytes(self, length: int) -> int:
        """See the port."""
        if length > self.longest:
            raise TooLargeError(f"an upload may have {self.longest:,} bytes here")
        return self._part_bytes

    async def begin(self, upload_id: UUID, length: int) -> str:
        """See the port. Nothing must be prepared; the parts of another call have other names."""
        return uuid4().hex

    async def put(self, where: PartsKey, number: int, part: PartBuffer) -> str:
        """See the port."""
        await self._blobs.put_object(_key(where, number), part.read(0, len(part)))
        return ""

    async def takes_direct(self, where: PartsKey) -> bool:
        """See the port. They cannot, because these parts are objects of the gateways."""
        return False

    def addresses(self, where: PartsKey, parts: Sequence[DirectPart]) -> list[PartAddress]:
        """See the port."""
        raise ValueError("parts that are objects of their own come through a gateway")

    def sent(self, part: DirectPart, etag: str) -> Part:
        """See the port."""
        raise ValueError("parts that are objects of their own come through a gateway")

    async def assemble(
        self, where: PartsKey, parts: Sequence[Part], *, declared: Declared, digests: Digests | None = None
    ) -> StoredBlob:
        """See the port. The copy reads everything."""

        async def pieces() -> AsyncIterator[bytes]:
            for part in parts:
                key = _key(where, part.number)
                size = await self._blobs.size(key)
                if size is None:
                    raise UploadNotFoundError(f"part {part.number} of this upload was removed: begin a new one")
                async for chunk in self._blobs.read(key, 0, size):
                    yield chunk

        return await self._blobs.store(pieces(), declared=declared, max_bytes=self.longest)

    def blob_key(self, where: PartsKey) -> str | None:
        """See the port. Always None, because the blob is content-addressed."""
        return None

    async def discard(self, where: PartsKey, *, blob: bool) -> None:
        """See the port. The blob stays: other uploads may share it."""
        prefix = _prefix(where)
        for key in await self._blobs.list_objects(f"{RESUMABLE}{where.upload_id}/"):
            if key.startswith(prefix):
                await self._blobs.delete_object(key)


def _prefix(where: PartsKey) -> str:
    return f"{RESUMABLE}{where.upload_id}/part-{where.token}-"


def _key(where: PartsKey, number: int) -> str:
    return f"{_prefix(where)}{number:08d}"
