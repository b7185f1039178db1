"""A spool keeps added files across crashes and failures, sends them with their old ids, and refuses damage."""

from __future__ import annotations

import asyncio
import errno
import json
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from uuid import uuid4

import pytest

from artifact_store import Client, RetryPolicy
from artifact_store.client import spool as spool_module
from artifact_store.client.spool import Spool
from artifact_store.client.stream import FILE_BYTES, AddedFile
from artifact_store.errors import (
    ConfigurationError,
    CorruptError,
    DuplicateRelativePathError,
    PushBackError,
    UnavailableError,
)
from tests.unit.artifact_store.client.failing_gateway import PACKAGE, client_of, cuts, failing_gateway
from tests.unit.artifact_store.client.recording_gateway import Recorder

SEGMENT_BYTES = 128 << 10
HASTY = RetryPolicy(total_seconds=0.05, first_pause_seconds=0.001, longest_pause_seconds=0.01)


def content(number: int) -> bytes:
    return b"%04d," % number * 1_000


def expected(numbers: Iterable[int]) -> dict[str, bytes]:
    return {f"{number:04}": content(number) for number in numbers}


async def add(registry: Client, folder: Path, numbers: Iterable[int]) -> None:
    """Add files to the spool in groups, and wait until all that is in it was sent."""
    async with registry.stream(PACKAGE, spool=folder) as files:
        await asyncio.gather(*(files.add(f"{number:04}", content(number)) for number in numbers))


async def leave(folder: Path, numbers: Iterable[int]) -> None:
    """A producer that never reaches its gateway."""
    with suppress(UnavailableError):
        async with failing_gateway(cuts) as gateway, client_of(gateway, HASTY) as registry:
            await add(registry, folder, numbers)


async def open_spool(folder: Path, segment_bytes: int = SEGMENT_BYTES) -> Spool:
    spool = Spool(folder, PACKAGE, segment_bytes)
    await spool.open()
    return spool


async def put(spool: Spool, numbers: Iterable[int]) -> None:
    """Add files in groups, as fast as the disk takes them."""
    await asyncio.gather(*(spool.put(AddedFile(f"{number:04}", None, content(number))) for number in numbers))


def crashed(folder: Path, copy: Path) -> Path:
    """What another process would find, had this one died now."""
    return shutil.copytree(folder, copy)


async def test_what_a_producer_left_is_sent_by_the_next_one(tmp_path: Path) -> None:
    recorder = Recorder()
    await leave(tmp_path / "spool", range(20))
    async with failing_gateway(recorder.records) as gateway, client_of(gateway) as registry:
        await add(registry, tmp_path / "spool", range(20, 30))
    assert recorder.files == expected(range(30))
    assert [path.name for path in (tmp_path / "spool").iterdir()] == ["lock"]


async def test_files_that_were_sent_before_a_crash_are_sent_under_the_same_ids(tmp_path: Path) -> None:
    recorder, folder = Recorder(), tmp_path / "spool"
    async with failing_gateway(recorder.loses_answers) as gateway, client_of(gateway, HASTY) as registry:
        with pytest.raises(UnavailableError):
            await add(registry, folder, range(20))
        before = set(gateway.sent("Idempotency-Key"))
    async with failing_gateway(recorder.records) as gateway, client_of(gateway) as registry:
        await add(registry, folder, ())
        assert set(gateway.sent("Idempotency-Key")) == before
    assert recorder.files == expected(range(20))
    assert not (folder / "refused").exists()


async def test_a_stream_with_a_spool_outlives_a_gateway_that_is_away(tmp_path: Path) -> None:
    recorder = Recorder()
    async with (
        failing_gateway(cuts) as gateway,
        client_of(gateway, HASTY) as registry,
        registry.stream(PACKAGE, spool=tmp_path) as files,
    ):
        added = await files.add("a", b"a")
        with pytest.raises(UnavailableError):
            await files.flush()
        gateway.script[:] = [recorder.records]
        assert (await added).relative_path == "a"
    assert recorder.files == {"a": b"a"}


async def test_a_file_is_on_disk_when_it_was_added(tmp_path: Path) -> None:
    recorder = Recorder()
    async with failing_gateway(cuts) as gateway, client_of(gateway) as registry:
        with suppress(ZeroDivisionError):
            async with registry.stream(PACKAGE, spool=tmp_path / "spool") as files:
                await files.add("a", b"a", "text/x-log")
                copy = crashed(tmp_path / "spool", tmp_path / "copy")
                raise ZeroDivisionError
        gateway.script[:] = [recorder.records]
        await add(registry, copy, ())
    assert recorder.files == {"a": b"a"}
    assert recorder.media_types == {"a": "text/x-log"}


async def test_an_add_that_is_cancelled_may_be_sent_and_holds_up_nobody(tmp_path: Path) -> None:
    recorder = Recorder()
    async with (
        failing_gateway(recorder.records) as gateway,
        client_of(gateway) as registry,
        registry.stream(PACKAGE, spool=tmp_path) as files,
    ):
        adding = asyncio.create_task(files.add("a", b"a"))
        await asyncio.sleep(0)
        adding.cancel()
        await asyncio.wait_for(recorder.recorded.wait(), 10)
        await files.add("b", b"b")
    assert recorder.files == {"a": b"a", "b": b"b"}
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_a_crash_at_any_byte_loses_no_confirmed_file_and_adds_none(tmp_path: Path) -> None:
    spool = await open_spool(tmp_path / "spool")
    await put(spool, range(3))
    (segment,) = (tmp_path / "spool").glob("*.segment")
    confirmed = len(segment.read_bytes().rstrip(b"\0"))
    await put(spool, [3])
    batch = await spool.take()
    whole = segment.read_bytes()
    await spool.close()
    end = len(whole.rstrip(b"\0"))
    for cut in (*range(confirmed, end - 60, 211), *range(end - 60, end + 3, 3)):
        folder = tmp_path / f"{cut}"
        folder.mkdir()
        (folder / segment.name).write_bytes(whole[:cut] + bytes(len(whole) - cut))
        found = await open_spool(folder)
        again = await found.take()
        await put(found, [9])
        last = await found.take() if found.files else again
        assert expected(range(3)).items() <= {file.relative_path: file.data for file in again.files}.items()
        assert {file.relative_path for file in (*again.files, *last.files)} <= {*expected(range(4)), "0009"}
        assert again == batch or again.command_id != batch.command_id
        await found.close()


async def test_many_segments_are_sent_in_order_and_removed(tmp_path: Path) -> None:
    spool = await open_spool(tmp_path)
    await put(spool, range(200))
    assert len(list(tmp_path.glob("*.segment"))) > 3
    await spool.close()
    spool = await open_spool(tmp_path)
    assert spool.held_bytes == sum(len(content(number)) + FILE_BYTES for number in range(200))
    found: list[str] = []
    while spool.files:
        batch = await spool.take()
        found += [file.relative_path for file in batch.files]
        await put(spool, range(200 + batch.number, 201 + batch.number) if len(found) < 200 else ())
        await spool.settle(batch, [])
    assert found[:200] == [f"{number:04}" for number in range(200)]
    assert len(list(tmp_path.glob("*.segment"))) == 1
    await spool.close()
    assert [path.name for path in tmp_path.iterdir()] == ["lock"]


async def test_segments_come_and_go_while_files_are_added_and_settled(tmp_path: Path) -> None:
    count, settled = 40, 0
    spool = await open_spool(tmp_path, segment_bytes=80 << 10)

    async def add_one_by_one() -> None:
        for number in range(count):
            await put(spool, [number])

    adding = asyncio.create_task(add_one_by_one())
    while settled < count:
        await spool.arrived.wait()
        batch = await spool.take()
        assert {file.relative_path: file.data for file in batch.files} == expected(
            range(settled, settled + len(batch.files))
        )
        await spool.settle(batch, [])
        settled += len(batch.files)
    await adding
    assert len(list(tmp_path.glob("*.segment"))) == 1
    await spool.close()


async def test_settled_files_are_not_sent_after_a_crash(tmp_path: Path) -> None:
    spool = await open_spool(tmp_path / "spool")
    await put(spool, range(3))
    first = await spool.take()
    await put(spool, range(3, 6))
    second = await spool.take()
    await put(spool, range(6, 200))
    await spool.settle(first, [])
    await put(spool, [200])  # the mark is written with the next record at the latest
    found = await open_spool(crashed(tmp_path / "spool", tmp_path / "copy"))
    assert await found.take() == second
    await found.close()
    await spool.close()


async def test_damage_stops_a_spool_and_names_the_place(tmp_path: Path) -> None:
    spool = await open_spool(tmp_path)
    await put(spool, range(100))
    await spool.close()
    first, *_ = sorted(tmp_path.glob("*.segment"))
    data = bytearray(first.read_bytes())
    data[10_000] ^= 1
    first.write_bytes(data)
    with pytest.raises(CorruptError, match=r"000000000000\.segment is damaged at byte \d"):
        await open_spool(tmp_path)
    first.unlink()
    (tmp_path / "000000000001.segment").rename(tmp_path / "000000000009.segment")
    with pytest.raises(CorruptError, match="begins with file"):
        await open_spool(tmp_path)


async def test_one_process_and_one_package_have_a_spool(tmp_path: Path) -> None:
    spool = await open_spool(tmp_path)
    with pytest.raises(ConfigurationError, match="another process"):
        await open_spool(tmp_path)
    await put(spool, range(2))
    await spool.close()
    with pytest.raises(ConfigurationError, match=f"holds 2 files of package {PACKAGE}"):
        await Spool(tmp_path, uuid4()).open()
    spool = await open_spool(tmp_path)
    await spool.settle(await spool.take(), [])
    await spool.close()
    other = Spool(tmp_path, uuid4())
    assert await other.open() == 0
    await other.close()


async def test_a_folder_that_cannot_be_one_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(ConfigurationError, match="cannot be used"):
        await open_spool(tmp_path / "file")


async def test_a_full_disk_refuses_files_and_stops_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int, size: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    spool = await open_spool(tmp_path)
    await put(spool, range(3))
    with monkeypatch.context() as patched:
        patched.setattr(spool_module, "_allocate", full)
        with pytest.raises(PushBackError, match="full"):
            await put(spool, range(3, 500))
        batch = await spool.take()
        await spool.settle(batch, [])
    await put(spool, [900])
    while spool.files:
        batch = await spool.take()
        await spool.settle(batch, [])
    assert batch.files[-1].relative_path == "0900"
    await spool.close()


async def test_a_write_that_fails_ends_the_spool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    spool = await open_spool(tmp_path)
    await put(spool, range(3))
    with monkeypatch.context() as patched:
        patched.setattr(spool_module, "_sync", broken)
        with pytest.raises(UnavailableError, match="Input/output error"):
            await put(spool, [3])
    with pytest.raises(UnavailableError, match="Input/output error"):
        await put(spool, [3])  # nobody knows what is on disk
    await spool.close()
    spool = await open_spool(tmp_path)
    assert expected(range(3)).keys() <= {file.relative_path for file in (await spool.take()).files}
    await spool.close()


async def test_refused_files_are_kept_where_people_find_them(tmp_path: Path) -> None:
    recorder = Recorder(files={"0003": b"before"})
    async with failing_gateway(recorder.records) as gateway, client_of(gateway) as registry:
        with pytest.raises(DuplicateRelativePathError):
            await add(registry, tmp_path, range(10))
    (about,) = (tmp_path / "refused").glob("*.json")
    said = json.loads(about.read_text())
    assert (said["relative_path"], said["problem"]) == ("0003", "duplicate-relative-path")
    assert about.with_suffix(".data").read_bytes() == content(3)
    assert len(recorder.files) == 10


async def test_adding_waits_while_the_spool_is_full(tmp_path: Path) -> None:
    recorder, go = Recorder(), asyncio.Event()
    async with (
        failing_gateway(recorder.held(go)) as gateway,
        client_of(gateway) as registry,
        registry.stream(PACKAGE, spool=tmp_path, max_bytes=10 * (FILE_BYTES + 100)) as files,
    ):
        for number in range(10):
            await files.add(f"{number}", bytes(100))
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(files.add("more", bytes(100)), 0.1)
        go.set()
        await files.add("more", bytes(100))
    assert len(recorder.files) == 11
