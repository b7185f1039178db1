"""The local store's own duties: durability in the right order, and a failing file system."""

from __future__ import annotations

import asyncio
import errno
import os
import threading
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.resumable.states import UploadStates


async def hello() -> AsyncIterator[bytes]:
    yield b"hello"


@pytest.fixture
def synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What was made durable, in this order, as paths below `tmp_path`."""
    found: list[str] = []
    sync = os.fsync

    def watched(file: int) -> None:
        path = Path(f"/proc/self/fd/{file}").readlink()
        if path.is_relative_to(tmp_path):
            found.append(path.relative_to(tmp_path).as_posix())
        sync(file)

    monkeypatch.setattr(os, "fsync", watched)
    return found


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalBlobStore]:
    found = LocalBlobStore(tmp_path / "blobs")
    await found.migrate()
    yield found
    await found.close()


async def test_a_blob_and_every_folder_above_it_are_synced_before_it_counts_as_stored(
    store: LocalBlobStore, synced: list[str]
) -> None:
    synced.clear()
    blob = await store.store(hello(), declared=Declared(), max_bytes=10)
    key = Path("blobs") / blob.key
    assert synced[0].startswith("blobs/incoming/")
    assert synced[1:] == [str(folder) for folder in (*list(reversed(key.parents))[1:-1], key.parent)]
    synced.clear()
    await store.store(hello(), declared=Declared(), max_bytes=10)
    assert synced[1:] == [str(key.parent)]  # the writer that came first may not have synced it yet


async def test_a_blob_that_another_process_left_unsynced_is_synced_before_it_counts_as_stored_again(
    store: LocalBlobStore, tmp_path: Path, synced: list[str]
) -> None:
    blob = await store.store(hello(), declared=Declared(), max_bytes=10)
    key = Path("blobs") / blob.key
    synced.clear()
    later = LocalBlobStore(tmp_path / "blobs")
    declared = Declared(size_bytes=5, blake3=blob.blake3)
    assert await later.store(hello(), declared=declared, max_bytes=10) == blob
    await later.close()
    assert synced == [str(folder) for folder in (*list(reversed(key.parents))[1:-1], key.parent)]


async def test_a_folder_of_blobs_that_is_made_is_found_after_a_power_cut(tmp_path: Path, synced: list[str]) -> None:
    store = LocalBlobStore(tmp_path / "data" / "blobs")
    await store.migrate()
    await store.close()
    assert {".", "data", "data/blobs"} <= set(synced)


async def test_the_folder_of_a_named_object_is_made_durable_and_again_once_it_was_removed(
    store: LocalBlobStore, tmp_path: Path, synced: list[str]
) -> None:
    key = "resumable/2a0a7f2e-3b57-4a3c-8f55-0d1f3c2f5a11/state-00000000"
    folder = Path("blobs") / Path(key).parent
    for _ in range(2):
        synced.clear()
        assert await store.create_object(key, b"a state")
        assert synced[0].startswith("blobs/incoming/")
        assert synced[1:] in (["blobs", "blobs/resumable", str(folder)], ["blobs/resumable", str(folder)])
        await store.delete_object(key)
        assert not (tmp_path / folder).exists()
    await store.put_object(key, b"a state")
    other = LocalBlobStore(tmp_path / "blobs")  # as of another process, which this one does not hear of
    await other.delete_object(key)
    await other.close()
    await store.put_object(key, b"a state")
    assert await store.get_object(key) == b"a state"


async def test_a_reader_that_is_cancelled_while_it_opens_a_blob_leaves_no_open_file(
    store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = await store.store(hello(), declared=Declared(), max_bytes=10)
    opening, go_on = asyncio.Event(), threading.Event()
    loop, files, really = asyncio.get_running_loop(), list[int](), os.open

    def slow(*args: Any) -> int:
        loop.call_soon_threadsafe(opening.set)
        assert go_on.wait(30)
        files.append(really(*args))
        return files[-1]

    async def read() -> None:
        async for _ in store.read(blob.key, 0, blob.length):
            pass

    monkeypatch.setattr(os, "open", slow)
    reading = asyncio.create_task(read())
    await opening.wait()
    for _ in range(2):  # the second time as when a program is ended with force
        reading.cancel()
        await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await reading
    (file,) = files
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(file)


@pytest.mark.parametrize("call", ["write", "fsync"])
async def test_a_disk_that_is_full_is_unavailable_and_nothing_is_left(
    store: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(UnavailableError, match="No space left"):
            await store.store(hello(), declared=Declared(), max_bytes=10)
        with pytest.raises(UnavailableError, match="No space left"):
            await store.check()
    assert not [path for path in (tmp_path / "blobs").rglob("*") if path.is_file()]
    await store.store(hello(), declared=Declared(), max_bytes=10)


async def test_readiness_writes_only_while_no_write_has_shown_that_the_folder_takes_any(
    store: LocalBlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    written, fsync = [], os.fsync

    def counted(file: int) -> None:
        written.append(file)
        fsync(file)

    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", counted)
    for _ in range(3):
        await store.check()
    assert len(written) == 1
    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(UnavailableError, match="No space left"):
            await store.store(hello(), declared=Declared(), max_bytes=10)
        with pytest.raises(UnavailableError, match="No space left"):
            await store.check()
    await store.check()
    await store.check()
    assert len(written) == 2


async def test_a_folder_that_is_missing_is_named_with_what_makes_it(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path / "absent")
    with pytest.raises(UnavailableError, match="artifact-store migrate"):
        await store.check()
    with pytest.raises(UnavailableError, match="artifact-store migrate"):
        await store.sweep(now=datetime.now(UTC))
    await store.close()


async def test_a_key_that_no_file_can_have_names_no_blob(store: LocalBlobStore) -> None:
    assert await store.size("k" * 300) is None
    with pytest.raises(CorruptError, match="missing"):
        await anext(store.read("k" * 300, 0, 1))


async def test_named_objects_are_listed_while_the_folder_of_others_is_removed(
    store: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"resumable/{uuid4()}/state-00000000" for _ in range(3)]
    for key in keys:
        await store.create_object(key, b"a state")
    going = (tmp_path / "blobs" / keys[1]).parent
    really = os.scandir

    def scan(path: Any) -> Any:
        if str(path) == str(going):
            Path(going, "state-00000000").unlink()
            going.rmdir()
        return really(path)

    monkeypatch.setattr(os, "scandir", scan)
    assert await store.list_objects("resumable/") == sorted([keys[0], keys[2]])
    assert not going.exists()


async def test_files_that_are_nobody_s_upload_hinder_neither_the_sweep_nor_the_oracle(
    store: LocalBlobStore, tmp_path: Path
) -> None:
    strays = [".DS_Store", "notes/read me.txt", f"{uuid4()}/state-of-things"]
    for stray in strays:
        path = tmp_path / "blobs" / "resumable" / stray
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert await UploadStates(store).blob_keys() == frozenset()
    assert await store.sweep(now=datetime.now(UTC)) == 0
    assert (tmp_path / "blobs" / "resumable" / ".DS_Store").exists()


async def test_the_store_s_time_is_that_of_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalBlobStore(tmp_path)
    await store.migrate()
    real = time.time()
    monkeypatch.setattr(time, "time", lambda: real + 86_400)
    assert abs((await store.now()).timestamp() - real) < 60
    assert list((tmp_path / "incoming").iterdir()) == []
    assert store.clock.ahead() is None, "files have no clock of their own"
    await store.close()


async def test_who_can_write_no_file_has_the_system_s_time(tmp_path: Path) -> None:
    store = LocalBlobStore(tmp_path / "missing")
    assert abs((await store.now()).timestamp() - time.time()) < 60
    await store.close()
