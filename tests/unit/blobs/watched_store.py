"""A blob store that reports to a test what is read from it."""

from __future__ import annotations

from collections.abc import AsyncIterator

from services.blobs.local import LocalBlobStore


class WatchedStore(LocalBlobStore):
    """Counts what is read of it, and how many reads have not ended."""

    reads = 0
    open = 0

    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        self.reads += 1
        self.open += 1
        try:
            async for chunk in super().read(key, offset, length):
                yield chunk
        finally:
            self.open -= 1
