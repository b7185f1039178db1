"""The contract of blob storage, which every adapter must pass."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import time
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from blake3 import blake3
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from artifact_store.errors import ContentMismatchError, CorruptError, TooLargeError, UnavailableError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.port import BlobStore, Digests
from services.blobs.s3.requests import Endpoint
from services.blobs.s3.store import S3BlobStore
from tests.contract.blobs_stage import (
    LIMIT,
    MUCH,
    PART,
    STORES,
    Stage,
    body,
    declared,
    got,
    opened_stage,
    put,
    some_bytes,
)
from tests.standstill import Standstill

MIB = 1 << 20
LARGE = 2 * PART + 12345


@pytest.fixture(params=STORES)
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    async with opened_stage(request, tmp_path / "blobs") as found:
        yield found


@pytest.fixture
def store(stage: Stage) -> BlobStore:
    return stage.store


@pytest.mark.parametrize("size", [0, 1, 4096, PART - 1, PART, PART + 1, 2 * PART, LARGE])
@pytest.mark.parametrize("said", [False, True], ids=["undeclared", "declared"])
async def test_what_is_stored_reads_back_with_its_length_and_both_digests(stage: Stage, size: int, said: bool) -> None:
    data = some_bytes(size)
    blob = await put(stage.store, data, declared(data) if said else None)
    assert await got(stage.store, blob) == data
    assert (blob.backend_id, blob.offset, blob.length) == (stage.store.backend_id, 0, size)
    assert (blob.blake3, blob.sha256) == (blake3(data).digest(), hashlib.sha256(data).digest())
    assert await stage.store.size(blob.key) == size
    assert stage.holds() == {blob.key}


async def test_small_bodies_and_those_with_a_declared_digest_lie_at_their_content_address(store: BlobStore) -> None:
    for data, said in ((some_bytes(100), None), (some_bytes(LARGE), declared(some_bytes(LARGE)))):
        assert (await put(store, data, said)).key == content_key(blake3(data).digest())


@pytest.mark.parametrize("size", [0, 4096, MIB])
async def test_bytes_in_memory_are_stored_once_and_replace_what_was_cut_short(stage: Stage, size: int) -> None:
    data = some_bytes(size)
    digests = Digests(size, blake3(data).digest(), hashlib.sha256(data).digest())
    blob = await stage.store.store_bytes(data, digests)
    assert blob == await put(stage.store, data)
    assert await got(stage.store, blob) == data
    assert stage.holds() == {blob.key}
    stage.overwrite(blob.key, data[: size // 2])
    assert await stage.store.store_bytes(data, digests) == blob
    assert await got(stage.store, blob) == data


async def test_bytes_in_memory_need_none_of_the_budget(store: BlobStore) -> None:
    data = some_bytes(4096)
    memory = store.parts.memory
    with memory.share() as all_of_it:
        await all_of_it.take(memory.free)
        blob = await store.store_bytes(data, Digests(4096, blake3(data).digest(), hashlib.sha256(data).digest()))
    assert await got(store, blob) == data


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    size=st.integers(0, PART + 3 * 65536),
    chunks=st.lists(st.one_of(st.integers(0, 20), st.integers(0, 2 * MIB)), max_size=40),
)
async def test_it_does_not_matter_how_a_body_is_cut_into_chunks(store: BlobStore, size: int, chunks: list[int]) -> None:
    data = some_bytes(size, seed=size)
    blob = await store.store(body(data, chunks), declared=Declared(), max_bytes=LIMIT)
    assert (blob.length, blob.blake3) == (size, blake3(data).digest())
    assert await got(store, blob) == data


async def test_a_body_of_one_byte_chunks_is_stored(store: BlobStore) -> None:
    data = some_bytes(100_000)
    blob = await store.store(body(data, [1] * len(data)), declared=Declared(), max_bytes=LIMIT)
    assert await got(store, blob) == data


@pytest.mark.parametrize("size", [5, MIB, LARGE])
async def test_the_same_bytes_are_stored_once(stage: Stage, size: int) -> None:
    data = some_bytes(size)
    first = await put(stage.store, data, declared(data))
    assert await put(stage.store, data, declared(data)) == first
    assert stage.holds() == {first.key}


async def test_small_bodies_are_stored_once_without_being_declared(stage: Stage) -> None:
    first = await put(stage.store, b"the same")
    assert await put(stage.store, b"the same") == first
    assert stage.holds() == {first.key}


@pytest.mark.parametrize("size", [4096, MIB, pytest.param(LARGE, marks=MUCH)])
async def test_identical_uploads_at_the_same_time_all_succeed_and_store_one_blob(stage: Stage, size: int) -> None:
    data = some_bytes(size)
    blobs = await asyncio.gather(*(put(stage.store, data, declared(data)) for _ in range(8)))
    assert len(set(blobs)) == 1
    assert await got(stage.store, blobs[0]) == data
    assert stage.holds() == {blobs[0].key}


async def test_a_whole_blob_replaces_one_that_was_cut_short(stage: Stage) -> None:
    for size in (1000, MIB, LARGE):
        data = some_bytes(size)
        blob = await put(stage.store, data, declared(data))
        stage.overwrite(blob.key, data[:10])
        assert await stage.store.size(blob.key) == 10
        assert await put(stage.store, data, declared(data)) == blob
        assert await got(stage.store, blob) == data


@pytest.mark.parametrize("size", [0, 4096, LARGE])
@pytest.mark.parametrize("field", ["size_bytes", "blake3", "sha256"])
async def test_each_declaration_alone_lets_the_right_bytes_in_and_refuses_others(
    stage: Stage, size: int, field: str
) -> None:
    data = some_bytes(size)
    truth = declared(data)
    wrong = {
        "size_bytes": [Declared(size_bytes=size + 1), *([Declared(size_bytes=size - 1)] if size else [])],
        "blake3": [Declared(blake3=bytes(32))],
        "sha256": [Declared(sha256=bytes(32))],
    }
    for said in wrong[field]:
        with pytest.raises(ContentMismatchError):
            await put(stage.store, data, said)
    assert stage.holds() == set()
    blob = await put(stage.store, data, replace(Declared(), **{field: getattr(truth, field)}))
    assert stage.holds() == {blob.key}


async def test_wrong_bytes_are_refused_although_the_declared_blob_is_there(stage: Stage) -> None:
    data = some_bytes(LARGE)
    blob = await put(stage.store, data, declared(data))
    with pytest.raises(ContentMismatchError):
        await put(stage.store, data[:-1] + b"?", declared(data))
    assert await got(stage.store, blob) == data
    assert stage.holds() == {blob.key}


@pytest.mark.parametrize("limit", [0, 1000, PART, LARGE])
async def test_a_body_above_the_limit_is_refused_and_one_of_just_the_limit_is_taken(stage: Stage, limit: int) -> None:
    for said in (Declared(), Declared(size_bytes=limit + 1)):
        with pytest.raises(TooLargeError):
            await stage.store.store(body(some_bytes(limit + 1)), declared=said, max_bytes=limit)
    assert stage.holds() == set()
    blob = await stage.store.store(body(some_bytes(limit)), declared=Declared(), max_bytes=limit)
    assert blob.length == limit


async def test_a_declared_size_above_the_limit_is_refused_before_the_body_is_read(store: BlobStore) -> None:
    read = False

    async def watched() -> AsyncIterator[bytes]:
        nonlocal read
        read = True
        yield b"x"

    with pytest.raises(TooLargeError):
        await store.store(watched(), declared=Declared(size_bytes=11), max_bytes=10)
    assert not read


@pytest.mark.parametrize("size", [0, 4096, LARGE])
async def test_what_the_body_raises_comes_through_and_nothing_is_left(stage: Stage, size: int) -> None:
    class LostProducerError(Exception):
        pass

    async def torn() -> AsyncIterator[bytes]:
        async for chunk in body(some_bytes(size)):
            yield chunk
        raise LostProducerError

    for said in (Declared(), Declared(size_bytes=size + 1), Declared(blake3=bytes(32))):
        with pytest.raises(LostProducerError):
            await stage.store.store(torn(), declared=said, max_bytes=LIMIT)
    assert stage.holds() == set()


@pytest.mark.parametrize("size", [0, 4096, LARGE])
async def test_an_upload_that_is_cancelled_leaves_nothing(stage: Stage, size: int) -> None:
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        async for chunk in body(some_bytes(size)):
            yield chunk
        waiting.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(stage.store.store(endless(), declared=Declared(), max_bytes=LIMIT))
    await waiting.wait()
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert stage.holds() == set()


@MUCH
async def test_uploads_that_are_cancelled_at_any_moment_leave_nothing_but_whole_blobs(stage: Stage) -> None:
    data = some_bytes(LARGE)
    started = time.monotonic()
    await put(stage.store, data)
    whole = time.monotonic() - started
    before = stage.holds()
    for step in range(12):
        said = declared(data) if step % 2 else Declared()
        upload = asyncio.create_task(put(stage.store, data, said))
        await asyncio.wait({upload}, timeout=whole * step / 11)
        upload.cancel()
        if (await asyncio.gather(upload, return_exceptions=True))[0].__class__ is asyncio.CancelledError:
            assert stage.holds() - before <= {content_key(blake3(data).digest())}
        before = stage.holds()
        for key in before:
            assert await stage.store.size(key) == len(data)


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_any_range_of_a_blob_can_be_read(store: BlobStore, size: int) -> None:
    data = some_bytes(size)
    blob = await put(store, data)
    for offset, length in ((0, 1), (size - 1, 1), (10, 0), (size, 0), (7, 500), (size // 3, size // 2), (0, size)):
        chunks = [chunk async for chunk in store.read(blob.key, offset, length)]
        assert b"".join(chunks) == data[offset : offset + length]
        assert all(0 < len(chunk) <= MIB for chunk in chunks)


async def test_a_reader_may_leave_in_the_middle(store: BlobStore) -> None:
    blob = await put(store, some_bytes(LARGE))
    for _ in range(3):
        reading = store.read(blob.key, 0, blob.length)
        assert await anext(reading)
        assert inspect.isasyncgen(reading)
        await reading.aclose()
    assert await got(store, blob) == some_bytes(LARGE)


@pytest.mark.parametrize("key", [content_key(bytes(32)), "uploads/5bd4c3c2-4a0b-4c5c-9d5e-0f9a4f6e2c11"])
async def test_a_missing_blob_is_corruption_to_a_reader_and_has_no_size(store: BlobStore, key: str) -> None:
    assert await store.size(key) is None
    for length in (0, 1):
        with pytest.raises(CorruptError, match="missing"):
            await anext(aiter(store.read(key, 0, length)))


async def test_a_blob_that_is_too_short_is_corruption_to_a_reader(store: BlobStore) -> None:
    blob = await put(store, b"0123456789")
    for offset, length in ((0, 11), (5, 6), (10, 1), (11, 0), (500, 20)):
        with pytest.raises(CorruptError, match="10 bytes"):
            await anext(aiter(store.read(blob.key, offset, length)))


@pytest.mark.parametrize(
    "key",
    ["", "/etc/passwd", "../x", "blobs/../../x", "blobs//x", "a/./b", "a/b/", ".hidden", "a\0b", "ä", "a?b", "a b"],
)
async def test_no_key_leaves_the_store(store: BlobStore, key: str) -> None:
    with pytest.raises(CorruptError, match="not the key"):
        await store.size(key)
    with pytest.raises(CorruptError, match="not the key"):
        await anext(aiter(store.read(key, 0, 1)))


async def test_a_named_object_is_replaced_listed_and_removed(store: BlobStore) -> None:
    assert await store.get_object("snapshots/a/1/index") is None
    assert await store.list_objects("snapshots/a/") == []
    for key, data in (("snapshots/a/1/index", b"old"), ("snapshots/a/1/index", b"new"), ("snapshots/b/0", b"")):
        await store.put_object(key, data)
    await store.put_object("snapshots/a/2/0", some_bytes(8 * MIB))
    assert await store.get_object("snapshots/a/1/index") == b"new"
    assert await store.get_object("snapshots/b/0") == b""
    assert await store.get_object("snapshots/a/2/0") == some_bytes(8 * MIB)
    assert await store.list_objects("snapshots/a/") == ["snapshots/a/1/index", "snapshots/a/2/0"]
    for _ in range(2):
        await store.delete_object("snapshots/a/1/index")
    assert await store.list_objects("snapshots/a/") == ["snapshots/a/2/0"]


async def test_a_named_object_never_takes_the_place_of_a_blob(stage: Stage) -> None:
    blob = await put(stage.store, b"a blob")
    for act in (stage.store.delete_object, stage.store.list_objects, stage.store.get_object):
        with pytest.raises(ValueError, match="no key of a named object"):
            await act(blob.key)
    with pytest.raises(ValueError, match="no key of a named object"):
        await stage.store.put_object(blob.key, b"another")
    with pytest.raises(CorruptError):
        await stage.store.put_object("snapshots/../blobs/x", b"another")
    assert stage.holds() == {blob.key}
    assert await got(stage.store, blob) == b"a blob"


async def test_a_large_body_that_nobody_came_to_name_is_removed_and_nothing_that_may_be_shared(stage: Stage) -> None:
    blob = await put(stage.store, some_bytes(LARGE))
    if blob.key.startswith("uploads/"):
        for _ in range(2):
            await stage.store.delete_object(blob.key)
        assert not {key for key in stage.holds() if not key.startswith("multipart/")}
    else:  # everything is content-addressed there
        with pytest.raises(ValueError, match="no key of a named object"):
            await stage.store.delete_object(blob.key)
        assert stage.holds() == {blob.key}
    with pytest.raises(CorruptError):
        await stage.store.delete_object("uploads/../blobs/x")


async def test_migrating_again_keeps_what_is_there(store: BlobStore) -> None:
    blob = await put(store, b"kept")
    await store.migrate()
    assert await got(store, blob) == b"kept"
    await store.check()


async def test_a_sweep_removes_what_stood_still_and_no_blob(stage: Stage) -> None:
    blob = await put(stage.store, some_bytes(LARGE))
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        async for chunk in body(some_bytes(LARGE)):
            yield chunk
        waiting.set()
        await asyncio.Event().wait()

    upload = asyncio.create_task(stage.store.store(endless(), declared=Declared(), max_bytes=LIMIT))
    await waiting.wait()
    unfinished = stage.holds() - {blob.key}
    assert len(unfinished) == 1
    soon, later = datetime.now(UTC) + timedelta(hours=23), datetime.now(UTC) + timedelta(hours=25)
    assert await stage.store.sweep(now=soon) == 0
    assert stage.holds() == {blob.key} | unfinished
    assert await stage.store.sweep(now=soon, idle_seconds=3600) == 1
    assert stage.holds() == {blob.key}
    assert await stage.store.sweep(now=later) == 0
    upload.cancel()
    with pytest.raises(asyncio.CancelledError):
        await upload
    assert await got(stage.store, blob) == some_bytes(LARGE)


@MUCH
@pytest.mark.parametrize("said", [Declared(), Declared(size_bytes=300 * MIB)], ids=["undeclared", "declared"])
async def test_memory_stays_bounded_whatever_the_length(store: BlobStore, said: Declared) -> None:
    chunk = some_bytes(65536)

    async def long() -> AsyncIterator[bytes]:
        for _ in range(300 * 16):
            yield chunk

    tracemalloc.start()
    try:
        blob = await store.store(long(), declared=said, max_bytes=LIMIT)
        async for piece in store.read(blob.key, 0, blob.length):
            assert len(piece) <= MIB
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert blob.length == 300 * MIB
    assert peak < 24 * MIB  # three parts of 5 MiB, and what is on its way


@pytest.fixture(params=["local", "s3"])
async def unreachable(request: pytest.FixtureRequest, tmp_path: Path, unused_tcp_port: int) -> AsyncIterator[BlobStore]:
    found: BlobStore = (
        LocalBlobStore(tmp_path / "absent")
        if request.param == "local"
        else S3BlobStore(Endpoint(f"127.0.0.1:{unused_tcp_port}", "bucket", False, "user", "secret-of-the-store", "eu"))
    )
    yield found
    await found.close()


async def test_a_store_that_cannot_be_reached_says_so_quickly_and_tells_no_secret(unreachable: BlobStore) -> None:
    with Standstill() as machine:
        started = time.monotonic()
        with pytest.raises(UnavailableError) as checked:
            await unreachable.check()
        took = time.monotonic() - started
    assert took - machine.longest(started) < 3
    with pytest.raises(UnavailableError) as stored:
        await put(unreachable, b"x")
    for error in (checked.value, stored.value):
        assert "secret-of-the-store" not in str(error)
        assert "X-Amz" not in str(error)


def test_both_adapters_fulfil_the_port() -> None:
    local: type[BlobStore] = LocalBlobStore
    s3: type[BlobStore] = S3BlobStore
    for adapter in (local, s3):
        for name, wanted in inspect.getmembers(
            BlobStore, lambda member: callable(member) or isinstance(member, property)
        ):
            if not name.startswith("_"):
                offered = getattr(adapter, name)
                assert type(offered) is type(wanted)
                if callable(wanted):
                    assert inspect.signature(offered) == inspect.signature(wanted)
