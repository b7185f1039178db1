"""Blobs heal on every adapter: a missing, truncated or set-aside blob comes back with the next upload."""

from __future__ import annotations

import asyncio
from base64 import b64encode
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
from minio import Minio

from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.models import Declared
from services.blobs.memory import PartBuffer
from services.blobs.port import StoredBlob
from services.blobs.s3.store import S3BlobStore
from tests.contract.blobs_stage import (
    LIMIT,
    MUCH,
    PART,
    STORES,
    Stage,
    body,
    declared,
    endpoint,
    got,
    local_stage,
    objects,
    opened_stage,
    put,
    s3_stage,
    some_bytes,
)

MIB = 1 << 20
LARGE = 2 * PART + 12345
SIZES = pytest.mark.parametrize("size", [0, 1000, MIB, LARGE])


@pytest.fixture(params=STORES)
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    async with opened_stage(request, tmp_path / "blobs") as found:
        yield found


async def damaged(stage: Stage, size: int) -> tuple[bytes, StoredBlob]:
    """Bytes, and the blob in which others of the same length lie now."""
    data = some_bytes(size)
    blob = await put(stage.store, data, declared(data))
    stage.overwrite(blob.key, bytes(size))
    return data, blob


@SIZES
async def test_what_is_set_aside_is_gone_from_its_key_and_kept_elsewhere(stage: Stage, size: int) -> None:
    _, blob = await damaged(stage, size)
    aside = await stage.store.set_aside(blob.key)
    assert aside is not None
    assert aside.startswith("damaged/")
    assert stage.holds() == {aside}
    assert await stage.store.size(blob.key) is None
    with pytest.raises(CorruptError, match="missing"):
        await anext(aiter(stage.store.read(blob.key, 0, size)))
    chunks = [chunk async for chunk in stage.store.read(aside, 0, size)]
    assert b"".join(chunks) == bytes(size)


async def test_nothing_is_set_aside_where_nothing_is(stage: Stage) -> None:
    blob = await put(stage.store, b"x")
    assert await stage.store.set_aside(blob.key) is not None
    assert await stage.store.set_aside(blob.key) is None
    with pytest.raises(CorruptError, match="not the key"):
        await stage.store.set_aside("../x")


@SIZES
@pytest.mark.parametrize("said", [False, True], ids=["undeclared", "declared"])
async def test_the_next_upload_of_the_same_bytes_heals_what_was_set_aside(stage: Stage, size: int, said: bool) -> None:
    if size == LARGE and not said and stage.store.backend_id == "s3":
        said = True  # a large body that declares nothing has a key of its own there
    data, blob = await damaged(stage, size)
    for _ in range(2):
        aside = await stage.store.set_aside(blob.key)
        assert await put(stage.store, data, declared(data) if said else None) == blob
        assert await got(stage.store, blob) == data
        assert stage.holds() == {blob.key, aside}
        stage.overwrite(blob.key, bytes(size))


@pytest.mark.parametrize("size", [1000, MIB, pytest.param(LARGE, marks=MUCH)])
@pytest.mark.parametrize("said", [False, True], ids=["undeclared", "declared"])
async def test_the_next_upload_heals_what_was_found_damaged_and_stayed_where_it_was(
    stage: Stage, size: int, said: bool
) -> None:
    said = said or size == LARGE
    data, blob = await damaged(stage, size)
    stage.store.mistrust(blob.key)
    assert await got(stage.store, blob) == bytes(size), "what is good in it can be read until then"
    assert await put(stage.store, data, declared(data) if said else None) == blob
    assert await got(stage.store, blob) == data
    assert stage.holds() == {blob.key}


@pytest.mark.parametrize("size", [0, 1000, MIB, pytest.param(LARGE, marks=MUCH)])
async def test_identical_uploads_at_the_same_time_heal_a_blob_once(stage: Stage, size: int) -> None:
    data, blob = await damaged(stage, size)
    aside = await stage.store.set_aside(blob.key)
    assert set(await asyncio.gather(*(put(stage.store, data, declared(data)) for _ in range(8)))) == {blob}
    assert await got(stage.store, blob) == data
    assert stage.holds() == {blob.key, aside}


@pytest.mark.parametrize("size", [1, 1000, MIB, pytest.param(LARGE, marks=MUCH)])
@pytest.mark.parametrize("said", [False, True], ids=["undeclared", "declared"])
async def test_an_upload_is_not_acknowledged_while_other_bytes_of_its_length_lie_at_its_key(
    stage: Stage, size: int, said: bool
) -> None:
    said = said or size == LARGE  # a large body that declares nothing has a key of its own
    data, blob = await damaged(stage, size)
    try:
        assert await put(stage.store, data, declared(data) if said else None) == blob
    except UnavailableError:  # it had nothing left of the body to store
        assert await put(stage.store, data, declared(data) if said else None) == blob
    assert await got(stage.store, blob) == data
    assert stage.holds() == {blob.key}


@pytest.mark.services
@pytest.mark.parametrize("size", [1000, MIB, LARGE])
async def test_the_checksum_that_the_store_keeps_tells_that_an_object_has_other_bytes(
    any_s3_bucket: dict[str, Any], size: int
) -> None:
    data = some_bytes(size)
    store = S3BlobStore(endpoint(any_s3_bucket), part_bytes=PART)
    blob = await put(store, data, declared(data))
    # A checksum of the kind that is looked for: CRC-32 of what was stored in parts, else SHA-256.
    kept = {} if size == LARGE else {"x-amz-checksum-sha256": b64encode(sha256(bytes(size)).digest()).decode()}
    with closing(PartBuffer(size)) as wrong:
        wrong.append(bytes(size))
        await store._requests.send("PUT", blob.key, frozenset({200}), body=wrong, headers=kept)
    if size == LARGE:
        with pytest.raises(UnavailableError, match="does not hold its own bytes: retry"):
            await put(store, data, declared(data))
    assert await put(store, data, declared(data)) == blob
    assert await got(store, blob) == data
    await store.close()


async def test_an_upload_that_found_a_blob_that_is_set_aside_meanwhile_is_to_be_tried_again(stage: Stage) -> None:
    data = some_bytes(LARGE)
    blob = await put(stage.store, data, declared(data))

    async def slow() -> AsyncIterator[bytes]:
        async for chunk in body(data[:-1]):
            yield chunk
        await stage.store.set_aside(blob.key)
        yield data[-1:]

    with pytest.raises(UnavailableError, match="retry"):
        await stage.store.store(slow(), declared=declared(data), max_bytes=LIMIT)
    assert await put(stage.store, data, declared(data)) == blob
    assert await got(stage.store, blob) == data


@pytest.mark.parametrize("said", [Declared(), Declared(size_bytes=1000)], ids=["undeclared", "size alone"])
async def test_an_upload_that_was_written_anyway_heals_a_local_blob_with_other_bytes(
    tmp_path: Path, said: Declared
) -> None:
    stage = local_stage(tmp_path)
    await stage.store.migrate()
    data, blob = await damaged(stage, 1000)
    assert await put(stage.store, data, said) == blob
    assert await got(stage.store, blob) == data
    await stage.store.close()


@pytest.mark.services
async def test_a_blob_that_was_healed_while_it_was_copied_aside_stays(any_s3_bucket: dict[str, Any]) -> None:
    stage = s3_stage(any_s3_bucket)
    data, blob = await damaged(stage, 1000)

    class Racing(S3BlobStore):
        """An upload comes through right after the copy."""

        async def _with_sdk(self, act: Callable[[Minio], Any], **options: Any) -> Any:
            done = await super()._with_sdk(act, **options)
            stage.overwrite(blob.key, data)
            return done

    racing = Racing(endpoint(any_s3_bucket))
    aside = await racing.set_aside(blob.key)
    assert await got(stage.store, blob) == data
    assert objects(endpoint(any_s3_bucket)) == {blob.key, aside}
    await racing.close()
    await stage.store.close()
