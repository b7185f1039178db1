"""Uploads that break off, or meet another request, at the worst moment: no accepted byte is lost."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest

from artifact_store.errors import CommandReusedError, UnavailableError, UploadBusyError, UploadNotFoundError
from services.blobs.port import PartsKey
from services.blobs.resumable.states import SupersededError, UploadState, UploadStates
from services.blobs.resumable.uploads import HOLD_SECONDS, acknowledgement_of
from tests.contract.blobs_stage import MUCH, STORES, body, some_bytes
from tests.contract.resumable_stage import PACKAGE, CutError, Scene, check_recorded, cut, new, opened_scene, send

DAY = timedelta(days=1, seconds=1)


@pytest.fixture(params=STORES)
async def scene(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Scene]:
    async with opened_scene(request, tmp_path / "blobs") as found:
        yield found


def failing_once(act: Callable[..., Awaitable[Any]]) -> Callable[..., Awaitable[Any]]:
    """The same, but that the store gives no answer the first time."""
    failures = [UnavailableError("the answer was lost")]

    async def acting(*arguments: Any, **named: Any) -> Any:
        if failures:
            raise failures.pop()
        return await act(*arguments, **named)

    return acting


def unseen_once(patched: pytest.MonkeyPatch) -> None:
    """Who looks for an upload finds none the first time: it was begun a moment later."""
    looks: list[UploadState | None] = [None]
    load = UploadStates.load

    async def look(states: UploadStates, upload_id: UUID) -> UploadState | None:
        return looks.pop() if looks else await load(states, upload_id)

    patched.setattr(UploadStates, "load", look)


@MUCH
@pytest.mark.parametrize("ended", ["removed", "expired"])
@pytest.mark.parametrize("again", ["same", "other"])
async def test_a_key_that_is_used_again_harms_nothing_that_it_recorded(scene: Scene, ended: str, again: str) -> None:
    data, key = some_bytes(scene.part + 1), uuid4()
    upload = await scene.begin(len(data), key=key)
    await send(scene.one, upload, data, 0, len(data))
    first = acknowledgement_of(await scene.one.find(PACKAGE, upload))
    if ended == "removed":
        await scene.one.remove(PACKAGE, upload)
    else:
        scene.clock.now += DAY
        assert await scene.sweep() == 1

    upload = await scene.begin(len(data), key=key)
    await send(scene.other, upload, data, 0, 10)
    await scene.other.remove(PACKAGE, upload)
    await check_recorded(scene, data)

    upload = await scene.begin(len(data), key=key)
    if again == "same":
        assert acknowledgement_of(await send(scene.one, upload, data, 0, len(data))) == first
    else:

        async def refused(*_: object) -> None:
            raise CommandReusedError("the command id was used for another file")

        scene.one._record = refused  # type: ignore[assignment]  # the writer compares digests; the log of the stage does not
        with pytest.raises(CommandReusedError):
            await scene.one.append(PACKAGE, upload, 0, body(some_bytes(len(data), 1)))
    await check_recorded(scene, data)


@MUCH
async def test_who_begins_an_upload_that_another_has_begun_already_takes_nothing_from_it(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, key = some_bytes(2 * scene.part), uuid4()
    upload = await scene.begin(len(data), key=key)
    await send(scene.one, upload, data, 0, scene.part + 10)
    unseen_once(monkeypatch)
    found = await scene.other.create(new(len(data), key=key))
    assert (found.upload_id, found.offset) == (upload, scene.part + 10)
    await send(scene.other, upload, data, scene.part + 10, len(data))
    await check_recorded(scene, data)


@MUCH
async def test_a_creation_whose_outcome_is_unknown_can_be_repeated(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, key = some_bytes(scene.part + 1), uuid4()
    with monkeypatch.context() as patched:
        patched.setattr(scene.stage.store, "list_objects", failing_once(scene.stage.store.list_objects))
        unseen_once(patched)
        with pytest.raises(UnavailableError):
            await scene.begin(len(data), key=key)
    await scene.one.close()
    upload = await scene.begin(len(data), key=key)
    await send(scene.other, upload, data, 0, len(data))
    await check_recorded(scene, data)
    scene.clock.now += DAY
    await scene.sweep()
    assert scene.stage.holds() == {scene.log.blob().key}


@MUCH
async def test_a_removal_that_was_cut_off_is_finished_by_who_comes_next(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(scene.part + 1)
    keys = [uuid4(), uuid4()]
    for key in keys:
        upload = await scene.begin(len(data), path=str(key), key=key)
        await send(scene.one, upload, data, 0, 100)
        with monkeypatch.context() as patched:
            patched.setattr(scene.stage.store.parts, "discard", failing_once(scene.stage.store.parts.discard))
            with pytest.raises(UnavailableError):
                await scene.one.remove(PACKAGE, upload)
        with pytest.raises(UploadNotFoundError):
            await scene.other.find(PACKAGE, upload)
    assert await scene.sweep() == 2, "nobody has to wait for a day"
    assert scene.stage.holds() == set()

    upload = await scene.begin(len(data), key=keys[0])
    with monkeypatch.context() as patched:
        patched.setattr(scene.stage.store.parts, "discard", failing_once(scene.stage.store.parts.discard))
        with pytest.raises(UnavailableError):
            await scene.one.remove(PACKAGE, upload)
    with pytest.raises(UploadBusyError):
        await scene.begin(len(data), key=keys[0])
    upload = await scene.begin(len(data), key=keys[0])
    await send(scene.one, upload, data, 0, len(data))
    await check_recorded(scene, data)


async def test_who_removes_late_leaves_the_next_upload_of_the_key_alone(scene: Scene) -> None:
    data, key = some_bytes(1000), uuid4()
    upload = await scene.begin(1000, key=key)
    states = UploadStates(scene.stage.store)
    old = await states.load(upload)
    assert old is not None
    gone = await states.replace(old, gone=True)
    await scene.sweep()
    assert await scene.begin(1000, key=key) == upload
    await send(scene.one, upload, data, 0, 400)
    await states.remove(gone)
    await send(scene.other, upload, data, 400, 1000)
    await check_recorded(scene, data)


@pytest.mark.parametrize("begun", [0, 1, 2], ids=lambda begun: f"{begun}-requests")
async def test_a_request_that_outlives_its_upload_adds_nothing_to_the_next_one_of_the_key(
    scene: Scene, begun: int
) -> None:
    old, data, key = some_bytes(1000), some_bytes(1000, 1), uuid4()
    upload = await scene.begin(1000, key=key)
    stalled, over = asyncio.Event(), asyncio.Event()

    async def stalling() -> AsyncIterator[bytes]:
        yield old[:700]
        stalled.set()
        await over.wait()
        raise CutError

    late = asyncio.create_task(scene.one.append(PACKAGE, upload, 0, stalling()))
    await stalled.wait()
    scene.clock.now += timedelta(seconds=HOLD_SECONDS + 1)
    await scene.other.remove(PACKAGE, upload)
    assert (await scene.other.create(new(1000, key=key))).upload_id == upload
    for at in range(begun):
        await send(scene.other, upload, data, at * 100, (at + 1) * 100)
    over.set()
    with pytest.raises((CutError, UploadBusyError)):
        await late
    assert (await scene.other.find(PACKAGE, upload)).offset == begun * 100
    await send(scene.other, upload, data, begun * 100, 1000)
    await check_recorded(scene, data)


async def test_a_late_change_of_a_removed_upload_is_none_of_the_next_one_of_the_key(scene: Scene) -> None:
    key = uuid4()
    upload = await scene.begin(1000, key=key)
    states = UploadStates(scene.stage.store)

    async def changed() -> UploadState:
        state = await states.load(upload)
        assert state is not None
        return await states.replace(state, actor="me")

    old = await changed()
    await states.remove(old)
    await scene.begin(1000, key=key)
    current = await changed()  # after as many changes as the one that was removed had
    with pytest.raises(SupersededError):
        await states.replace(old, actor="late")
    assert await states.load(upload) == current


@pytest.mark.parametrize("sent", [0, 400])
async def test_who_finishes_an_upload_late_leaves_the_next_one_of_the_key_alone(scene: Scene, sent: int) -> None:
    data, key = some_bytes(1000), uuid4()
    upload = await scene.begin(1000, key=key)
    scene.log.failures.append(UnavailableError("the log does not answer"))
    with pytest.raises(UnavailableError):
        await send(scene.one, upload, some_bytes(1000, 1), 0, 1000)
    complete = await UploadStates(scene.stage.store).load(upload)
    assert complete is not None
    scene.log.recorded.clear()
    await scene.other.remove(PACKAGE, upload)
    await scene.begin(1000, key=key)
    if sent:
        await send(scene.other, upload, data, 0, sent)
    with pytest.raises(UploadNotFoundError):
        await scene.one.finished(complete)
    assert (await scene.other.find(PACKAGE, upload)).offset == sent
    await send(scene.one, upload, data, sent, 1000)
    await check_recorded(scene, data)


@MUCH
async def test_bytes_that_were_removed_as_nobodys_are_not_acknowledged(scene: Scene) -> None:
    data = some_bytes(scene.part + 1)
    upload = await scene.begin(len(data))
    scene.log.failures.append(UnavailableError("the log does not answer"))
    with pytest.raises(UnavailableError):
        await send(scene.one, upload, data, 0, len(data))
    state = await UploadStates(scene.stage.store).load(upload)
    assert state is not None
    assert state.stored is not None
    own = scene.stage.store.parts.blob_key(state.where)
    assert await UploadStates(scene.stage.store).blob_keys() == (frozenset() if own is None else {own})
    await scene.stage.store.set_aside(state.stored.key)
    before = len(scene.log.recorded)
    with pytest.raises(UploadNotFoundError, match="begin a new one"):
        await scene.other.find(PACKAGE, upload)
    assert len(scene.log.recorded) == before
    with pytest.raises(UploadNotFoundError):
        await scene.one.find(PACKAGE, upload)


@MUCH
@pytest.mark.parametrize("complete", [False, True], ids=["half-way", "complete"])
async def test_an_upload_whose_parts_the_store_has_removed_is_begun_anew(
    scene: Scene, monkeypatch: pytest.MonkeyPatch, complete: bool
) -> None:
    data, key = some_bytes(3 * scene.part), uuid4()
    upload = await scene.begin(len(data), key=key)
    parts = scene.stage.store.parts
    at = len(data) if complete else scene.part + 10
    with monkeypatch.context() as patched, contextlib.suppress(UnavailableError):
        patched.setattr(parts, "assemble", failing_once(parts.assemble))
        await send(scene.one, upload, data, 0, at)
    state = await UploadStates(scene.stage.store).load(upload)
    assert state is not None
    assert state.offset == at
    await parts.discard(state.where, blob=True)
    with pytest.raises(UploadNotFoundError, match="begin a new one"):
        await (scene.other.find(PACKAGE, upload) if complete else send(scene.other, upload, data, at, len(data)))
    with pytest.raises(UploadNotFoundError):
        await scene.one.find(PACKAGE, upload)

    assert (await scene.one.create(new(len(data), key=key))).offset == 0
    await send(scene.one, upload, data, 0, len(data))
    await check_recorded(scene, data)


@MUCH
async def test_a_request_that_is_cut_off_while_a_part_is_on_its_way_says_why_and_keeps_the_part(
    scene: Scene, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = some_bytes(3 * scene.part)
    upload = await scene.begin(len(data))
    parts, numbers = scene.stage.store.parts, []
    putting, stored = asyncio.Event(), asyncio.Event()
    put = parts.put

    async def slow(where: PartsKey, number: int, part: Any) -> str:
        numbers.append(number)
        putting.set()
        await stored.wait()
        return await put(where, number, part)

    with monkeypatch.context() as patched:
        patched.setattr(parts, "put", slow)
        running = asyncio.create_task(scene.one.append(PACKAGE, upload, 0, cut(data[: 2 * scene.part])))
        await putting.wait()
        running.cancel()
        stored.set()
        with pytest.raises((asyncio.CancelledError, CutError)):
            await running
        await scene.one.close()  # what came is stored beside the one that was cut off
    at = (await scene.other.find(PACKAGE, upload)).offset
    assert at >= scene.part
    await send(scene.other, upload, data, at, len(data))
    assert len(set(numbers)) == len(numbers)
    await check_recorded(scene, data)
