"""A reader gets the right bytes from any location, or an error before the end; never wrong bytes."""

from __future__ import annotations

import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from blake3 import blake3
from prometheus_client import CollectorRegistry

from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.manifest import content_key
from services.blobs.local import LocalBlobStore
from services.blobs.verified_reads import BAD_READS, Place, SoundReads
from tests.unit.blobs.watched_store import WatchedStore

SIZES = (0, 1, 70_000, 1 << 20, (1 << 20) + 1, (3 << 20) + 17)


@pytest.fixture
async def reads(tmp_path: Path) -> AsyncIterator[SoundReads]:
    store = LocalBlobStore(tmp_path)
    yield SoundReads(store)
    await store.close()


def bad_reads(found: str) -> float:
    registry = CollectorRegistry()
    registry.register(BAD_READS)
    return registry.get_sample_value("artifact_store_bad_reads_total", {"found": found}) or 0.0


def some(size: int) -> bytes:
    return random.Random(size).randbytes(size)


def put(folder: Path, key: str, data: bytes) -> Place:
    path = folder / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"before" + data)
    return key, len(b"before")


async def read(reads: SoundReads, places: list[Place], data: bytes) -> bytes:
    return b"".join([chunk async for chunk in await reads.whole(places, blake3(data).digest(), len(data))])


@pytest.mark.parametrize("size", SIZES)
async def test_bytes_come_from_the_first_place_that_has_them(tmp_path: Path, reads: SoundReads, size: int) -> None:
    data = some(size)
    short = put(tmp_path, "uploads/short", data[: size // 2])
    good = put(tmp_path, content_key(blake3(data).digest()), data)
    for places in ([good], [("uploads/missing", 0), good], [short, good], [good, short]):
        assert await read(reads, places, data) == data


@pytest.mark.parametrize("size", SIZES)
async def test_without_a_place_that_has_them_there_is_an_error_and_no_byte(
    tmp_path: Path, reads: SoundReads, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = some(size)
    short = put(tmp_path, "uploads/short", data[:-1])
    for places in ([("uploads/missing", 0)], [short], [short, ("uploads/missing", 0)]):
        if size:
            caplog.clear()
            before = bad_reads("lost")
            with pytest.raises(CorruptError, match=r"missing|expected") as lost:
                await reads.whole(places, blake3(data).digest(), size)
            assert bad_reads("lost") == before + 1
            assert [record.levelname for record in caplog.records if str(lost.value) in record.message] == ["ERROR"]
        else:
            assert await read(reads, places, data) == b""


@pytest.mark.parametrize("size", [size for size in SIZES if size])
async def test_other_bytes_never_come_whole_and_the_next_reader_gets_the_right_ones(
    tmp_path: Path, reads: SoundReads, size: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = some(size)
    wrong = put(tmp_path, "uploads/wrong", data[:-1] + bytes([data[-1] ^ 1]))
    good = put(tmp_path, content_key(blake3(data).digest()), data)
    before = bad_reads("damaged")
    if size > 1 << 20:  # it was on its way before the end showed that it is wrong
        with pytest.raises(CorruptError, match="other bytes"):
            await read(reads, [wrong, good], data)
    assert await read(reads, [wrong, good], data) == data
    assert "uploads/wrong" in caplog.text
    assert bad_reads("damaged") == before + 1
    with pytest.raises(CorruptError, match="other bytes"):
        await read(reads, [wrong], data)


async def test_a_range_comes_from_the_first_place_that_is_long_enough_and_not_known_to_be_wrong(
    tmp_path: Path, reads: SoundReads
) -> None:
    data = some(5000)
    wrong, good = put(tmp_path, "uploads/wrong", bytes(5000)), put(tmp_path, "uploads/good", data)
    short = put(tmp_path, "uploads/short", data[:100])

    async def part(places: list[Place]) -> bytes:
        return b"".join([chunk async for chunk in await reads.part(places, 50, 1000)])

    assert await part([short, good]) == data[50:1050]
    assert await read(reads, [wrong, good], data) == data
    assert await part([wrong, good]) == data[50:1050]
    with pytest.raises(CorruptError, match="expected"):
        await part([short])


@pytest.mark.parametrize("taken", [0, 1, 2])
@pytest.mark.parametrize("whole", [True, False])
async def test_who_leaves_before_the_end_leaves_no_read_open(tmp_path: Path, whole: bool, taken: int) -> None:
    store = WatchedStore(tmp_path)
    reads, data = SoundReads(store), some(3 << 20)
    place = put(tmp_path, content_key(blake3(data).digest()), data)
    opened = reads.whole([place], blake3(data).digest(), len(data)) if whole else reads.part([place], 1, 2 << 20)
    chunks = await opened
    for _ in range(taken):
        assert await anext(chunks)
    assert store.open == 1
    await chunks.aclose()
    assert store.open == 0
    await store.close()


@pytest.mark.parametrize("size", [10, 3 << 20])
async def test_a_place_that_the_store_cannot_give_is_passed_over(tmp_path: Path, size: int) -> None:
    """As an object on a bad sector; where there is no other place, it is said that it may come back."""
    data = some(size)
    broken, good = put(tmp_path, "uploads/broken", data), put(tmp_path, content_key(blake3(data).digest()), data)

    class Broken(LocalBlobStore):
        async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
            if key == broken[0]:
                raise UnavailableError("the disk cannot read it")
            async for chunk in super().read(key, offset, length):
                yield chunk

    store = Broken(tmp_path)
    reads = SoundReads(store)
    assert await read(reads, [broken, good], data) == data
    part = await reads.part([broken, good], 1, 5)
    assert b"".join([chunk async for chunk in part]) == data[1:6]
    for places in ([broken], [broken, ("uploads/missing", 0)]):
        with pytest.raises(UnavailableError, match="cannot read"):
            await read(reads, places, data)
    await store.close()
