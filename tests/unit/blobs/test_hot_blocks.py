"""Blocks of blobs in memory: which are read from the store, how often, and which are kept."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3

from artifact_store.byte_streams import joined
from artifact_store.errors import CorruptError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.hot_blocks import BLOCK_BYTES, SMALL_BYTES, HotBlocks
from services.blobs.local import LocalBlobStore
from services.blobs.verified_reads import SoundReads
from tests.contract.blobs_stage import body, some_bytes

DATA = some_bytes(2 * BLOCK_BYTES + 5_000)


class CountingStore(LocalBlobStore):
    """Notes which ranges are read."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.ranges: list[tuple[int, int]] = []

    def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        self.ranges.append((offset, length))
        return super().read(key, offset, length)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[CountingStore]:
    found = CountingStore(tmp_path / "blobs")
    await found.migrate()
    await found.store(body(DATA), declared=Declared(), max_bytes=len(DATA))
    yield found
    await found.close()


KEY = content_key(blake3(DATA).digest())


async def test_the_second_request_for_a_block_reads_it_and_the_rest_comes_from_memory(store: CountingStore) -> None:
    blocks = HotBlocks(store)
    assert await blocks.read(KEY, 100, 50) is None
    together = await asyncio.gather(*(blocks.read(KEY, at, 4_096) for at in range(0, SMALL_BYTES, 4_096)))
    assert b"".join(found or b"" for found in together) == DATA[:SMALL_BYTES]
    assert await blocks.read(KEY, BLOCK_BYTES - 10, 10) == DATA[BLOCK_BYTES - 10 : BLOCK_BYTES]
    assert store.ranges == [(0, BLOCK_BYTES)]


async def test_a_range_over_two_blocks_and_the_end_of_a_blob(store: CountingStore) -> None:
    blocks = HotBlocks(store)
    for offset, length in ((BLOCK_BYTES - 10, 20), (2 * BLOCK_BYTES + 4_000, 1_000), (2 * BLOCK_BYTES + 4_000, 2_000)):
        await blocks.read(KEY, offset, length)
        assert await blocks.read(KEY, offset, length) == DATA[offset : offset + length]
    assert store.ranges == [(0, BLOCK_BYTES), (BLOCK_BYTES, BLOCK_BYTES), (2 * BLOCK_BYTES, 5_000)]


async def test_long_ranges_and_blocks_that_are_read_once_take_no_memory(store: CountingStore) -> None:
    blocks = HotBlocks(store)
    for _ in range(3):
        assert await blocks.read(KEY, 0, SMALL_BYTES + 1) is None
    assert await blocks.read(KEY, 0, 1) is None
    assert store.ranges == []


async def test_the_least_lately_used_block_goes_first(store: CountingStore) -> None:
    blocks = HotBlocks(store, 2 * BLOCK_BYTES)
    for number in (0, 1, 0, 2, 0, 1):
        for _ in range(2):
            await blocks.read(KEY, number * BLOCK_BYTES, 1)
    assert [offset // BLOCK_BYTES for offset, _ in store.ranges] == [0, 1, 2, 1]


async def test_a_reader_that_leaves_takes_nothing_from_the_others(store: CountingStore) -> None:
    blocks = HotBlocks(store)
    await blocks.read(KEY, 0, 10)
    first = asyncio.create_task(blocks.read(KEY, 0, 10))
    second = asyncio.create_task(blocks.read(KEY, 10, 10))
    await asyncio.sleep(0)
    first.cancel()
    assert await second == DATA[10:20]
    assert store.ranges == [(0, BLOCK_BYTES)]
    await blocks.close()


async def test_a_failure_is_not_kept(store: CountingStore, tmp_path: Path) -> None:
    blocks = HotBlocks(store)
    path = tmp_path / "blobs" / KEY
    path.rename(tmp_path / "away")
    await blocks.read(KEY, 0, 10)
    with pytest.raises(CorruptError):
        await blocks.read(KEY, 0, 10)
    (tmp_path / "away").rename(path)
    assert await blocks.read(KEY, 0, 10) == DATA[:10]


async def test_a_blob_that_is_repaired_is_read_again(store: CountingStore, tmp_path: Path) -> None:
    reads = SoundReads(store)
    digest, path = blake3(DATA[:4_096]).digest(), tmp_path / "blobs" / KEY
    path.write_bytes(bytes(len(DATA)))
    for _ in range(3):
        with pytest.raises(CorruptError):
            await reads.whole([(KEY, 0)], digest, 4_096)
    path.write_bytes(DATA)
    assert await joined(await reads.whole([(KEY, 0)], digest, 4_096)) == DATA[:4_096]
    await reads.close()
