"""Small bodies that arrive at the same time share an object, but are otherwise independent."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from artifact_store.byte_streams import joined
from artifact_store.errors import ContentMismatchError, PushBackError, UnavailableError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.packs import SALT_BYTES, SharedPacks, is_small
from services.blobs.port import Digests, StoredBlob

CLASS = "scratch"
MIB = 1 << 20


class HeldStore(LocalBlobStore):
    """Stores nothing while it is held, and can be told to fail."""

    def __init__(self, root: Path) -> None:
        super().__init__(root)
        self.packs: list[bytes] = []
        """What was asked to be stored, in order."""
        self.failure: Exception | None = None
        self._free = asyncio.Event()
        self._free.set()
        self._asked = asyncio.Condition()

    @contextmanager
    def held(self) -> Iterator[None]:
        self._free.clear()
        try:
            yield
        finally:
            self._free.set()

    async def asked(self, count: int) -> None:
        """Wait until so many packs were to be stored."""
        async with self._asked:
            await self._asked.wait_for(lambda: len(self.packs) >= count)

    async def store_bytes(self, data: bytes, digests: Digests) -> StoredBlob:
        async with self._asked:
            self.packs.append(data)
            self._asked.notify_all()
        await self._free.wait()
        if self.failure is not None:
            raise self.failure
        return await super().store_bytes(data, digests)


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[HeldStore]:
    found = HeldStore(tmp_path / "blobs")
    await found.migrate()
    yield found
    await found.close()


async def pieces(*data: bytes) -> AsyncIterator[bytes]:
    for piece in data:
        yield piece


class Slow:
    """A body whose end does not come before it is let go."""

    def __init__(self, data: bytes) -> None:
        self.begun = asyncio.Event()
        self.go = asyncio.Event()
        self._data = data

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield self._data[:1]
        self.begun.set()
        await self.go.wait()
        yield self._data[1:]


def put(
    packs: SharedPacks, data: bytes, *, kept_as: str = CLASS, said: Declared | None = None
) -> asyncio.Task[StoredBlob]:
    declared = said or Declared(len(data))
    return asyncio.create_task(packs.store(pieces(data), declared=declared, max_bytes=MIB, retention_class=kept_as))


async def got(store: LocalBlobStore, blob: StoredBlob) -> bytes:
    return await joined(store.read(blob.key, blob.offset, blob.length))


def without_salt(pack: bytes) -> bytes:
    """The bodies of a pack of several."""
    return pack[:-SALT_BYTES]


def bodies(count: int) -> list[bytes]:
    return [b"body %d " % number * (number + 1) for number in range(count)]


async def test_one_that_comes_alone_is_stored_at_once_at_its_own_address(store: HeldStore) -> None:
    packs = SharedPacks(store)
    blob = await put(packs, b"alone")
    digest = blake3(b"alone").digest()
    assert blob == StoredBlob("local", content_key(digest), 0, 5, digest, hashlib.sha256(b"alone").digest())


async def test_those_that_come_together_share_an_object_from_the_first(store: HeldStore) -> None:
    packs = SharedPacks(store)
    many = bodies(64)
    blobs = await asyncio.gather(*(put(packs, data) for data in many))
    (pack,) = store.packs
    assert without_salt(pack) == b"".join(many)
    assert {blob.key for blob in blobs} == {content_key(blake3(pack).digest())}
    for data, blob in zip(many, blobs, strict=True):
        assert await got(store, blob) == data
        assert (blob.blake3, blob.sha256) == (blake3(data).digest(), hashlib.sha256(data).digest())


async def test_the_address_of_an_object_does_not_tell_what_others_sent(store: HeldStore) -> None:
    packs = SharedPacks(store)
    _, mine = await asyncio.gather(put(packs, b"pin=4711"), put(packs, b"mine"))
    assert mine.offset == len(b"pin=4711")
    assert mine.key != content_key(blake3(b"pin=4711mine").digest())
    _, again = await asyncio.gather(put(packs, b"pin=4711"), put(packs, b"mine"))
    assert again.key != mine.key


async def test_those_that_come_while_others_are_stored_gather(store: HeldStore) -> None:
    packs = SharedPacks(store, at_once=1)
    with store.held():
        first = put(packs, b"first")
        await store.asked(1)
        later = [put(packs, data) for data in bodies(10)]
        await asyncio.sleep(0)
    await asyncio.gather(first, *later)
    first_pack, second_pack = store.packs
    assert (first_pack, without_salt(second_pack)) == (b"first", b"".join(bodies(10)))


async def test_equal_bytes_lie_in_a_pack_once(store: HeldStore) -> None:
    packs = SharedPacks(store)
    blobs = await asyncio.gather(*(put(packs, data) for data in (b"same", b"other", b"same", b"", b"same")))
    assert [without_salt(pack) for pack in store.packs] == [b"sameother"]
    assert blobs[0] == blobs[2] == blobs[4]
    assert [await got(store, blob) for blob in blobs] == [b"same", b"other", b"same", b"", b"same"]


async def test_equal_bytes_alone_are_stored_once_at_their_own_address(store: HeldStore) -> None:
    packs = SharedPacks(store)
    blobs = await asyncio.gather(*(put(packs, b"same") for _ in range(8)))
    assert {blob.key for blob in blobs} == {content_key(blake3(b"same").digest())}


async def test_retention_classes_share_no_object(store: HeldStore) -> None:
    packs = SharedPacks(store)
    blobs = await asyncio.gather(
        *(put(packs, data, kept_as=("scratch", "raw-evidence")[number % 2]) for number, data in enumerate(bodies(8)))
    )
    scratch, evidence = ({blob.key for blob in blobs[start::2]} for start in (0, 1))
    assert len(scratch) == len(evidence) == 1
    assert not scratch & evidence


async def test_a_class_whose_packs_stand_still_holds_up_no_other(store: HeldStore) -> None:
    packs = SharedPacks(store, at_once=1)
    with store.held():
        stuck = put(packs, b"stuck")
        await store.asked(1)
        other = put(packs, b"other", kept_as="report")
        await store.asked(2)
    assert await got(store, await other) == b"other"
    await stuck


@pytest.mark.parametrize(
    "said",
    [
        Declared(5, blake3=bytes(32)),
        Declared(5, sha256=bytes(32)),
        Declared(4),
        Declared(6),
    ],
    ids=["blake3", "sha256", "longer", "shorter"],
)
async def test_a_body_that_is_not_what_was_declared_fails_alone(store: HeldStore, said: Declared) -> None:
    packs = SharedPacks(store)
    many = bodies(63)
    wrong = put(packs, b"wrong", said=said)
    good = [put(packs, data) for data in many]
    with pytest.raises(ContentMismatchError):
        await wrong
    assert [await got(store, blob) for blob in await asyncio.gather(*good)] == many
    assert [without_salt(pack) for pack in store.packs] == [b"".join(many)]


@pytest.mark.parametrize("size", [1_000, 100_000], ids=["read first", "with memory first"])
async def test_a_slow_body_delays_nobody(store: HeldStore, size: int) -> None:
    packs = SharedPacks(store)
    slow = Slow(bytes(size))
    late = asyncio.create_task(packs.store(slow, declared=Declared(size), max_bytes=MIB, retention_class=CLASS))
    await slow.begun.wait()
    await asyncio.gather(*(put(packs, data) for data in bodies(63)))
    assert not late.done()
    slow.go.set()
    assert await got(store, await late) == bytes(size)


async def test_a_sender_that_leaves_takes_nothing_from_the_others(store: HeldStore) -> None:
    packs = SharedPacks(store, at_once=1)
    with store.held():
        first, second = put(packs, b"first"), put(packs, b"second")
        await store.asked(1)
        third, fourth = put(packs, b"third"), put(packs, b"fourth")
        await asyncio.sleep(0)
        for leaving in (first, third):
            leaving.cancel()
            with pytest.raises(asyncio.CancelledError):
                await leaving
    assert await got(store, await second) == b"second"
    assert await got(store, await fourth) == b"fourth"
    shared, alone = store.packs
    assert (without_salt(shared), alone) == (b"firstsecond", b"fourth")


async def test_a_pack_that_cannot_be_stored_fails_for_all_of_it_and_for_no_later_one(store: HeldStore) -> None:
    packs = SharedPacks(store, at_once=1)
    store.failure = UnavailableError("the store is away")
    for outcome in await asyncio.gather(*(put(packs, data) for data in bodies(64)), return_exceptions=True):
        assert outcome is store.failure
    store.failure = None
    assert await got(store, await put(packs, b"later")) == b"later"


async def test_what_waits_behind_a_pack_for_which_the_store_hung_does_not_wait_as_long_again(
    store: HeldStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.blobs.packs.HOPELESS_SECONDS", 0.0)
    packs = SharedPacks(store, at_once=1)
    store.failure = UnavailableError("the store gave no answer in time")
    with store.held():
        first = put(packs, b"first")
        await store.asked(1)
        later = [put(packs, data) for data in bodies(10)]
        await asyncio.sleep(0)
    for outcome in await asyncio.gather(first, *later, return_exceptions=True):
        assert outcome is store.failure
    assert store.packs == [b"first"]


async def test_a_pack_has_a_bounded_size(store: HeldStore) -> None:
    packs = SharedPacks(store, pack_bytes=1_000)
    many = [bytes([number]) * 400 for number in range(5)] + [bytes(3_000)]
    blobs = await asyncio.gather(*(put(packs, data) for data in many))
    assert [len(pack) for pack in store.packs] == [800 + SALT_BYTES, 800 + SALT_BYTES, 400, 3_000]
    assert [await got(store, blob) for blob in blobs] == many


async def test_bodies_that_are_held_take_memory_of_the_budget(store: HeldStore) -> None:
    packs = SharedPacks(store, turn_seconds=0.05)
    memory = store.parts.memory
    free = memory.free
    with store.held():
        waiting = [put(packs, bytes([number]) * 100_000) for number in range(3)]
        await store.asked(1)
        assert memory.free == free - 300_000
        with memory.share() as all_of_it:
            await all_of_it.take(memory.free)
            with pytest.raises(PushBackError, match="held all memory"):
                await put(packs, b"one more")
    await asyncio.gather(*waiting)
    assert memory.free == free


async def test_closing_waits_for_packs_whose_senders_are_gone(store: HeldStore) -> None:
    packs = SharedPacks(store)
    with store.held():
        gone = put(packs, b"gone")
        await store.asked(1)
        gone.cancel()
        closing = asyncio.create_task(packs.close())
        await asyncio.sleep(0)
        assert not closing.done()
    await closing
    assert await store.size(content_key(blake3(b"gone").digest())) == 4


def test_what_is_not_known_to_be_small_shares_nothing() -> None:
    assert is_small(Declared(0))
    assert is_small(Declared(256 * 1024))
    assert not is_small(Declared(256 * 1024 + 1))
    assert not is_small(Declared())
