"""Uploads over several requests, on every store: nothing is lost, wherever they break off and whoever continues."""

from __future__ import annotations

import asyncio
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from blake3 import blake3
from minio import Minio
from urllib3 import BaseHTTPResponse

from artifact_store.errors import (
    ChecksumMismatchError,
    CommandReusedError,
    ContentMismatchError,
    DuplicateRelativePathError,
    TooLargeError,
    UnavailableError,
    UploadBusyError,
    UploadNotFoundError,
    UploadOffsetError,
)
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.port import StoredBlob
from services.blobs.resumable import states as upload_states
from services.blobs.resumable.states import NewerStateError, SupersededError, UploadState, UploadStates
from services.blobs.resumable.uploads import HOLD_SECONDS, Checksum, ResumableUploads, acknowledgement_of
from tests.contract.blobs_stage import (
    MUCH,
    STORES,
    body,
    local_stage,
    some_bytes,
)
from tests.contract.resumable_stage import (
    PACKAGE,
    Clock,
    CutError,
    Log,
    Scene,
    check_recorded,
    cut,
    new,
    opened_scene,
    send,
)

DAY = timedelta(days=1, seconds=1)


@pytest.fixture(params=STORES)
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(request, tmp_path / "blobs") as found:
        yield found


@MUCH
@pytest.mark.parametrize("seed", range(3))
async def test_cut_anywhere_and_gone_on_with_by_any_gateway_the_file_is_whole(scene: Scene, seed: int) -> None:
    rng = random.Random(seed)
    data = some_bytes(3 * scene.part + rng.choice([0, 1, 4711]), seed)
    upload = await scene.begin(len(data))
    edges = [scene.part - 1, scene.part, scene.part + 1, 2 * scene.part]
    cuts = sorted({*rng.sample(edges, 2), *(rng.randrange(len(data)) for _ in range(4))})
    at = 0
    for end in cuts:
        gateway, following = rng.sample([scene.one, scene.other], 2)
        with pytest.raises(CutError):
            await gateway.append(PACKAGE, upload, at, cut(data[at:end]))
        at = (await following.find(PACKAGE, upload)).offset
        assert at == end, "all that came is kept"
    done = await send(scene.other, upload, data, at, len(data))
    assert done.offset == len(data)
    await check_recorded(scene, data)
    found = await scene.one.find(PACKAGE, upload)
    assert acknowledgement_of(found) == acknowledgement_of(done) is not None
    scene.clock.now += DAY
    assert await scene.sweep() == 1
    assert scene.stage.holds() == {scene.log.blob().key}


@MUCH
@pytest.mark.parametrize("requests", [1, 2])
async def test_what_one_request_brought_is_not_read_back(
    scene: Scene, requests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(2 * scene.part + 7)
    reads: list[str] = []
    read, get = scene.stage.store.read, Minio.get_object

    def counted(key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        reads.append(key)
        return read(key, offset, length)

    def got(sdk: Minio, bucket: str, key: str, *, offset: int, length: int) -> BaseHTTPResponse:
        reads.append(key)
        return get(sdk, bucket, key, offset, length)

    upload = await scene.begin(len(data), said=Declared(len(data), blake3(data).digest()))
    with monkeypatch.context() as patched:
        patched.setattr(scene.stage.store, "read", counted)
        patched.setattr(Minio, "get_object", got)
        if requests == 2:
            await send(scene.one, upload, data, 0, 10)
        await send(scene.one, upload, data, 10 if requests == 2 else 0, len(data))
    own_key = scene.log.blob().key.startswith("uploads/")
    assert (scene.log.blob().key in reads) == (own_key and requests == 2)
    await check_recorded(scene, data)


@MUCH
@pytest.mark.parametrize("requests", [1, 2])
async def test_what_one_request_brought_must_be_what_was_declared(scene: Scene, requests: int) -> None:
    data = some_bytes(scene.part + 7)
    upload = await scene.begin(len(data), said=Declared(len(data), sha256=b"x" * 32))
    if requests == 2:
        await send(scene.one, upload, data, 0, 10)
    with pytest.raises(ContentMismatchError):
        await send(scene.one, upload, data, 10 if requests == 2 else 0, len(data))
    assert scene.stage.holds() == set()


@pytest.mark.parametrize("length", [0, 1, 1000])
async def test_small_files_lie_at_their_content_address(scene: Scene, length: int) -> None:
    data = some_bytes(length)
    upload = await scene.begin(length)
    for at in range(0, length, 400):
        await send(scene.one, upload, data, at, min(at + 400, length))
    await check_recorded(scene, data)
    assert scene.log.blob().key.startswith("blobs/")


async def test_another_offset_than_the_one_it_stands_at_is_refused(scene: Scene) -> None:
    data = some_bytes(1000)
    upload = await scene.begin(1000)
    await send(scene.one, upload, data, 0, 500)
    for wrong in (0, 499, 501, 1000):
        with pytest.raises(UploadOffsetError, match="500"):
            await scene.other.append(PACKAGE, upload, wrong, body(data[wrong:]))
    with pytest.raises(TooLargeError):
        await scene.one.append(PACKAGE, upload, 500, body(some_bytes(501)), size=501)
    assert (await scene.one.find(PACKAGE, upload)).offset == 500


async def test_a_body_that_is_longer_than_the_upload_is_not_taken(scene: Scene) -> None:
    upload = await scene.begin(1000)
    with pytest.raises(TooLargeError):
        await scene.one.append(PACKAGE, upload, 0, body(some_bytes(1001)))
    assert (await scene.one.find(PACKAGE, upload)).offset == 0


async def test_while_one_request_adds_no_other_does_at_any_gateway(scene: Scene) -> None:
    data = some_bytes(2000)
    upload = await scene.begin(2000)
    first, rest = asyncio.Event(), asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield data[:700]
        first.set()
        await rest.wait()
        yield data[700:]

    running = asyncio.create_task(scene.one.append(PACKAGE, upload, 0, slow()))
    await first.wait()
    for gateway in (scene.one, scene.other):
        with pytest.raises(UploadBusyError):
            await send(gateway, upload, data, 0, 2000)
        with pytest.raises(UploadBusyError):
            await gateway.remove(PACKAGE, upload)
    rest.set()
    assert (await running).offset == 2000
    await check_recorded(scene, data)


async def test_of_requests_at_the_same_moment_one_adds_its_bytes(scene: Scene) -> None:
    bodies = [some_bytes(600, seed) for seed in range(4)]
    upload = await scene.begin(1200)
    results = await asyncio.gather(
        *(
            (scene.one, scene.other)[number % 2].append(PACKAGE, upload, 0, body(data))
            for number, data in enumerate(bodies)
        ),
        return_exceptions=True,
    )
    winners = [number for number, found in enumerate(results) if isinstance(found, UploadState)]
    assert len(winners) == 1
    assert all(isinstance(found, UploadBusyError | UploadOffsetError | UploadState) for found in results), results
    await scene.one.append(PACKAGE, upload, 600, body(bodies[0]))
    await check_recorded(scene, bodies[winners[0]] + bodies[0])


@MUCH
async def test_a_request_that_was_taken_for_dead_commits_nothing_when_it_wakes(scene: Scene) -> None:
    data, stale = some_bytes(3 * scene.part), some_bytes(3 * scene.part, 1)
    upload = await scene.begin(len(data))
    asleep, wake = asyncio.Event(), asyncio.Event()

    async def sleeper() -> AsyncIterator[bytes]:
        async for chunk in body(stale[: scene.part + 10]):
            yield chunk
        asleep.set()
        await wake.wait()
        async for chunk in body(stale[scene.part + 10 :]):
            yield chunk

    zombie = asyncio.create_task(scene.one.append(PACKAGE, upload, 0, sleeper()))
    await asleep.wait()
    scene.clock.now += timedelta(seconds=HOLD_SECONDS)
    at = scene.part // 2
    await send(scene.other, upload, data, 0, at)
    wake.set()
    with pytest.raises(UploadBusyError):
        await zombie
    assert (await scene.one.find(PACKAGE, upload)).offset == at
    await send(scene.one, upload, data, at, len(data))
    await check_recorded(scene, data)


@MUCH
@pytest.mark.parametrize("algorithm", ["sha1", "sha256", "blake3"])
async def test_bytes_with_a_checksum_are_taken_whole_or_not_at_all(scene: Scene, algorithm: str) -> None:
    data = some_bytes(scene.part + 1000)
    upload = await scene.begin(len(data))
    await send(scene.one, upload, data, 0, 300)
    right = {"sha1": hashlib.sha1, "sha256": hashlib.sha256, "blake3": blake3}[algorithm](data[300:]).digest()  # type: ignore[operator]  # they differ in their keywords only
    for wrong, error in ((body(data[301:] + b"x"), ChecksumMismatchError), (cut(data[300:]), CutError)):
        with pytest.raises(error):
            await scene.one.append(PACKAGE, upload, 300, wrong, checksum=Checksum(algorithm, right))
        assert (await scene.other.find(PACKAGE, upload)).offset == 300
    await scene.other.append(PACKAGE, upload, 300, body(data[300:]), checksum=Checksum(algorithm, right))
    await check_recorded(scene, data)


async def test_bytes_that_are_not_what_was_declared_are_refused_and_nothing_is_left(scene: Scene) -> None:
    data = some_bytes(1000)
    for said in (Declared(1000, blake3=b"x" * 32), Declared(1000, sha256=b"x" * 32)):
        upload = await scene.begin(1000, said=said)
        with pytest.raises(ContentMismatchError):
            await send(scene.one, upload, data, 0, 1000)
        with pytest.raises(UploadNotFoundError):
            await scene.other.find(PACKAGE, upload)
    assert scene.stage.holds() == set()
    assert scene.log.recorded == {}


@MUCH
async def test_a_file_that_is_refused_at_the_end_leaves_no_large_blob(scene: Scene) -> None:
    data = some_bytes(scene.part + 1)
    first, second, third = [await scene.begin(len(data)) for _ in range(3)]

    async def overtaken() -> AsyncIterator[bytes]:
        async for chunk in body(data[: scene.part]):
            yield chunk
        await send(scene.other, second, data, 0, len(data))
        yield data[scene.part :]

    with pytest.raises(DuplicateRelativePathError):
        await scene.one.append(PACKAGE, first, 0, overtaken())
    with pytest.raises(UploadNotFoundError):
        await scene.one.find(PACKAGE, first)
    with pytest.raises(DuplicateRelativePathError):
        await send(scene.one, third, data, 0, len(data))
    with pytest.raises(DuplicateRelativePathError):
        await scene.begin(len(data))
    await scene.one.remove(PACKAGE, third)
    await scene.one.remove(PACKAGE, second)
    assert scene.stage.holds() == {scene.log.blob().key}
    await check_recorded(scene, data)


async def send_unanswered(scene: Scene) -> tuple[UUID, bytes]:
    """Send all of an upload whose command may be in the log; its id and its bytes."""
    data = some_bytes(scene.part + 1)
    upload = await scene.begin(len(data))
    scene.log.failures.append(UnavailableError("the answer was lost"))
    with pytest.raises(UnavailableError):
        await send(scene.one, upload, data, 0, len(data))
    return upload, data


@MUCH
async def test_when_the_log_gave_no_answer_asking_again_finds_the_file(scene: Scene) -> None:
    upload, data = await send_unanswered(scene)
    found = await scene.other.find(PACKAGE, upload)
    assert acknowledgement_of(found) is not None
    assert len(scene.log.recorded) == 1
    await check_recorded(scene, data)


@MUCH
async def test_what_may_be_in_the_log_outlives_its_upload(scene: Scene) -> None:
    _, data = await send_unanswered(scene)
    scene.clock.now += DAY
    assert await scene.sweep() == 1
    await check_recorded(scene, data)
    assert scene.stage.holds() == {scene.log.blob().key}


@MUCH
@pytest.mark.parametrize("swept", [False, True], ids=["ended", "expired"])
async def test_of_an_upload_that_ends_nothing_is_left(scene: Scene, swept: bool) -> None:
    data = some_bytes(3 * scene.part)
    upload = await scene.begin(len(data))
    for start, end in ((0, 10), (10, scene.part + 5), (scene.part + 5, 2 * scene.part + 1)):
        await send(scene.one, upload, data, start, end)
    idle = await scene.begin(7, path="b")
    if swept:
        scene.clock.now += DAY - timedelta(seconds=2)
        assert await scene.sweep() == 0
        scene.clock.now += timedelta(seconds=2)
        assert await scene.sweep() == 2
    else:
        await scene.other.remove(PACKAGE, upload)
        await scene.other.remove(PACKAGE, idle)
    assert scene.stage.holds() == set()
    for gone in (upload, idle):
        with pytest.raises(UploadNotFoundError):
            await scene.one.find(PACKAGE, gone)
    assert await scene.sweep() == 0


async def test_an_upload_that_has_expired_is_gone_before_it_is_swept(scene: Scene) -> None:
    upload = await scene.begin(10)
    scene.clock.now += DAY
    with pytest.raises(UploadNotFoundError):
        await scene.one.append(PACKAGE, upload, 0, body(b"x"))
    assert scene.stage.holds() == set()


async def test_a_repeat_of_the_creation_finds_the_upload_where_it_stands(scene: Scene) -> None:
    key = uuid4()
    upload = await scene.begin(1000, key=key)
    await send(scene.one, upload, some_bytes(1000), 0, 400)
    found = await scene.other.create(new(1000, key=key))
    assert (found.upload_id, found.offset) == (upload, 400)
    with pytest.raises(CommandReusedError):
        await scene.other.create(new(1001, key=key))
    made = await asyncio.gather(*(gateway.create(new(5, path="b", key=upload)) for gateway in (scene.one, scene.other)))
    assert made[0].upload_id == made[1].upload_id


async def test_uploads_of_another_package_are_not_found(scene: Scene) -> None:
    upload = await scene.begin(10)
    with pytest.raises(UploadNotFoundError):
        await scene.one.find(uuid4(), upload)
    with pytest.raises(UploadNotFoundError):
        await scene.one.find(PACKAGE, uuid4())


async def test_a_writer_that_stood_still_takes_no_number_that_was_used_long_ago(scene: Scene) -> None:
    upload = await scene.begin(100)
    states = UploadStates(scene.stage.store)
    old = await states.load(upload)
    assert old is not None
    await states.replace(await states.replace(old, actor="b"), actor="c")
    with pytest.raises(SupersededError):
        await states.replace(old, actor="stale")
    found = await states.load(upload)
    assert found is not None
    assert found.actor == "c"
    await states.remove(found)
    with pytest.raises(SupersededError):
        await states.replace(found, actor="stale")
    assert scene.stage.holds() == set()


async def test_an_object_is_created_once(scene: Scene) -> None:
    key = f"resumable/{uuid4()}/state-00000000"
    stores = [scene.stage.store] * 4
    made = await asyncio.gather(*(store.create_object(key, b"%d" % n) for n, store in enumerate(stores)))
    assert sum(made) == 1
    winner = b"%d" % made.index(True)
    assert await scene.stage.store.get_object(key) == winner
    assert await scene.stage.store.create_object(key, winner), "an attempt whose answer was lost finds its own"


@pytest.mark.slow
async def test_memory_is_bounded_by_two_parts_an_upload(tmp_path: Path) -> None:
    stage = local_stage(tmp_path)
    await stage.store.migrate()
    log, clock = Log(), Clock()
    gateway = ResumableUploads(stage.store, check=log.check, record=log.record, max_file_bytes=1 << 40, clock=clock)
    memory = stage.store.parts.memory
    least = memory.limit
    part = stage.store.parts.part_bytes(1)

    async def watched(data: bytes) -> AsyncIterator[bytes]:
        nonlocal least
        async for chunk in body(data):
            least = min(least, memory.free)
            yield chunk

    data = some_bytes(4 * part)
    uploads = [(await gateway.create(new(len(data), path=str(n)))).upload_id for n in range(3)]
    await asyncio.gather(*(gateway.append(PACKAGE, upload, 0, watched(data)) for upload in uploads))
    assert least >= memory.limit - 2 * 3 * part
    assert memory.free == memory.limit
    assert {log.blob(str(n)).blake3 for n in range(3)} == {blake3(data).digest()}
    await stage.store.close()


async def test_the_release_before_leaves_an_upload_in_another_s_name_alone(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It would record the file without its sender. All other uploads are kept in the form that it reads."""
    own = await scene.begin(10)
    begun = await scene.one.create(replace(new(10, path="b"), principal="ci:bot"))
    assert (begun.sender, (await scene.other.find(PACKAGE, own)).sender) == ("ci:bot", "me")
    monkeypatch.setattr(upload_states, "FORM", upload_states.WITH_PRINCIPAL - 1)
    assert (await scene.other.find(PACKAGE, own)).upload_id == own
    with pytest.raises(NewerStateError):
        await scene.other.find(PACKAGE, begun.upload_id)


async def test_an_upload_that_a_newer_release_continued_is_left_to_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    upload = await scene.begin(10)
    with monkeypatch.context() as newer:
        newer.setattr(upload_states, "FORM", upload_states.FORM + 1)
        states = UploadStates(scene.stage.store)
        state = await states.load(upload)
        assert state is not None
        await states.replace(state, form=upload_states.FORM)
    with pytest.raises(NewerStateError, match="upgrade this gateway"):
        await scene.other.find(PACKAGE, upload)
    scene.clock.now += DAY
    assert await scene.sweep() == 0
    with monkeypatch.context() as newer:
        newer.setattr(upload_states, "FORM", upload_states.FORM + 1)
        assert await scene.sweep() == 1


KEY, OTHER = b"k" * 32, b"o" * 32


def rename(state: UploadState) -> UploadState:
    return state.model_copy(update={"relative_path": "elsewhere"})


def impersonate(state: UploadState) -> UploadState:
    return state.model_copy(update={"actor": "somebody else"})


def lie_about_bytes(state: UploadState) -> UploadState:
    lie = StoredBlob("local", content_key(b"f" * 32), 0, state.length, b"f" * 32, b"f" * 32)
    return state.model_copy(update={"stored": lie, "held": state.length})


@pytest.mark.parametrize("forger", [None, OTHER])
@pytest.mark.parametrize("forged", [rename, impersonate, lie_about_bytes], ids=lambda forged: forged.__name__)
async def test_a_state_that_somebody_else_puts_into_the_bucket_is_no_upload(
    scene: Scene, forged: Callable[[UploadState], UploadState], forger: bytes | None
) -> None:
    """It would make an event name what nobody verified, in the name of whom it likes."""
    store, ours = scene.stage.store, UploadStates(scene.stage.store, KEY)
    one, other = [
        ResumableUploads(
            store, check=scene.log.check, record=scene.log.record, max_file_bytes=1 << 40, clock=scene.clock, key=KEY
        )
        for _ in range(2)
    ]
    upload = (await one.create(new(10))).upload_id
    await send(one, upload, bytes(10), 0, 4)
    state = await ours.load(upload)
    assert state is not None
    await UploadStates(store, forger).replace(forged(state))
    with pytest.raises(UploadNotFoundError):
        await other.find(PACKAGE, upload)
    with pytest.raises(UploadNotFoundError):
        await send(other, upload, bytes(10), 4, 10)
    assert scene.log.recorded == {}

    again = (await one.create(new(10))).upload_id  # what is signed goes on as ever, at any gateway with the key
    await send(one, again, bytes(10), 0, 4)
    await send(other, again, bytes(10), 4, 10)
    await check_recorded(scene, bytes(10))
    for gateway in (one, other):
        await gateway.close()


async def test_a_state_of_another_upload_is_none_although_its_tag_is_ours(scene: Scene) -> None:
    store, ours = scene.stage.store, UploadStates(scene.stage.store, KEY)
    gateway = ResumableUploads(
        store, check=scene.log.check, record=scene.log.record, max_file_bytes=1 << 40, clock=scene.clock, key=KEY
    )
    upload = (await gateway.create(new(10))).upload_id
    (key,) = await store.list_objects(f"resumable/{upload}/")
    moved = uuid4()
    await store.put_object(key.replace(str(upload), str(moved)), await store.get_object(key) or b"")
    assert await ours.load(moved) is None
    assert await ours.load(upload) is not None
    await gateway.close()
