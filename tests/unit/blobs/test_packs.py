"""Packs: files lie where both ends expect them, in memory that does not grow with the bundle."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Sequence
from pathlib import Path
from random import Random

import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from artifact_store.archives.bundle import PACK_BYTES, Group, NamedFile, PackLayout, SmallFile, StreamedFile
from artifact_store.errors import TooLargeError, UnknownContentError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.packs import Packing, Placed, find_named


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[LocalBlobStore]:
    opened = LocalBlobStore(tmp_path / "blobs")
    await opened.migrate()
    yield opened
    await opened.close()


def small(name: str, data: bytes) -> SmallFile:
    return SmallFile(name, "text/plain", data)


async def bundle(*groups: Group) -> AsyncIterator[Group]:
    for group in groups:
        yield group


async def read(store: LocalBlobStore, placed: Sequence[Placed]) -> list[bytes]:
    return [
        b"".join([c async for c in store.read(file.blob.key, file.blob.offset, file.blob.length)]) for file in placed
    ]


async def pack(store: LocalBlobStore, *groups: Group, limit: int = 1 << 40) -> list[Placed]:
    return await Packing(store, limit).store(bundle(*groups))


async def test_small_files_lie_one_behind_the_other_and_equal_ones_once(store: LocalBlobStore) -> None:
    data = [b"one", b"", b"two", b"one", b"three"]
    placed = await pack(
        store, [small(str(n), d) for n, d in enumerate(data[:3])], [small("3", b"one"), small("4", b"three")]
    )
    assert [file.relative_path for file in placed] == ["0", "1", "2", "3", "4"]
    assert [(file.blob.offset, file.blob.length) for file in placed] == [(0, 3), (3, 0), (3, 3), (0, 3), (6, 5)]
    assert {file.blob.key for file in placed} == {content_key(blake3(b"onetwothree").digest())}
    assert [file.blob.sha256 for file in placed] == [hashlib.sha256(d).digest() for d in data]
    assert await read(store, placed) == data


async def test_a_pack_ends_where_the_next_file_would_not_fit(store: LocalBlobStore) -> None:
    piece = PACK_BYTES // 3 - 1
    data = [Random(n).randbytes(piece) for n in range(7)]
    placed = await pack(store, [small(str(n), d) for n, d in enumerate(data)])
    assert [file.blob.offset // piece for file in placed] == [0, 1, 2, 0, 1, 2, 0]
    assert len({file.blob.key for file in placed}) == 3
    assert await read(store, placed) == data


async def test_larger_files_go_their_own_way_in_the_bundles_order(store: LocalBlobStore) -> None:
    async def body() -> AsyncIterator[bytes]:
        yield b"large " * 1000
        yield b"file"

    placed = await pack(store, [small("a", b"1")], StreamedFile("b", "x/y", 6004, body()), [small("c", b"2")])
    assert [file.relative_path for file in placed] == ["a", "b", "c"]
    assert placed[1].blob.key == content_key(blake3(b"large " * 1000 + b"file").digest())
    assert placed[0].blob.key == placed[2].blob.key
    assert await read(store, placed) == [b"1", b"large " * 1000 + b"file", b"2"]


async def test_a_limit_holds_for_files_in_packs_too(store: LocalBlobStore) -> None:
    with pytest.raises(TooLargeError, match="'b'"):
        await pack(store, [small("a", b"1"), small("b", b"123456")], limit=5)


async def test_nothing_makes_no_pack(store: LocalBlobStore) -> None:
    assert await pack(store) == []
    assert await pack(store, []) == []


@given(st.lists(st.tuples(st.binary(min_size=1, max_size=4), st.integers(0, PACK_BYTES)), max_size=40))
def test_a_layout_never_overfills_a_pack_nor_gives_a_place_twice(files: list[tuple[bytes, int]]) -> None:
    layout, ends = PackLayout(), {0: 0}
    known: dict[bytes, tuple[int, int, int]] = {}
    for digest, size in files:
        size = known[digest][0] if digest in known else size
        place = layout.place(digest, size)
        if place is None:
            layout.begin()
            place = layout.place(digest, size)
        assert place is not None
        number, offset, new = place
        assert new == (digest not in known)
        if new:
            assert offset == ends.get(number, 0)
            ends[number] = offset + size
            assert ends[number] <= PACK_BYTES
            known[digest] = (size, number, offset)
        assert known[digest] == (size, number, offset)


def named(data: bytes, blob: bytes, offset: int) -> NamedFile:
    return NamedFile(f"at {offset}", "text/plain", len(data), blake3(data).digest(), blake3(blob).digest(), offset)


async def test_named_slices_are_found_in_any_order_and_verified(store: LocalBlobStore) -> None:
    blob = Random(1).randbytes(600_000)
    await pack(store, [small("pack", blob)])
    wanted = [named(blob[a:b], blob, a) for a, b in ((500_000, 500_010), (0, 5), (3, 300_000), (7, 7), (0, 600_000))]
    found = await find_named(store, wanted)
    assert [(file.blob.offset, file.blob.length) for file in found] == [
        (500_000, 10),
        (0, 5),
        (3, 299_997),
        (7, 0),
        (0, 600_000),
    ]
    assert [file.blob.sha256 for file in found][1] == hashlib.sha256(blob[:5]).digest()


async def test_what_is_named_stays_although_who_stored_it_died_before_it_saw_to_that(
    store: LocalBlobStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    blob = bytes(range(100))
    with monkeypatch.context() as dying:
        dying.setattr("services.blobs.local.sync_folder", lambda _folder: None)
        (stored,) = await pack(store, [small("pack", blob)])
    synced: set[Path] = set()
    monkeypatch.setattr("services.blobs.local.sync_folder", synced.add)
    root = tmp_path / "blobs"
    successor = LocalBlobStore(root)
    await find_named(successor, [named(blob[:5], blob, 0)])
    await successor.close()
    (path,) = root.rglob(stored.blob.key.rpartition("/")[2])
    assert synced == {root / folder for folder in path.relative_to(root).parents}


async def test_a_name_that_is_not_true_is_refused(store: LocalBlobStore) -> None:
    blob = bytes(range(100))
    await pack(store, [small("pack", blob)])
    for wrong in (
        named(b"other", blob, 0),
        named(blob[:5], blob, 1),
        named(blob[90:] + b"x", blob, 90),
        named(blob[:5], blob, 1_000),
        named(b"", blob, 101),
        named(blob, b"unknown", 0),
    ):
        with pytest.raises(UnknownContentError):
            await find_named(store, [named(blob[:5], blob, 0), wrong])


@pytest.mark.parametrize("size", [100, PACK_BYTES + 1])
async def test_what_is_found_damaged_when_it_is_named_is_stored_anew_when_it_is_sent(
    store: LocalBlobStore, tmp_path: Path, size: int
) -> None:
    blob = Random(size).randbytes(size)
    whole = StreamedFile("whole", "x/y", size, _in_pieces(blob)) if size > PACK_BYTES else [small("whole", blob)]
    (stored,) = await pack(store, whole)
    (path,) = (path for path in tmp_path.rglob(stored.blob.key.rpartition("/")[2]))
    path.write_bytes(blob[:-1] + bytes([blob[-1] ^ 1]))
    with pytest.raises(UnknownContentError, match="send the bytes"):
        await find_named(store, [named(blob, blob, 0)])
    declared = Declared(size_bytes=size, blake3=blake3(blob).digest())
    await store.store(_in_pieces(blob), declared=declared, max_bytes=size)
    assert path.read_bytes() == blob
    (found,) = await find_named(store, [named(blob, blob, 0)])
    assert found.blob == stored.blob


async def test_a_blob_that_was_only_named_wrongly_is_not_stored_anew(store: LocalBlobStore, tmp_path: Path) -> None:
    blob = bytes(range(100))
    (stored,) = await pack(store, [small("pack", blob)])
    (path,) = (path for path in tmp_path.rglob(stored.blob.key.rpartition("/")[2]))
    before = path.stat().st_ino
    with pytest.raises(UnknownContentError):
        await find_named(store, [named(blob[:5], blob, 1)])
    declared = Declared(size_bytes=len(blob), blake3=blake3(blob).digest())
    await store.store(_in_pieces(blob), declared=declared, max_bytes=len(blob))
    assert path.stat().st_ino == before


async def test_a_large_named_file_is_read_in_pieces(store: LocalBlobStore) -> None:
    blob = Random(2).randbytes(PACK_BYTES + 1)
    stored = await pack(store, StreamedFile("large", "x/y", len(blob), _in_pieces(blob)))
    (found,) = await find_named(store, [named(blob, blob, 0)])
    assert found.blob == stored[0].blob


async def _in_pieces(data: bytes) -> AsyncIterator[bytes]:
    for start in range(0, len(data), 100_000):
        yield data[start : start + 100_000]
