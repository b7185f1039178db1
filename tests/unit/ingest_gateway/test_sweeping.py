"""A gateway sweeps its blob store regularly, one sweep at a time, even if one fails."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime
from pathlib import Path

import pytest

from artifact_store.errors import UnavailableError
from ingest_gateway.server import SWEEP_SECONDS, swept_regularly
from services.blobs.local import LocalBlobStore

NOW = datetime(2030, 1, 1, tzinfo=UTC)


class Store:
    """Counts sweeps, fails when told to, and takes a while for each."""

    def __init__(self, *failures: Exception) -> None:
        self.failures = list(failures)
        self.sweeps = 0
        self.running = 0
        self.many = asyncio.Event()

    async def now(self) -> datetime:
        return NOW

    async def sweep(self, *, now: datetime) -> int:
        assert now == NOW
        assert self.running == 0
        self.running += 1
        await asyncio.sleep(0)
        self.running -= 1
        self.sweeps += 1
        if self.sweeps == 5:
            self.many.set()
        if self.failures:
            raise self.failures.pop()
        return 1


async def test_it_sweeps_one_at_a_time_and_goes_on_after_failures(caplog: pytest.LogCaptureFixture) -> None:
    store = Store(UnavailableError("the store is down"), RuntimeError("a bug"))
    async with asyncio.timeout(30), swept_regularly(store, seconds=0.001):
        await store.many.wait()
    assert asyncio.all_tasks() == {asyncio.current_task()}, "it ends with the block"
    assert "the store is down" in caplog.text
    assert "a bug" in caplog.text


async def test_the_pauses_are_drawn_around_an_hour() -> None:
    asked: list[tuple[float, float]] = []
    paused = asyncio.Event()

    def draw(least: float, most: float) -> float:
        asked.append((least, most))
        paused.set()
        return most

    async with swept_regularly(Store(), draw=draw):
        await paused.wait()
    assert asked == [(SWEEP_SECONDS / 2, SWEEP_SECONDS * 3 / 2)]


async def test_drafts_of_a_local_store_that_stood_still_for_a_day_go_and_blobs_stay(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path)
    await store.migrate()
    old, blob = tmp_path / "incoming" / "old.part", tmp_path / "blobs" / "kept"
    old.write_bytes(b"half")
    blob.parent.mkdir()
    blob.write_bytes(b"whole")
    gone = asyncio.Event()

    class Watched(Store):
        async def sweep(self, *, now: datetime) -> int:
            swept = await store.sweep(now=now)
            gone.set()
            return swept

    async with asyncio.timeout(30), swept_regularly(Watched(), seconds=0.001):
        await gone.wait()
    assert not old.exists()
    assert blob.exists()
    await store.close()
