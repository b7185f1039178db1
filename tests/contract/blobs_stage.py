"""Shared by the tests of blob stores: stores with small parts, bodies, and the list of everything in a store."""

from __future__ import annotations

import hashlib
import io
import random
from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from blake3 import blake3

from artifact_store.models import Declared
from services.blobs.local import LocalBlobStore
from services.blobs.port import UPLOADS, BlobStore, StoredBlob
from services.blobs.s3.multipart import RECORDS
from services.blobs.s3.requests import Endpoint
from services.blobs.s3.store import S3BlobStore

STORES = [
    "local",
    pytest.param("s3_bucket", marks=pytest.mark.services, id="minio"),
    pytest.param("seaweed_bucket", marks=pytest.mark.services, id="seaweedfs"),
]
"""Parameters of a fixture that calls `opened_stage`: every store on which the contract holds."""

MUCH = pytest.mark.moves_much
"""Marks tests that move many bytes: SeaweedFS is slow with large bodies, and runs them only under endurance."""

PART = 5 << 20  # the smallest part that S3 allows
LIMIT = 1 << 40


@dataclass
class Stage:
    """A store, and ways past it: to name everything that it holds, finished or not, and to put other bytes in place."""

    store: BlobStore
    holds: Callable[[], set[str]]
    overwrite: Callable[[str, bytes], object]


def endpoint(bucket: dict[str, Any], host: str | None = None) -> Endpoint:
    """The endpoint that the settings of a fixture like `s3_bucket` name, or the same bucket through another host."""
    url = urlsplit(bucket["blobs_url"])
    keys = (bucket["s3_access_key"], bucket["s3_secret_key"])
    return Endpoint(host or url.netloc, url.path.strip("/"), False, *keys, bucket["s3_region"])


def s3_store(at: Endpoint, **options: Any) -> S3BlobStore:
    """A store with parts as small as S3 allows."""
    return S3BlobStore(at, **{"part_bytes": PART, "held_bytes": 3 * PART, **options})


def objects(at: Endpoint) -> set[str]:
    """Keys of all objects of a bucket, the records of unfinished uploads among them.

    Without the records that bodies under keys of their own have for a day.
    """
    found = {str(found.object_name) for found in at.sdk().list_objects(at.bucket, recursive=True)}
    return found - {f"{RECORDS}{key.removeprefix(UPLOADS)}" for key in found if key.startswith(UPLOADS)}


def s3_stage(bucket: dict[str, Any]) -> Stage:
    """A store on the bucket of a fixture like `s3_bucket`."""
    at = endpoint(bucket)

    def overwrite(key: str, data: bytes) -> None:
        at.sdk().put_object(at.bucket, key, io.BytesIO(data), len(data))

    return Stage(s3_store(at), lambda: objects(at), overwrite)


def local_stage(folder: Path) -> Stage:
    """A store on a folder, which `migrate` has yet to make."""

    def files() -> set[str]:
        return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

    return Stage(LocalBlobStore(folder), files, lambda key, data: (folder / key).write_bytes(data))


@asynccontextmanager
async def opened_stage(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Stage]:
    """The stage that the parameter of the fixture names (STORES), migrated."""
    stage = local_stage(folder) if request.param == "local" else s3_stage(request.getfixturevalue(request.param))
    await stage.store.migrate()
    try:
        yield stage
    finally:
        await stage.store.close()


def some_bytes(size: int, seed: int = 0) -> bytes:
    """Bytes without a pattern, the same for the same arguments."""
    return random.Random(seed).randbytes(size)


def declared(data: bytes) -> Declared:
    """The truth about `data`."""
    return Declared(len(data), blake3(data).digest(), hashlib.sha256(data).digest())


async def body(data: bytes, sizes: Iterable[int] = ()) -> AsyncIterator[bytes]:
    """`data` in chunks of the given sizes, and the rest in chunks of 64 KiB."""
    start = 0
    for size in sizes:
        yield data[start : start + size]
        start += size
    for at in range(start, len(data), 65536):
        yield data[at : at + 65536]


async def put(store: BlobStore, data: bytes, said: Declared | None = None) -> StoredBlob:
    """Store `data`, declaring nothing if nothing is said."""
    return await store.store(body(data), declared=said or Declared(), max_bytes=LIMIT)


async def got(store: BlobStore, blob: StoredBlob) -> bytes:
    """The bytes of a blob as they are read back."""
    return b"".join([chunk async for chunk in store.read(blob.key, blob.offset, blob.length)])
