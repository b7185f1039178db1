"""Snapshots: foreign objects among them, and failures of one, never keep a partition from working."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from concurrent.futures import Future
from pathlib import Path
from uuid import UUID

import pytest

from services.log.state import snapshots as snapshots_module
from services.log.state.snapshots import SnapshotError, Snapshots, Stored
from services.log.state.state_file import FORMAT, Anchor, LogPartition, StateFile

PLACE = LogPartition(UUID(int=7), "t.events", 3)
PREFIX = f"snapshots/{PLACE.identity}/{PLACE.partition}/"
MARK = bytes(range(32))
STRAY = [
    "",
    "index",
    "notes/index",
    "-/index",
    "7/index",
    "7-/index",
    "1-2-3-ab/index",
    f"{10**30}-4-ab/index",
    "²-4-ab/index",
]


class Store:
    """Objects in memory."""

    def __init__(self) -> None:
        self.objects: dict[str, bytes] = {}
        self.failure: Exception | None = None

    async def put_object(self, key: str, data: bytes) -> None:
        self.objects[key] = data

    async def get_object(self, key: str) -> bytes | None:
        return self.objects.get(key)

    async def list_objects(self, prefix: str) -> list[str]:
        if self.failure is not None:
            raise self.failure
        return sorted(key for key in self.objects if key.startswith(prefix))

    async def delete_object(self, key: str) -> None:
        del self.objects[key]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
async def snapshots(store: Store) -> AsyncIterator[Snapshots]:
    made = Snapshots(store, asyncio.get_running_loop())
    yield made
    await asyncio.to_thread(made.close, 30)


def state_at(folder: Path, position: int) -> Path:
    path = folder / "state.db"
    file = StateFile.create(path, PLACE)
    file.save([], Anchor(position, MARK, 7), 0)
    file.close()
    return path


async def made(snapshots: Snapshots, path: Path, position: int) -> None:
    snapshots.offer(PLACE, path, position, closing=True)
    running = snapshots._progress[PLACE.partition].running
    assert running is not None
    await asyncio.wrap_future(running)


async def found(snapshots: Snapshots) -> Stored:
    return await asyncio.to_thread(lambda: snapshots.look(PLACE, lambda: False))


async def test_objects_of_others_among_the_snapshots_are_left_alone(
    snapshots: Snapshots, store: Store, tmp_path: Path
) -> None:
    store.objects = {PREFIX + stray: b"" for stray in STRAY}
    store.objects[f"snapshots/witnesses/{PLACE.topic}/{PLACE.partition}/notes"] = b""
    for position in (20_000, 40_000, 60_000):
        await made(snapshots, state_at(tmp_path, position), position)
    stored = await found(snapshots)
    assert [(made.next_offset, made.format) for made in stored.snapshots if made.format == FORMAT] == [
        (40_000, FORMAT),
        (60_000, FORMAT),
    ]
    assert [witness.anchor for witness in stored.witnesses] == [Anchor(40_000, MARK, 7), Anchor(60_000, MARK, 7)]
    assert set(store.objects) >= {PREFIX + stray for stray in STRAY}
    assert sum(key.endswith("/index") for key in store.objects) == 2 + sum(key.endswith("/index") for key in STRAY) + 1


async def test_a_failure_that_nobody_thought_of_is_told_and_not_met_again_at_once(
    snapshots: Snapshots, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: object) -> None:
        raise ValueError("nobody thought of this")

    monkeypatch.setattr(snapshots_module, "copy_file", fails)
    await made(snapshots, state_at(tmp_path, 20_000), 20_000)
    assert "nobody thought of this" in caplog.text
    assert snapshots._progress[PLACE.partition].not_before > asyncio.get_running_loop().time()


@pytest.mark.parametrize("failure", [ValueError("of the store's client"), TimeoutError(), ConnectionResetError()])
async def test_a_store_that_fails_in_any_way_has_no_snapshot(
    snapshots: Snapshots, store: Store, failure: Exception
) -> None:
    store.failure = failure
    with pytest.raises(SnapshotError):
        await found(snapshots)


async def test_an_answer_that_is_given_up_because_the_process_ends_is_no_snapshot(snapshots: Snapshots) -> None:
    running: Future[None] = Future()
    running.cancel()
    with pytest.raises(SnapshotError, match="the process ends"):
        snapshots._result(running, lambda: False)


KEY, OTHER = b"k" * 32, b"o" * 32


async def fetched(snapshots: Snapshots, stored: Stored, folder: Path) -> list[str]:
    """What becomes of each snapshot, the newest first."""
    outcomes = []
    for snapshot in sorted(stored.snapshots, reverse=True):
        try:
            await asyncio.to_thread(snapshots.fetch, snapshot, PLACE, folder / "fetched.db", lambda: False)
            outcomes.append("used")
        except SnapshotError as error:
            outcomes.append(error.detail)
    return outcomes


@pytest.mark.parametrize("forger", [OTHER, None])
async def test_what_somebody_else_puts_into_the_bucket_is_passed_over(
    store: Store, tmp_path: Path, forger: bytes | None
) -> None:
    loop = asyncio.get_running_loop()
    ours, forged = Snapshots(store, loop, KEY), Snapshots(store, loop, forger)
    try:
        await made(ours, state_at(tmp_path, 20_000), 20_000)
        await made(forged, state_at(tmp_path, 60_000), 60_000)
        stored = await found(ours)
        newest, older = await fetched(ours, stored, tmp_path)
        assert "its tag is not one of this deployment's key" in newest
        assert older == "used"
        assert [witness.anchor.next_offset for witness in stored.witnesses] == [20_000]
    finally:
        for each in (ours, forged):
            await asyncio.to_thread(each.close, 30)


@pytest.mark.parametrize("name", ["position", "size", "parts", "partition", "log"])
async def test_an_index_that_was_changed_is_passed_over(store: Store, tmp_path: Path, name: str) -> None:
    snapshots = Snapshots(store, asyncio.get_running_loop(), KEY)
    try:
        await made(snapshots, state_at(tmp_path, 20_000), 20_000)
        (key,) = [key for key in store.objects if key.endswith("/index")]
        index = json.loads(store.objects[key])
        index[name] = {"position": 30_000, "size": 1, "parts": [], "partition": 4, "log": str(UUID(int=8))}[name]
        del store.objects[key]
        store.objects[key.replace("20000", str(index["position"]))] = json.dumps(index).encode()
        (outcome,) = await fetched(snapshots, await found(snapshots), tmp_path)
        assert "its tag" in outcome or "its index is of another" in outcome
    finally:
        await asyncio.to_thread(snapshots.close, 30)


@pytest.mark.parametrize(
    "index", [b'"tag": "\xc3\xa4"', b'"tag": "\\ud800"', b'"x": ' + b"[" * 50_000, b'"x": ' + b"9" * 5_000]
)
async def test_an_index_that_cannot_be_read_is_passed_over(store: Store, tmp_path: Path, index: bytes) -> None:
    snapshots = Snapshots(store, asyncio.get_running_loop(), KEY)
    try:
        await made(snapshots, state_at(tmp_path, 20_000), 20_000)
        (key,) = [key for key in store.objects if key.endswith("/index")]
        store.objects[key] = store.objects[key].rpartition(b', "tag"')[0] + b", " + index + b"}"
        (outcome,) = await fetched(snapshots, await found(snapshots), tmp_path)
        assert "its tag" in outcome or "its index cannot be read" in outcome
    finally:
        await asyncio.to_thread(snapshots.close, 30)


async def test_a_witness_of_another_place_is_none(store: Store, tmp_path: Path) -> None:
    snapshots = Snapshots(store, asyncio.get_running_loop(), KEY)
    try:
        await made(snapshots, state_at(tmp_path, 20_000), 20_000)
        (key,) = [key for key in store.objects if "/witnesses/" in key]
        store.objects[key.replace("/3/", "/4/")] = store.objects[key]
        elsewhere = LogPartition(PLACE.identity, PLACE.topic, 4)
        stored = await asyncio.to_thread(lambda: snapshots.look(elsewhere, lambda: False))
        assert stored.witnesses == []
    finally:
        await asyncio.to_thread(snapshots.close, 30)
