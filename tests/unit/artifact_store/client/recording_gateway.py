"""Answers of a gateway that records the requests of a stream, for scripts of `failing_gateway`."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass, field
from urllib.parse import unquote
from uuid import uuid4

from aiohttp import web
from blake3 import blake3

from artifact_store.archives.tar import ArchiveLimits, TarReader, WholeEntry
from artifact_store.documents.shapes import FileIngestedAnswer, FilesIngestedAnswer
from artifact_store.errors import ArtifactStoreError, DuplicateRelativePathError
from artifact_store.models import Acknowledgement, IngestedFile
from tests.unit.artifact_store.client.failing_gateway import PACKAGE, Answering, refuses


@dataclass
class Recorder:
    """The files of a package, as the requests brought them. A command that comes again gets its first answer."""

    files: dict[str, bytes] = field(default_factory=dict)
    media_types: dict[str, str] = field(default_factory=dict)
    requests: list[list[str]] = field(default_factory=list)
    """The paths of each command, in the order in which they were recorded."""
    answers: dict[str, str] = field(default_factory=dict)
    recorded: asyncio.Event = field(default_factory=asyncio.Event)
    """Set once something was recorded."""

    async def records(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Record the files of a request, all or none."""
        key = request.headers["Idempotency-Key"]
        if key not in self.answers:
            try:
                self.answers[key] = self._record(request, body)
            except ArtifactStoreError as error:
                return await refuses(error.status, error.problem)(request, body)
        return web.Response(status=201, text=self.answers[key], content_type="application/json")

    def held(self, go: asyncio.Event) -> Answering:
        """As `records`, once `go` is set."""

        async def answer(request: web.Request, body: bytes) -> web.StreamResponse:
            await go.wait()
            return await self.records(request, body)

        return answer

    async def loses_answers(self, request: web.Request, body: bytes) -> web.StreamResponse:
        """Record, and close the connection instead of answering."""
        await self.records(request, body)
        assert request.transport is not None
        request.transport.abort()
        return web.Response()

    def _record(self, request: web.Request, body: bytes) -> str:
        _, _, path = request.raw_path.partition("/files/")
        found = {unquote(path): body} if path else _entries(body)
        if twice := self.files.keys() & found.keys():
            raise DuplicateRelativePathError(f"the package holds {min(twice)!r} already")
        if path:
            self.media_types[unquote(path)] = request.headers["Content-Type"]
        done = [self._ingested(name, data) for name, data in found.items()]
        self.requests.append(list(found))
        self.recorded.set()
        acknowledged = Acknowledgement(PACKAGE, done[-1].sequence, bytes(32), files=tuple(done))
        return (FileIngestedAnswer if path else FilesIngestedAnswer).json_of(acknowledged).decode()

    def _ingested(self, name: str, data: bytes) -> IngestedFile:
        self.files[name] = data
        digests = blake3(data).digest(), hashlib.sha256(data).digest()
        return IngestedFile(uuid4(), name, len(data), *digests, len(self.files) + 1, bytes(32))


def _entries(archive: bytes) -> dict[str, bytes]:
    reader = TarReader(ArchiveLimits(10_000, 1 << 20, 1 << 20))
    found = {entry.relative_path: entry.data for entry in reader.feed(archive) if isinstance(entry, WholeEntry)}
    reader.close()
    return found
