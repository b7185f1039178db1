"""Reads small files that share a blob: blocks that are requested repeatedly stay in memory.

One request to the store costs as much for a block of a pack as for one file in it. So the second request for something
in a block reads the whole block, and later ones are answered from memory. A block that is read only once takes no
memory. Blobs never change, so nothing here goes stale. Whether a caller may read a file is decided elsewhere, for each
request.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from functools import partial

from artifact_store.byte_streams import joined
from artifact_store.errors import CorruptError
from services.blobs.port import BlobStore

BLOCK_BYTES = 256 * 1024
"""The size of blocks, which are counted from the beginning of a blob."""

SMALL_BYTES = BLOCK_BYTES // 4
"""Only ranges of at most this many bytes are read by blocks."""

CACHE_BYTES = 32 << 20
"""How many bytes one process keeps."""

_REMEMBERED = 4_096
"""How many blocks that were requested once are remembered."""

_Block = tuple[str, int]
"""Key of a blob, and number of the block in it."""


class HotBlocks:
    """Blocks of the blobs of one store. Belongs to one event loop."""

    def __init__(self, blobs: BlobStore, max_bytes: int = CACHE_BYTES) -> None:
        self._blobs = blobs
        self._most = max_bytes // BLOCK_BYTES
        self._blocks: OrderedDict[_Block, asyncio.Task[bytes]] = OrderedDict()
        self._asked_once: OrderedDict[_Block, None] = OrderedDict()

    async def read(self, key: str, offset: int, length: int) -> bytes | None:
        """`length` bytes from `offset` of a blob; None if they are too many, or were not requested before.

        There are fewer bytes if the blob is shorter. Raises CorruptError, UnavailableError: as `BlobStore.read`.
        """
        if not 0 < length <= SMALL_BYTES:
            return None
        first, last = offset // BLOCK_BYTES, (offset + length - 1) // BLOCK_BYTES
        wanted = [(key, number) for number in range(first, last + 1)]
        hot = [self._is_hot(block) for block in wanted]
        if not all(hot):
            return None
        data = b"".join([await self._block(block) for block in wanted])
        start = offset - first * BLOCK_BYTES
        return data[start : start + length]

    def forget(self, key: str) -> None:
        """Drop the blocks of a blob: their bytes turned out to be wrong."""
        for block in [block for block in self._blocks if block[0] == key]:
            del self._blocks[block]

    async def close(self) -> None:
        """End the reads in progress."""
        tasks = list(self._blocks.values())
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _is_hot(self, block: _Block) -> bool:
        if block in self._blocks or block in self._asked_once:
            return True
        self._asked_once[block] = None
        if len(self._asked_once) > _REMEMBERED:
            self._asked_once.popitem(last=False)
        return False

    async def _block(self, block: _Block) -> bytes:
        task = self._blocks.get(block)
        if task is None:
            task = self._blocks[block] = asyncio.create_task(self._load(*block))
            task.add_done_callback(partial(self._drop_failed, block))
            if len(self._blocks) > self._most:
                self._blocks.popitem(last=False)
        else:
            self._blocks.move_to_end(block)
        return task.result() if task.done() else await asyncio.shield(task)  # which others wait for as well

    async def _load(self, key: str, number: int) -> bytes:
        size, start = await self._blobs.size(key), number * BLOCK_BYTES
        if size is None:
            raise CorruptError(f"blob {key} is missing")
        end = min(start + BLOCK_BYTES, size)
        return await joined(self._blobs.read(key, start, end - start)) if end > start else b""

    def _drop_failed(self, block: _Block, task: asyncio.Task[bytes]) -> None:
        if (task.cancelled() or task.exception() is not None) and self._blocks.get(block) is task:
            del self._blocks[block]
