"""A slow bundle gives its turn to one that waits, and leaves nothing that an event names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from artifact_store.archives.bundle import Group, SmallFile, StreamedFile
from artifact_store.errors import PushBackError
from services.blobs.local import LocalBlobStore
from services.registry.bundle_store import BundleStore


@pytest.mark.parametrize("kind", ["many files", "one file"])
async def test_a_bundle_that_trickles_makes_room_for_one_that_waits(tmp_path: Path, kind: str) -> None:
    blobs = LocalBlobStore(tmp_path)
    await blobs.migrate()
    store = BundleStore(blobs, at_once=1, look_seconds=0.1)
    begun = asyncio.Event()

    async def drops() -> AsyncIterator[bytes]:
        for _ in range(1_000_000):
            yield b"x"
            begun.set()
            await asyncio.sleep(0.01)

    async def files() -> AsyncIterator[Group]:
        async for drop in drops():
            yield [SmallFile("a", "text/plain", drop)]

    async def one_file() -> AsyncIterator[Group]:
        yield StreamedFile("a", "text/plain", 1_000_000, drops())

    async def quick() -> AsyncIterator[Group]:
        yield [SmallFile("a", "text/plain", b"quick")]

    slow = asyncio.create_task(store.store(one_file() if kind == "one file" else files(), 1 << 30))
    await begun.wait()
    (placed,) = await store.store(quick(), 1 << 30)
    assert placed.blob.length == len(b"quick")
    with pytest.raises(PushBackError, match="other uploads"):
        await slow
    await blobs.close()
