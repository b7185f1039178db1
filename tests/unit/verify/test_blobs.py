"""The oracle and damaged blobs: it names files, keeps what is intact, sets the rest aside, and notices healing."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator, Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.errors import UnavailableError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.port import StoredBlob
from services.verify import Report, verify
from tests.verify_scene import CONTENT, Scene, chained, changed, put_blob, whole_scene

PACK = b"".join(CONTENT.values())
PACK_KEY = content_key(blake3(PACK).digest())


@pytest.fixture
async def scene(tmp_path: Path) -> Scene:
    return await whole_scene(tmp_path)


@pytest.fixture
async def packed(scene: Scene) -> Scene:
    """The three files lie in one pack and nowhere else."""
    offset = 0
    for index, name in enumerate(CONTENT, 1):
        scene.events[index] = changed(scene.events[index], key=PACK_KEY, offset=offset)
        offset += len(CONTENT[name])
        scene.blob(name).unlink()
    scene.events = chained(scene.open)
    scene.append()
    put_blob(scene.folder, PACK_KEY, PACK)
    return scene


async def with_bytes(scene: Scene, blobs: LocalBlobStore) -> Report:
    """Every blob of the scene is read, by this store, which is closed then."""
    views = scene.views()
    await blobs.migrate()
    report = await verify(scene.log, blobs, views, check_bytes=True)
    await views.close()
    await blobs.close()
    return report


async def send(folder: Path, content: bytes) -> None:
    """Store the bytes as an upload would."""
    store = LocalBlobStore(folder / "blobs")
    await store.migrate()

    async def body() -> AsyncIterator[bytes]:
        yield content

    await store.store(body(), declared=Declared(len(content), blake3(content).digest()), max_bytes=len(content))
    await store.close()


async def read(folder: Path, key: str, length: int) -> bytes:
    store = LocalBlobStore(folder / "blobs")
    found = b"".join([chunk async for chunk in store.read(key, 0, length)])
    await store.close()
    return found


def named(report: Report) -> set[tuple[str, str]]:
    """Kind and file of every violation."""
    return {(v.kind, name) for v in report.violations for name in CONTENT if f"{name!r}" in v.detail}


async def test_a_pack_is_read_once_and_hashed_in_every_range(packed: Scene) -> None:
    report = await packed.verify(check_bytes=True)
    assert report.violations == []
    assert (report.blobs, report.files, report.bytes) == (1, 3, len(PACK))


async def test_of_a_damaged_pack_the_good_files_stay_and_the_others_are_named(packed: Scene) -> None:
    put_blob(packed.folder, PACK_KEY, PACK.replace(b"second", b"SECOND"))
    report = await packed.verify(check_bytes=True)
    assert named(report) == {("blob-damaged", "b")}
    assert report.set_aside == {PACK_KEY: f"damaged/{PACK_KEY}"}
    for name in ("a", "c"):
        assert packed.blob(name).read_bytes() == CONTENT[name]
    assert not packed.blob("b").exists()
    for check_bytes in (False, True):
        again = await packed.verify(check_bytes=check_bytes)
        assert named(again) == {("blob-missing", "b")}
        assert (again.violation_count, again.healed, again.set_aside) == (1, 2, {})


@pytest.mark.parametrize("sent", [PACK, CONTENT["b"]], ids=["the pack", "the file alone"])
async def test_a_damaged_pack_heals_when_its_bytes_are_sent_again(packed: Scene, sent: bytes) -> None:
    put_blob(packed.folder, PACK_KEY, PACK.replace(b"second", b"SECOND"))
    await packed.verify(check_bytes=True)
    await send(packed.folder, sent)
    report = await packed.verify(check_bytes=True)
    assert report.violations == []
    assert report.healed == (0 if sent == PACK else 3)


async def test_a_pack_that_is_gone_heals_file_by_file(packed: Scene) -> None:
    (packed.folder / "blobs" / PACK_KEY).unlink()
    assert named(await packed.verify()) == {("blob-missing", name) for name in CONTENT}
    for content in CONTENT.values():
        await send(packed.folder, content)
    assert (await packed.verify(check_bytes=True)).violations == []


async def test_an_upload_under_a_key_of_its_own_heals_at_its_content_address(scene: Scene) -> None:
    key = "uploads/5bd4c3c2-4a0b-4c5c-9d5e-0f9a4f6e2c11"
    scene.events = chained([scene.events[0], changed(scene.events[1], key=key)])
    scene.append()
    put_blob(scene.folder, key, CONTENT["a"])
    scene.blob("a").unlink()
    assert (await scene.verify(check_bytes=True)).clean
    put_blob(scene.folder, key, b"FIRST")
    assert named(await scene.verify(check_bytes=True)) == {("blob-damaged", "a")}
    assert named(await scene.verify(check_bytes=True)) == {("blob-missing", "a")}
    await send(scene.folder, CONTENT["a"])
    report = await scene.verify(check_bytes=True)
    assert report.violations == []
    assert report.healed == 1


async def test_a_copy_at_the_content_address_that_is_damaged_too_does_not_count_and_is_set_aside(scene: Scene) -> None:
    scene.events = chained([scene.events[0], changed(scene.events[1], key="uploads/gone")])
    scene.append()
    scene.blob("a").write_bytes(b"FIRST")
    report = await scene.verify(check_bytes=True)
    assert named(report) == {("blob-missing", "a")}
    assert list(report.set_aside) == [content_key(blake3(CONTENT["a"]).digest())]
    await send(scene.folder, CONTENT["a"])
    assert (await scene.verify(check_bytes=True)).clean


async def test_the_last_good_copy_in_a_damaged_pack_is_kept_where_a_damaged_one_lay(packed: Scene) -> None:
    put_blob(packed.folder, PACK_KEY, PACK.replace(b"second", b"SECOND"))
    put_blob(packed.folder, content_key(blake3(CONTENT["a"]).digest()), b"x" * len(CONTENT["a"]))
    report = await packed.verify(check_bytes=True)
    assert named(report) == {("blob-damaged", "b")}
    assert packed.blob("a").read_bytes() == CONTENT["a"]


@pytest.mark.parametrize("damaged", [b"FIRST", b"fir", b"first and more"])
async def test_a_blob_that_an_upload_replaced_in_the_same_moment_is_put_back(scene: Scene, damaged: bytes) -> None:
    scene.append()
    scene.blob("a").write_bytes(damaged)

    class Racing(LocalBlobStore):
        async def set_aside(self, key: str) -> str | None:
            scene.blob("a").write_bytes(CONTENT["a"])
            return await super().set_aside(key)

    report = await with_bytes(scene, Racing(scene.folder / "blobs"))
    assert report.clean
    assert scene.blob("a").read_bytes() == CONTENT["a"]


async def test_what_a_damaged_pack_gave_back_to_a_key_whose_damaged_blob_is_being_read_stays_there(
    packed: Scene,
) -> None:
    key = content_key(blake3(CONTENT["a"]).digest())
    again = replace(changed(packed.open[1], relative_path="again", key=key, offset=0), command_id=uuid4())
    packed.events = chained([*packed.open, replace(again, created_at=9_000)])
    packed.log.append(packed.events[-1])
    put_blob(packed.folder, PACK_KEY, PACK.replace(b"second", b"SECOND"))
    put_blob(packed.folder, key, b"fir")
    read_damaged, kept = asyncio.Event(), asyncio.Event()

    class Racing(LocalBlobStore):
        async def read(self, read: str, offset: int, length: int) -> AsyncIterator[bytes]:
            async for chunk in super().read(read, offset, length):
                yield chunk
            if read == key:
                read_damaged.set()
                await kept.wait()

        async def store(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> StoredBlob:
            await read_damaged.wait()
            stored = await super().store(body, declared=declared, max_bytes=max_bytes)
            if stored.key == key:
                kept.set()
            return stored

    report = await with_bytes(packed, Racing(packed.folder / "blobs"))
    assert named(report) == {("blob-damaged", "b")}
    assert packed.blob("a").read_bytes() == CONTENT["a"]


async def test_a_blob_that_was_moved_and_could_not_be_looked_at_again_is_named_with_its_place(scene: Scene) -> None:
    scene.append()
    scene.blob("a").write_bytes(b"FIRST")

    class Failing(LocalBlobStore):
        async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
            if key.startswith("damaged/"):
                raise UnavailableError("the disk says no")
            async for chunk in super().read(key, offset, length):
                yield chunk

    report = await with_bytes(scene, Failing(scene.folder / "blobs"))
    key = content_key(blake3(CONTENT["a"]).digest())
    assert report.set_aside == {key: f"damaged/{key}"}
    assert f"set aside as damaged/{key}" in report.violations[0].detail
    assert "the disk says no" in report.violations[0].detail


async def test_good_bytes_that_were_read_wrongly_are_not_lost(scene: Scene) -> None:
    key = "uploads/large"
    put_blob(scene.folder, key, CONTENT["a"])
    scene.blob("a").unlink()
    scene.events = chained([scene.events[0], changed(scene.events[1], key=key)])
    scene.append()

    class Flaky(LocalBlobStore):
        """Gives other bytes the first time."""

        reads = 0

        async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
            self.reads += 1
            async for chunk in super().read(key, offset, length):
                yield chunk if self.reads > 1 else bytes(len(chunk))

    report = await with_bytes(scene, Flaky(scene.folder / "blobs"))
    assert report.violations == []
    assert scene.blob("a").read_bytes() == CONTENT["a"]
    assert (await scene.verify(check_bytes=True)).clean


async def test_a_blob_that_is_cut_short_while_it_is_read_is_named(scene: Scene) -> None:
    scene.append()

    class Shrinking(LocalBlobStore):
        async def size(self, key: str) -> int | None:
            found = await super().size(key)
            # Other blobs are looked at beside it: it must not be short before its own size was asked for.
            if key == content_key(blake3(CONTENT["a"]).digest()):
                scene.blob("a").write_bytes(b"fir")
            return found

    report = await with_bytes(scene, Shrinking(scene.folder / "blobs"))
    assert named(report) == {("blob-damaged", "a")}
    assert report.set_aside == {}


class Unreadable(LocalBlobStore):
    """A store that cannot look at one blob, or read it, or cannot be used at all."""

    down = False
    call = "read"

    def _fail(self, call: str, key: str) -> None:
        if self.down or (call == self.call and key == content_key(blake3(CONTENT["a"]).digest())):
            raise UnavailableError("the disk says no")

    async def size(self, key: str) -> int | None:
        self._fail("size", key)
        return await super().size(key)

    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        self._fail("read", key)
        async for chunk in super().read(key, offset, length):
            yield chunk

    async def check(self) -> None:
        if self.down:
            raise UnavailableError("the store is down")


@pytest.mark.parametrize("call", ["size", "read"])
@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("down", [False, True])
async def test_one_blob_that_cannot_be_read_is_damaged_but_a_store_that_is_down_ends_the_verification(
    scene: Scene, down: bool, elsewhere: bool, call: str
) -> None:
    if elsewhere:  # where readers look next, and so does the oracle
        scene.events = chained([scene.events[0], changed(scene.events[1], key="uploads/gone"), *scene.open[2:]])
    scene.append()
    blobs, views = Unreadable(scene.folder / "blobs"), scene.views()
    blobs.down, blobs.call = down, call
    try:
        if down:
            with pytest.raises(UnavailableError, match="the store is down"):
                await verify(scene.log, blobs, views, check_bytes=True)
        else:
            report = await verify(scene.log, blobs, views, check_bytes=True)
            assert named(report) == {("blob-missing" if elsewhere else "blob-damaged", "a")}
            assert elsewhere or "the disk says no" in report.violations[0].detail
            assert report.blobs == 3
        assert scene.blob("a").exists()
    finally:
        await views.close()
        await blobs.close()


class WithUploads(LocalBlobStore):
    """A store in which large bodies lie under keys of their own."""

    fresh: frozenset[str] = frozenset()

    async def fresh_uploads(self) -> frozenset[str]:
        return self.fresh

    async def remove_uploads(self, *, before: datetime, orphaned: Callable[[str], bool]) -> int:
        assert datetime.now(UTC) - before >= timedelta(days=1)
        return sum(map(orphaned, ("uploads/named", "uploads/orphan")))


@pytest.mark.parametrize("remove", [False, True])
@pytest.mark.parametrize("broken", [False, True])
async def test_bodies_that_no_event_names_are_counted_and_removed_if_all_is_well(
    scene: Scene, remove: bool, broken: bool
) -> None:
    put_blob(scene.folder, "uploads/named", CONTENT["a"])
    scene.events = chained([scene.events[0], changed(scene.events[1], key="uploads/named")])
    if broken:
        scene.events[1] = replace(scene.events[1], event_id=scene.package_id)
    scene.append()
    blobs, views = WithUploads(scene.folder / "blobs"), scene.views()
    report = await verify(scene.log, blobs, views, remove_orphans=remove)
    await views.close()
    await blobs.close()
    assert report.clean is not broken
    assert report.orphans == (0 if broken else 1)
    assert report.removed == (1 if remove and not broken else None)
    assert ("removed" in report.as_json()) is (report.removed is not None)


async def test_a_body_that_was_on_its_way_when_the_log_was_read_is_no_orphan_however_old_it_looks(scene: Scene) -> None:
    scene.append()

    class Completing(WithUploads):
        """A body of a long upload, which is completed, and whose last trace but itself goes, while the log is read."""

        def end(self, _: object) -> None:
            self.fresh = frozenset()

    blobs, views = Completing(scene.folder / "blobs"), scene.views()
    blobs.fresh = frozenset({"uploads/orphan"})
    report = await verify(scene.log, blobs, views, remove_orphans=True, progress=blobs.end)
    await views.close()
    await blobs.close()
    assert blobs.fresh == set()
    assert (report.orphans, report.removed) == (1, 1)  # the other body, which no event names here


async def test_while_an_upload_cannot_be_read_nothing_is_called_an_orphan(
    scene: Scene, caplog: pytest.LogCaptureFixture
) -> None:
    scene.append()
    put_blob(scene.folder, "uploads/5bd4c3c2-4a0b-4c5c-9d5e-0f9a4f6e2c11", b"x")
    state = scene.folder / "blobs" / "resumable" / "5bd4c3c2-4a0b-4c5c-9d5e-0f9a4f6e2c12" / "state-00000000"
    state.parent.mkdir(parents=True)
    state.write_bytes(b"not a state")
    report = await scene.verify()
    assert report.clean
    assert "orphans are not looked for" in caplog.text
