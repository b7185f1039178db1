"""The stage for uploads over several requests: two gateways, one store of each kind, one log."""

from __future__ import annotations

import hashlib
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from blake3 import blake3

from artifact_store.errors import DuplicateRelativePathError
from artifact_store.models import Acknowledgement, Declared, IngestedFile
from schemas import identifiers
from services.blobs.local import LocalBlobStore
from services.blobs.packs import Placed
from services.blobs.port import BlobStore, StoredBlob
from services.blobs.resumable.states import UploadState
from services.blobs.resumable.uploads import NewUpload, ResumableUploads
from tests.contract.blobs_stage import PART, Stage, body, endpoint, got, opened_stage, s3_store

PACKAGE = uuid4()


@dataclass
class Log:
    """Stands for the writer: takes what the gateways record, once a path, and a repeat as the first."""

    recorded: dict[str, tuple[UUID, Placed]] = field(default_factory=dict)
    failures: list[Exception] = field(default_factory=list)
    checks: int = 0

    async def check(
        self, package_id: UUID, relative_path: str, command_id: UUID | None, _principal: str | None = None
    ) -> None:
        """As `check_ingest`."""
        self.checks += 1
        if relative_path in self.recorded and self.recorded[relative_path][0] != command_id:
            raise DuplicateRelativePathError(relative_path)

    async def record(
        self, package_id: UUID, file: Placed, actor: str, command_id: UUID, principal: str | None = None
    ) -> Acknowledgement:
        """As the command of a PUT."""
        await self.check(package_id, file.relative_path, command_id)
        self.recorded.setdefault(file.relative_path, (command_id, file))
        if self.failures:
            raise self.failures.pop()
        blob = self.recorded[file.relative_path][1].blob
        file_id = identifiers.package_id(principal or actor, command_id)
        done = IngestedFile(file_id, file.relative_path, blob.length, blob.blake3, blob.sha256, 2, b"d" * 32)
        return Acknowledgement(package_id, 2, b"d" * 32, files=(done,))

    def blob(self, path: str = "a") -> StoredBlob:
        """What was recorded under this path."""
        return self.recorded[path][1].blob


@dataclass
class Clock:
    """A time that a test sets."""

    now: datetime = datetime(2030, 1, 1, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


@dataclass
class Scene:
    """Two gateways on one store and one log."""

    stage: Stage
    log: Log
    clock: Clock
    one: ResumableUploads
    other: ResumableUploads
    part: int

    async def begin(
        self, length: int, *, path: str = "a", said: Declared | None = None, key: UUID | None = None
    ) -> UUID:
        """Begin an upload of this length at the first gateway."""
        return (await self.one.create(new(length, path=path, said=said, key=key))).upload_id

    async def sweep(self) -> int:
        """What the gateways' sweep removes now."""
        return await self.stage.store.sweep(now=self.clock.now)


def new(length: int, *, path: str = "a", said: Declared | None = None, key: UUID | None = None) -> NewUpload:
    return NewUpload(PACKAGE, path, "text/plain", "me", length, said or Declared(length), key)


@asynccontextmanager
async def opened_scene(request: pytest.FixtureRequest, folder: Path) -> AsyncIterator[Scene]:
    """A scene on the kind of store that the fixture `request` is for."""
    async with opened_stage(request, folder) as stage:
        second: BlobStore
        if isinstance(stage.store, LocalBlobStore):
            part = 64 * 1024
            stage.store, second = (LocalBlobStore(folder, part_bytes=part) for _ in range(2))
        else:
            part = PART
            second = s3_store(endpoint(request.getfixturevalue(request.param)))
        log, clock = Log(), Clock()

        def uploads(store: BlobStore) -> ResumableUploads:
            return ResumableUploads(store, check=log.check, record=log.record, max_file_bytes=1 << 40, clock=clock)

        found = Scene(stage, log, clock, uploads(stage.store), uploads(second), part)
        yield found
        for gateway in (found.one, found.other):
            await gateway.close()
        await second.close()


class CutError(Exception):
    """What a connection that is lost raises."""


async def cut(data: bytes, then: Callable[[], object] | None = None) -> AsyncIterator[bytes]:
    """A body of these bytes whose connection is lost behind them."""
    async for chunk in body(data):
        yield chunk
    if then is not None:
        then()
    raise CutError


async def send(gateway: ResumableUploads, upload: UUID, data: bytes, start: int, end: int) -> UploadState:
    return await gateway.append(PACKAGE, upload, start, body(data[start:end]), size=end - start)


def digests(data: bytes) -> tuple[int, bytes, bytes]:
    return len(data), blake3(data).digest(), hashlib.sha256(data).digest()


async def check_recorded(scene: Scene, data: bytes, path: str = "a") -> None:
    """The file that was recorded has these bytes, and both digests are theirs."""
    blob = scene.log.blob(path)
    assert (blob.length, blob.blake3, blob.sha256) == digests(data)
    assert await got(scene.stage.store, blob) == data
