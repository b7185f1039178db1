"""A bundle that trickles in gives its turn to one that waits, and leaves nothing that anybody names."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.blobs.local import LocalBlobStore
from services.bundle import Group, SmallFile
from services.bundle_store import BundleStore
from services.errors import PushBackError


async def test_a_bundle_that_trickles_makes_room_for_one_that_waits(tmp_path: Path) -> None:
    blobs = LocalBlobStore(tmp_path)
    await blobs.migrate()
    store = BundleStore(blobs, at_once=1, look_seconds=0.1)
    begun = asyncio.Event()

    async def trickle() -> AsyncIterator[Group]:
        for number in range(1_000_000):
            yield [SmallFile(f"{number}", "text/plain", b"x")]
            begun.set()
            await asyncio.sleep(0.01)

    async def quick() -> AsyncIterator[Group]:
        yield [SmallFile("a", "text/plain", b"quick")]

    slow = asyncio.create_task(store.store(trickle(), 1 << 30))
    await begun.wait()
    (placed,) = await store.store(quick(), 1 << 30)
    assert placed.blob.length == len(b"quick")
    with pytest.raises(PushBackError, match="other uploads"):
        await slow
    await blobs.close()
