"""The S3 adapter's own duties: parts, lost answers, lost connections, credentials, records of uploads."""

from __future__ import annotations

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.archives.bundle import Group, SmallFile, StreamedFile
from artifact_store.errors import (
    ConfigurationError,
    ContentMismatchError,
    PushBackError,
    TooLargeError,
    UnavailableError,
)
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.memory import ByteBudget, PartBuffer
from services.blobs.packs import Packing
from services.blobs.port import Part, PartsKey
from services.blobs.resumable.uploads import ResumableUploads
from services.blobs.s3.multipart import RECORDS, UploadRecord
from services.blobs.s3.requests import Endpoint
from services.blobs.s3.store import S3BlobStore
from tests.contract.blobs_stage import (
    LIMIT,
    MUCH,
    PART,
    body,
    declared,
    endpoint,
    got,
    objects,
    put,
    s3_store,
    some_bytes,
)
from tests.contract.blobs_tripwire import BitFlipper, Tripwire
from tests.contract.resumable_stage import PACKAGE, Log, new

pytestmark = pytest.mark.services


@pytest.fixture
def at(any_s3_bucket: dict[str, Any]) -> Endpoint:
    return endpoint(any_s3_bucket)


@asynccontextmanager
async def opened(at: Endpoint, **options: Any) -> AsyncIterator[S3BlobStore]:
    store = s3_store(at, **options)
    try:
        yield store
    finally:
        await store.close()


@pytest.mark.parametrize("times", [1, 3])
async def test_a_reader_goes_on_where_the_connection_was_lost(
    any_s3_bucket: dict[str, Any], at: Endpoint, times: int
) -> None:
    data = some_bytes(2 * PART)
    async with opened(at) as direct:
        blob = await put(direct, data)
    wire = Tripwire(at.host, rb"GET ", times=times, after=1 << 20)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        assert await got(store, blob) == data
    assert wire.tripped == times


async def test_a_reader_gives_up_when_no_attempt_brings_it_further(any_s3_bucket: dict[str, Any], at: Endpoint) -> None:
    async with opened(at) as direct:
        blob = await put(direct, some_bytes(1000))
    wire = Tripwire(at.host, rb"GET ", times=100)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host), attempts=2) as store:
        with pytest.raises(UnavailableError, match=host):
            await got(store, blob)
    assert 2 <= wire.tripped <= 4  # the client library repeats a request once that an idle connection lost


@pytest.mark.parametrize(
    ("lost", "size", "said"),
    [
        (rb"PUT /[^/]+/blobs/", 1000, False),
        (rb"PUT /[^/]+/uploads/.*partNumber=2", 3 * PART, False),
        (rb"POST /[^/]+/uploads/.*\?uploadId=", 2 * PART, False),
        (rb"POST /[^/]+/blobs/.*\?uploadId=", 2 * PART, True),
        (rb"PUT /[^/]+/multipart/", 2 * PART, False),
        (rb"DELETE /[^/]+/multipart/", 2 * PART, True),
    ],
    ids=["put", "part", "complete", "complete-addressed", "record", "remove-record"],
)
async def test_an_answer_that_is_lost_does_not_lose_the_upload(
    any_s3_bucket: dict[str, Any], at: Endpoint, lost: bytes, size: int, said: bool
) -> None:
    data = some_bytes(size)
    wire = Tripwire(at.host, lost)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        blob = await put(store, data, declared(data) if said else None)
        assert await got(store, blob) == data
    assert wire.tripped == 1
    assert objects(at) == {blob.key}


@pytest.mark.parametrize("lost", [rb"PUT /[^/]+/uploads/", rb"POST /[^/]+/uploads/.*\?uploadId="], ids=["part", "end"])
async def test_an_upload_whose_store_keeps_failing_leaves_nothing(
    any_s3_bucket: dict[str, Any], at: Endpoint, lost: bytes
) -> None:
    wire = Tripwire(at.host, lost, times=100)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host), attempts=2) as store:
        with pytest.raises(UnavailableError, match=host) as failed:
            await put(store, some_bytes(2 * PART))
    assert "X-Amz" not in str(failed.value)
    assert failed.value.__cause__ is None
    assert objects(at) == set()


ALTERED = pytest.mark.parametrize(
    ("altered", "size", "said"),
    [
        (rb"PUT /[^/]+/blobs/", 1000, False),
        (rb"PUT /[^/]+/blobs/", 1 << 20, True),
        (rb"PUT /[^/]+/uploads/.*partNumber=2", 3 * PART, False),
        (rb"PUT /[^/]+/blobs/.*partNumber=1", 2 * PART, True),
    ],
    ids=["small", "held", "part", "addressed"],
)


@ALTERED
async def test_bytes_that_are_altered_on_their_way_to_the_store_are_sent_again(
    any_s3_bucket: dict[str, Any], at: Endpoint, altered: bytes, size: int, said: bool
) -> None:
    data = some_bytes(size)
    wire = BitFlipper(at.host, altered, after=size // 10)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        blob = await put(store, data, declared(data) if said else None)
        assert await got(store, blob) == data
    assert wire.tripped == 1


@ALTERED
async def test_bytes_that_are_altered_again_and_again_are_not_acknowledged(
    any_s3_bucket: dict[str, Any], at: Endpoint, altered: bytes, size: int, said: bool
) -> None:
    data = some_bytes(size)
    wire = BitFlipper(at.host, altered, times=100, after=size // 10)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host), attempts=2) as store:
        with pytest.raises(UnavailableError, match=r"other bytes than were sent|lost in the middle"):
            await put(store, data, declared(data) if said else None)
    assert wire.tripped >= 2
    assert objects(at) == set()


async def test_a_relayed_part_that_is_altered_on_its_way_is_not_acknowledged(
    any_s3_bucket: dict[str, Any], at: Endpoint
) -> None:
    data = some_bytes(4 * PART + 17)
    wire = BitFlipper(at.host, rb"PUT /[^/]+/uploads/.*partNumber=2", after=PART)
    options = {"held_bytes": PART, "max_parts": 2}
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host), **options) as store:
        with pytest.raises(UnavailableError):
            await put(store, data, Declared(size_bytes=len(data)))
    assert wire.tripped == 1
    assert not {key for key in objects(at) if not key.startswith(RECORDS)}


async def test_an_object_that_is_altered_on_its_way_is_sent_or_read_again(
    any_s3_bucket: dict[str, Any], at: Endpoint
) -> None:
    forth = BitFlipper(at.host, rb"PUT /[^/]+/snapshots/", after=10)
    back = BitFlipper(at.host, rb"GET /[^/]+/snapshots/", after=10, back=True)
    async with forth.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        await store.put_object("snapshots/x", some_bytes(1000))
    async with back.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        assert await store.get_object("snapshots/x") == some_bytes(1000)
    assert (forth.tripped, back.tripped) == (1, 1)


async def test_parts_that_are_altered_while_they_are_read_back_are_read_again(
    any_s3_bucket: dict[str, Any], at: Endpoint
) -> None:
    data = some_bytes(2 * PART)
    wire = BitFlipper(at.host, rb"GET /[^/]+/uploads/", after=PART, back=True)
    async with wire.listening() as host, opened(endpoint(any_s3_bucket, host)) as store:
        upload_id = uuid4()
        where = PartsKey(upload_id, await store.parts.begin(upload_id, len(data)))
        parts = []
        for number in (1, 2):
            with closing(PartBuffer(PART)) as part:
                part.append(data[(number - 1) * PART : number * PART])
                parts.append(Part(number, await store.parts.put(where, number, part)))
        with pytest.raises(UnavailableError, match="gave other bytes"):
            await store.parts.assemble(where, parts, declared=Declared(len(data)))
        blob = await store.parts.assemble(where, parts, declared=Declared(len(data)))
    assert blob.blake3 == blake3(data).digest()
    assert wire.tripped == 1


async def test_an_aborted_upload_is_unknown_to_the_store(at: Endpoint) -> None:
    waiting = asyncio.Event()

    async def endless() -> AsyncIterator[bytes]:
        async for chunk in body(some_bytes(3 * PART)):
            yield chunk
        waiting.set()
        await asyncio.Event().wait()

    async with opened(at) as store:
        upload = asyncio.create_task(store.store(endless(), declared=Declared(), max_bytes=LIMIT))
        await waiting.wait()
        (record_key,) = objects(at)
        answer = at.sdk().get_object(at.bucket, record_key)
        record = UploadRecord.decode(answer.read())
        answer.close()
        assert record.key.startswith("uploads/")
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
        assert objects(at) == set()
        parts = await store._requests.send(
            "GET", record.key, frozenset({200, 404}), query={"uploadId": record.upload_id}
        )
        assert (parts.status, parts.code) == (404, "NoSuchUpload")


async def test_parts_too_large_for_memory_are_relayed(at: Endpoint) -> None:
    data = some_bytes(4 * PART + 17)
    async with opened(at, held_bytes=PART, max_parts=2) as store:
        for said in (Declared(size_bytes=len(data)), declared(data)):
            blob = await put(store, data, said)
            assert await got(store, blob) == data
        assert len(objects(at)) == 2


async def test_a_relayed_body_that_fails_raises_its_own_error_and_leaves_nothing(at: Endpoint) -> None:
    class LostProducerError(Exception):
        pass

    data = some_bytes(4 * PART)

    async def torn() -> AsyncIterator[bytes]:
        async for chunk in body(data[: 3 * PART]):
            yield chunk
        raise LostProducerError

    async with opened(at, held_bytes=PART, max_parts=2) as store:
        with pytest.raises(LostProducerError):
            await store.store(torn(), declared=Declared(size_bytes=len(data)), max_bytes=LIMIT)
        with pytest.raises(ContentMismatchError):
            await put(store, data[:-1], Declared(size_bytes=len(data)))
        with pytest.raises(ContentMismatchError):
            await put(store, data, Declared(size_bytes=len(data), sha256=bytes(32)))
        upload = asyncio.create_task(put(store, data, Declared(size_bytes=len(data))))
        await asyncio.wait({upload}, timeout=0.05)
        upload.cancel()
        await asyncio.gather(upload, return_exceptions=True)
    assert not {key for key in objects(at) if key.startswith(RECORDS)}


async def test_a_body_of_undeclared_size_that_needs_too_many_parts_is_refused_with_the_way_out(at: Endpoint) -> None:
    async with opened(at, held_bytes=PART, max_parts=2) as store:
        with pytest.raises(TooLargeError, match="declare its size"):
            await put(store, some_bytes(2 * PART + 1))
        assert objects(at) == set()
        assert (await put(store, some_bytes(2 * PART))).length == 2 * PART


@MUCH
async def test_many_uploads_share_one_budget_and_give_it_back(at: Endpoint) -> None:
    memory = ByteBudget(3 * PART)
    data = [some_bytes(size, seed=size) for size in (10, 1000, PART, 2 * PART, 3 * PART, PART + 1) for _ in range(3)]
    async with opened(at, memory=memory) as store:
        blobs = await asyncio.gather(*(put(store, each) for each in data))
        assert [blob.blake3 for blob in blobs] == [blake3(each).digest() for each in data]
        with pytest.raises(ContentMismatchError):
            await put(store, data[-1], Declared(sha256=bytes(32)))
    assert memory.free == memory.limit


async def test_an_upload_is_idle_only_if_nothing_moved_for_long(at: Endpoint) -> None:
    now = datetime(2030, 1, 1, tzinfo=UTC)
    paused, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        nonlocal now
        for _ in range(3):
            yield some_bytes(PART)
            now += timedelta(hours=20)
        yield b"the last byte makes the third part a whole one"
        paused.set()
        await go_on.wait()

    async with opened(at, clock=lambda: now) as store:
        upload = asyncio.create_task(store.store(slow(), declared=Declared(), max_bytes=LIMIT))
        await paused.wait()
        assert await store.sweep(now=now + timedelta(hours=3)) == 0  # begun sixty hours ago, but it moved
        go_on.set()
        assert (await upload).length > 3 * PART


async def test_a_body_under_its_own_key_is_fresh_from_its_beginning_until_a_day_after_its_completion(
    at: Endpoint,
) -> None:
    now = datetime.now(UTC) + timedelta(days=365)
    paused, go_on = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        async for chunk in body(some_bytes(2 * PART)):
            yield chunk
        paused.set()
        await go_on.wait()

    async with opened(at, clock=lambda: now) as store:
        upload = asyncio.create_task(store.store(slow(), declared=Declared(), max_bytes=LIMIT))
        await paused.wait()
        begun = await store.fresh_uploads()
        now += timedelta(hours=23)
        go_on.set()
        blob = await upload
        assert begun == {blob.key}
        await put(store, some_bytes(2 * PART), declared(some_bytes(2 * PART)))  # at its content-addressed key
        assert await store.sweep(now=now + timedelta(hours=23)) == 0
        assert await store.fresh_uploads() == {blob.key}
        assert await store.sweep(now=now + timedelta(hours=25)) == 0  # it did not stand still
        assert await store.fresh_uploads() == set()
        assert await got(store, blob) == some_bytes(2 * PART)


async def test_a_sweep_leaves_a_record_that_it_cannot_read(at: Endpoint, caplog: pytest.LogCaptureFixture) -> None:
    async with opened(at) as store:
        await store._requests.send("PUT", f"{RECORDS}strange", frozenset({200}), body=b"not a record")
        assert await store.sweep(now=datetime.now(UTC) + timedelta(days=2)) == 0
        assert objects(at) == {f"{RECORDS}strange"}
    assert "strange" in caplog.text


async def test_a_sweep_never_removes_the_blob_of_an_upload_whose_record_was_left(at: Endpoint) -> None:
    async with opened(at) as store:
        blob = await put(store, some_bytes(2 * PART))
        then = datetime.now(UTC)
        assert await store.sweep(now=then + timedelta(days=2)) == 0  # its own record, of one that was completed
        record = UploadRecord(blob.key, "an-upload-that-was-completed", then, then)
        await store._requests.send("PUT", f"{RECORDS}left", frozenset({200}), body=record.encode())
        assert await store.sweep(now=then + timedelta(days=2)) == 1
        assert objects(at) == {blob.key}
        assert await got(store, blob) == some_bytes(2 * PART)


@pytest.mark.parametrize("wrong", ["access_key", "secret_key"])
async def test_wrong_credentials_are_named_but_not_shown(at: Endpoint, wrong: str) -> None:
    keys = {"access_key": at.access_key, "secret_key": at.secret_key, wrong: "not-the-right-one"}
    async with opened(Endpoint(at.host, at.bucket, False, keys["access_key"], keys["secret_key"], at.region)) as store:
        with pytest.raises(ConfigurationError, match="ARTIFACT_STORE_S3_SECRET_KEY"):
            await store.migrate()
        for act in (store.check(), store.size(content_key(bytes(32))), put(store, b"x")):
            with pytest.raises(UnavailableError, match="refuses access") as refused:
                await act
            assert "not-the-right-one" not in str(refused.value)
        with pytest.raises(UnavailableError, match="refuses access"):
            await anext(aiter(store.read(content_key(bytes(32)), 0, 1)))


async def test_a_bucket_that_is_missing_is_made_by_migrate_and_named_until_then(at: Endpoint) -> None:
    other = Endpoint(at.host, f"{at.bucket}-new", False, at.access_key, at.secret_key, at.region)
    async with opened(other) as store:
        read = store.read(content_key(bytes(32)), 0, 1)
        for act in (store.check(), put(store, b"x"), anext(aiter(read)), store.list_objects("snapshots/")):
            with pytest.raises(UnavailableError, match=r"has no bucket .*if it was deleted, restore it"):
                await act
        await store.migrate()
        await store.migrate()
        blob = await put(store, b"x")
        other.sdk().remove_object(other.bucket, blob.key)
        other.sdk().remove_bucket(other.bucket)


async def test_an_upload_is_pushed_back_while_slow_ones_hold_all_memory(at: Endpoint) -> None:
    began, go_on = asyncio.Event(), asyncio.Event()
    read: list[bytes] = []

    async def slow() -> AsyncIterator[bytes]:
        yield b"first"
        began.set()
        await go_on.wait()

    async def untouched() -> AsyncIterator[bytes]:
        read.append(b"1")
        yield b"1"

    async with opened(at, held_bytes=PART, memory=ByteBudget(PART), turn_seconds=0.2) as store:
        holding = asyncio.create_task(store.store(slow(), declared=Declared(), max_bytes=LIMIT))
        await began.wait()
        with pytest.raises(PushBackError):
            await store.store(untouched(), declared=Declared(), max_bytes=LIMIT)
        assert read == []
        with pytest.raises(PushBackError):
            await store.store(body(b"short"), declared=Declared(size_bytes=5), max_bytes=LIMIT)
        go_on.set()
        assert (await holding).length == len(b"first")
        assert (await put(store, b"1")).length == 1


async def test_uploads_that_trickle_give_their_memory_up_to_one_that_does_not(at: Endpoint) -> None:
    began: list[asyncio.Event] = [asyncio.Event() for _ in range(3)]

    async def trickle(begun: asyncio.Event) -> AsyncIterator[bytes]:
        for _ in range(3_000):
            yield b"a byte now and then"
            begun.set()
            await asyncio.sleep(0.02)

    memory = ByteBudget(3 * PART)
    async with opened(at, held_bytes=PART, memory=memory, look_seconds=0.2) as store:
        slow = [asyncio.create_task(store.store(trickle(b), declared=Declared(), max_bytes=LIMIT)) for b in began]
        await asyncio.gather(*(begun.wait() for begun in began))
        assert memory.free == 0
        data = some_bytes(PART + 1)
        assert await got(store, await put(store, data, declared(data))) == data
        given_up = [task for task in slow if task.done()]
        assert given_up, "one of them had to make room"
        for task in given_up:
            assert isinstance(task.exception(), PushBackError)
        for task in slow:
            task.cancel()
        await asyncio.gather(*slow, return_exceptions=True)
    assert memory.free == memory.limit
    assert objects(at) == {content_key(blake3(data).digest())}


async def test_large_bodies_that_are_orphaned_are_removed_and_nothing_else(at: Endpoint) -> None:
    async with opened(at) as store:
        named, orphan = [await put(store, some_bytes(PART + 1, seed)) for seed in (1, 2)]
        addressed = await put(store, b"small")
        asked: list[str] = []

        def orphaned(key: str) -> bool:
            asked.append(key)
            return key == orphan.key

        early, late = datetime.now(UTC) - timedelta(hours=1), datetime.now(UTC) + timedelta(hours=1)
        assert await store.remove_uploads(before=early, orphaned=orphaned) == 0
        assert asked == []
        assert await store.remove_uploads(before=late, orphaned=orphaned) == 1
        assert sorted(asked) == sorted([named.key, orphan.key])
        assert objects(at) - {f"{RECORDS}{orphan.key.removeprefix('uploads/')}"} == {named.key, addressed.key}


async def test_a_bundle_that_is_not_stored_whole_leaves_none_of_its_large_files(at: Endpoint) -> None:
    class LostProducerError(Exception):
        pass

    waiting = asyncio.Event()

    def large(name: str) -> StreamedFile:
        data = some_bytes(PART + 1, seed=ord(name))
        return StreamedFile(name, "text/plain", len(data), body(data))

    async def torn() -> AsyncIterator[Group]:
        yield large("a")
        yield [SmallFile("b", "text/plain", b"small")]
        yield large("c")
        raise LostProducerError

    async def endless() -> AsyncIterator[Group]:
        yield large("a")
        waiting.set()
        await asyncio.Event().wait()

    def bodies() -> set[str]:
        return {key for key in objects(at) if not key.startswith(RECORDS)}

    async with opened(at) as store:
        with pytest.raises(LostProducerError):
            await Packing(store, LIMIT).store(torn())
        assert bodies() == set()
        storing = asyncio.create_task(Packing(store, LIMIT).store(endless()))
        await waiting.wait()
        assert len(bodies()) == 1
        storing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await storing
        assert bodies() == set()


async def test_more_uploads_than_one_listing_holds_are_all_asked_for(
    at: Endpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.blobs.s3.store._LISTED_AT_ONCE", 2)
    async with opened(at) as store:
        for number in range(5):
            at.sdk().put_object(at.bucket, f"uploads/{number}", io.BytesIO(b"x"), 1)
        late = datetime.now(UTC) + timedelta(hours=1)
        assert await store.remove_uploads(before=late, orphaned=lambda key: key != "uploads/3") == 4
    assert objects(at) == {"uploads/3"}


async def test_a_gateway_whose_clock_is_a_day_ahead_ends_nobody_s_upload(at: Endpoint) -> None:
    log = Log()
    async with opened(at) as right, opened(at) as wrong:
        await wrong.now()
        ours = wrong.clock._own
        wrong.clock._own = lambda: ours() + 25 * 3600 * 1_000_000

        def uploads(store: S3BlobStore) -> ResumableUploads:
            return ResumableUploads(store, check=log.check, record=log.record, max_file_bytes=1 << 40)

        begun = await uploads(right).create(new(10))
        assert await wrong.sweep(now=await wrong.now()) == 0
        assert (await uploads(wrong).find(PACKAGE, begun.upload_id)).active_at == begun.active_at
        other = await uploads(wrong).create(new(10))
        assert abs(other.active_at - begun.active_at) < timedelta(minutes=1)
        assert abs(wrong._clock() - right._clock()) < timedelta(minutes=1), "records of large bodies are dated by it"
