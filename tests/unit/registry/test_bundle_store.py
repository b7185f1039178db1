"""Bundles share one budget of memory, and reading packs takes few requests in any order."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.archives.bundle import PACK_BYTES, Group, NamedFile, SmallFile, StreamedFile
from artifact_store.byte_streams import from_any
from artifact_store.errors import CorruptError, PushBackError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.packs import Placed
from services.registry.bundle_store import BundleStore
from services.views.queries import PlacedFile
from tests.unit.blobs.watched_store import WatchedStore


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[WatchedStore]:
    opened = WatchedStore(tmp_path / "blobs")
    await opened.migrate()
    yield opened
    await opened.close()


async def groups(*found: Group) -> AsyncIterator[Group]:
    for group in found:
        yield group


def small(names: Sequence[str]) -> list[SmallFile]:
    return [SmallFile(name, "text/plain", name.encode() * 50) for name in names]


def at(placed: Sequence[Placed]) -> list[PlacedFile]:
    return [
        PlacedFile(uuid4(), f.relative_path, "text/plain", f.blob.length, f.blob.blake3, f.blob.key, f.blob.offset)
        for f in placed
    ]


async def page(files: Sequence[PlacedFile]) -> AsyncIterator[Sequence[PlacedFile]]:
    yield files


async def read(bundles: BundleStore, files: Sequence[PlacedFile]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    async for group in bundles.read(page(files)):
        if isinstance(group, StreamedFile):
            found[group.relative_path] = b"".join([chunk async for chunk in group.body])
        else:
            found |= {file.relative_path: file.data for file in group}
    return found


async def test_a_bundle_that_gets_no_memory_is_pushed_back_unread(store: WatchedStore) -> None:
    bundles = BundleStore(store, at_once=1, turn_seconds=0.05)
    began, held = asyncio.Event(), asyncio.Event()
    asked: list[str] = []

    async def slow() -> AsyncIterator[Group]:
        began.set()
        yield small(["a"])
        await held.wait()

    async def other() -> AsyncIterator[Group]:
        asked.append("other")
        yield small(["b"])

    first = asyncio.create_task(bundles.store(slow(), 1 << 20))
    await began.wait()
    with pytest.raises(PushBackError):
        await bundles.store(other(), 1 << 20)
    assert asked == []
    held.set()
    assert [file.relative_path for file in await first] == ["a"]
    assert [file.relative_path for file in await bundles.store(other(), 1 << 20)] == ["b"]


async def test_readers_and_producers_have_turns_of_their_own(store: WatchedStore) -> None:
    bundles = BundleStore(store, at_once=1, turn_seconds=0.05)
    files = at(await bundles.store(groups(small(["a"])), 1 << 20))
    reading = bundles.read(page(files))
    await anext(reading)
    with pytest.raises(PushBackError):
        await read(bundles, files)
    await bundles.store(groups(small(["b"])), 1 << 20)
    await reading.aclose()
    assert await read(bundles, files) == {"a": b"a" * 50}


@pytest.mark.parametrize("begun", [False, True])
async def test_who_leaves_in_the_middle_of_a_file_leaves_no_read_open(store: WatchedStore, begun: bool) -> None:
    bundles = BundleStore(store, at_once=1, turn_seconds=0.05)
    data = bytes(3 << 20)
    large = StreamedFile("large", "x/y", len(data), from_any(data))
    files = at(await bundles.store(groups(large), 4 << 20))
    reading = bundles.read(page(files))
    group = await anext(reading)
    assert isinstance(group, StreamedFile)
    if begun:
        await anext(group.body)
    assert store.open == 1
    await reading.aclose()
    assert store.open == 0
    assert await read(bundles, files) == {"large": data}


async def test_one_pack_is_read_once_in_any_order(store: WatchedStore) -> None:
    bundles = BundleStore(store)
    names = [f"{number:03}" for number in range(300)]
    files = at(await bundles.store(groups(small(names)), 1 << 20))
    Random(3).shuffle(files)
    assert await read(bundles, files) == {name: name.encode() * 50 for name in names}
    assert list(await read(bundles, files)) == [file.relative_path for file in files]
    assert store.reads == 2


async def test_a_few_files_of_a_large_pack_are_read_by_themselves(store: WatchedStore) -> None:
    bundles = BundleStore(store)
    filler = SmallFile("filler", "x/y", Random(1).randbytes(200_000))
    files = at(await bundles.store(groups([*small(["a"]), filler, *small(["b"])]), 1 << 20))
    assert await read(bundles, [files[0], files[2]]) == {"a": b"a" * 50, "b": b"b" * 50}
    assert store.reads == 2


async def test_what_a_pack_has_lost_is_found_at_the_files_own_address(store: WatchedStore, tmp_path: Path) -> None:
    bundles = BundleStore(store)
    files = at(await bundles.store(groups(small(["a", "b"])), 1 << 20))
    (tmp_path / "blobs" / files[0].key).unlink()
    with pytest.raises(CorruptError):
        await read(bundles, files)
    for name in ("a", "b"):
        await bundles.store(groups(small([name])), 1 << 20)
    assert content_key(blake3(b"a" * 50).digest()) != files[0].key
    assert await read(bundles, files) == {"a": b"a" * 50, "b": b"b" * 50}


async def test_known_blobs_are_those_that_are_there(store: WatchedStore) -> None:
    bundles = BundleStore(store)
    await bundles.store(groups(small(["a"])), 1 << 20)
    there, gone = blake3(b"a" * 50).digest(), blake3(b"b").digest()
    assert await bundles.known([there, gone, there]) == {there}
    assert await bundles.known([]) == frozenset()


@pytest.mark.parametrize("size", [50, PACK_BYTES + 1])
async def test_bytes_that_many_names_stand_for_are_read_once(store: WatchedStore, size: int) -> None:
    blob = await store.store(
        from_any(bytes(size)), declared=Declared(blake3=blake3(bytes(size)).digest()), max_bytes=1 << 30
    )
    names = [f"{number:02}" for number in range(100)]
    placed = await BundleStore(store).find([NamedFile(name, "x/y", size, blob.blake3, blob.blake3) for name in names])
    assert store.reads == 1
    assert [file.relative_path for file in placed] == names
    assert {file.blob for file in placed} == {blob}
