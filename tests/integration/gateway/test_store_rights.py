"""Least privilege in the store: gateway and oracle work with the policies of docs/security, and cannot do more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import pytest
from minio import Minio, MinioAdmin
from minio.credentials.providers import StaticProvider
from minio.error import S3Error

from artifact_store.byte_streams import from_any
from artifact_store.errors import ArtifactStoreError
from artifact_store.models import Declared
from services.blobs.port import BlobStore
from services.config import Settings
from services.wiring import open_blobs
from tests.services.minio import MinioServer

pytestmark = pytest.mark.services

POLICIES = Path(__file__).parents[3] / "docs" / "security"
BUCKET = "artifacts"
LARGE = 20 << 20
"""Goes in several parts."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MinioServer]:
    """MinIO with a user a policy, each with its policy alone."""
    folder = tmp_path_factory.mktemp("rights")
    with MinioServer(folder / "minio") as found:
        keys = StaticProvider(found.access_key, found.secret_key)
        admin = MinioAdmin(endpoint=found.endpoint, credentials=keys, secure=False)
        for path in sorted(POLICIES.glob("s3-*.json")):
            name = path.stem.removeprefix("s3-")
            policy = json.loads(path.read_text(encoding="utf-8").replace("BUCKET", BUCKET))
            admin.user_add(name, f"{name}-secret")
            admin.policy_add(name, policy=policy)
            admin.policy_set(name, user=name)
        Minio(found.endpoint, found.access_key, found.secret_key, secure=False).make_bucket("other")
        yield found


@asynccontextmanager
async def as_user(server: MinioServer, user: str) -> AsyncIterator[BlobStore]:
    blobs = open_blobs(
        Settings(
            blobs_url=f"s3+http://{server.endpoint}/{BUCKET}",
            s3_access_key=user,
            s3_secret_key=f"{user}-secret",
        )
    )
    try:
        yield blobs
    finally:
        await blobs.close()


async def test_each_process_works_with_its_policy_and_not_beyond(server: MinioServer) -> None:
    async with as_user(server, "migrate") as blobs:
        await blobs.migrate()
        await blobs.migrate()
        with pytest.raises(ArtifactStoreError):
            await blobs.check()
    async with as_user(server, "gateway") as blobs:
        await blobs.check()
        small = await blobs.store(from_any(b"small"), declared=Declared(), max_bytes=LARGE)
        large = await blobs.store(from_any(bytes(LARGE)), declared=Declared(), max_bytes=LARGE)
        for stored in (small, large):
            assert sum([len(piece) async for piece in blobs.read(stored.key, 0, stored.length)]) == stored.length
        await blobs.put_object("snapshots/x/index", b"{}")
        assert await blobs.list_objects("snapshots/") == ["snapshots/x/index"]
        await blobs.delete_object("snapshots/x/index")
        await blobs.sweep(now=datetime.now(UTC))
    async with as_user(server, "verify") as blobs:
        assert await blobs.size(small.key) == 5
        for forbidden in (
            blobs.put_object("snapshots/x/index", b"{}"),
            blobs.delete_object("snapshots/x/index"),
            blobs.store(from_any(b"more"), declared=Declared(), max_bytes=LARGE),
        ):
            with pytest.raises(ArtifactStoreError):
                await forbidden
    for user in ("gateway", "verify", "migrate"):
        sdk = Minio(server.endpoint, user, f"{user}-secret", secure=False)
        for act in (lambda sdk=sdk: list(sdk.list_objects("other")), lambda sdk=sdk: sdk.make_bucket("another")):
            with pytest.raises(S3Error, match="AccessDenied"):
                await asyncio.to_thread(act)
