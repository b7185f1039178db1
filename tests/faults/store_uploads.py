"""Uploads of every kind that stop in the middle until they are told to continue, while the store is disturbed."""

from __future__ import annotations

import asyncio
import hashlib
import io
import random
import tarfile
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
from blake3 import blake3

from services.blobs.s3.requests import Endpoint
from services.config import Settings
from services.verify import verify
from services.wiring import open_blobs, open_log, open_views
from tests.contract.blobs_stage import endpoint
from tests.faults.store_proxy import StoreProxy
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.services.minio import MinioServer
from tests.services.s3 import REGION

MIB = 1 << 20
_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
_PATIENCE_SECONDS = 120.0


@dataclass
class Upload:
    """One request to `path` with `body`, which is sent again with the same key until it is acknowledged."""

    path: str
    method: str
    body: bytes
    files: Mapping[str, bytes]
    headers: dict[str, str]
    stop_at: int
    """After this many bytes the body waits."""
    middle: asyncio.Event = field(default_factory=asyncio.Event)
    problems: list[dict[str, Any]] = field(default_factory=list)
    """What it was answered instead of an acknowledgement."""
    acknowledged: dict[str, Any] | None = None

    async def send(self, session: aiohttp.ClientSession, go_on: asyncio.Event) -> None:
        """Send it once. Raises AssertionError: the answer is neither an acknowledgement nor a clear refusal."""

        async def pieces() -> AsyncIterator[bytes]:
            for start in range(0, len(self.body), 256 * 1024):
                if start >= self.stop_at:
                    self.middle.set()
                    await go_on.wait()
                yield self.body[start : start + 256 * 1024]
            self.middle.set()
            await go_on.wait()

        async with session.request(self.method, self.path, data=pieces(), headers=self.headers) as answer:
            said = await answer.json(content_type=None)
        if answer.status == 201:
            self.acknowledged = said
            return
        self.problems.append(said)
        self.middle.set()
        assert answer.status == 503, said
        assert answer.content_type == "application/problem+json"
        assert int(answer.headers["Retry-After"]) >= 1

    @property
    def recorded(self) -> dict[str, str]:
        """Identifiers of the files that were acknowledged, by their paths."""
        found = self.acknowledged or {}
        return {file["relative_path"]: file["file_id"] for file in found.get("files", [found] if found else [])}


@dataclass
class Stage:
    """A gateway that reaches MinIO through a proxy, and both of these."""

    gateway: RunningGateway
    minio: MinioServer
    proxy: StoreProxy
    at: Endpoint
    """The bucket, past the proxy."""

    async def uploads(self, draw: random.Random | None = None) -> list[Upload]:
        """One of each kind, to a package of its own; they wait where it is drawn, or else where much is under way."""
        moment = draw
        draw = draw or random.Random(0)
        small, declared, undeclared = draw.randbytes(100_000), draw.randbytes(20 * MIB), draw.randbytes(20 * MIB)
        many = {f"many/{n:03}": draw.randbytes(20_000) for n in range(600)}
        archive = {"large-1": draw.randbytes(9 * MIB), **many, "large-2": draw.randbytes(9 * MIB)}
        address = {"X-Content-Address": f"blake3:{blake3(declared).hexdigest()}"}
        found = [
            await self._put("small", small, {}, 50_000),
            await self._put("declared", declared, address, 14 * MIB),
            await self._put("undeclared", undeclared, {}, 14 * MIB),
            await self._archive(archive, 14 * MIB),
        ]
        if moment is not None:
            for upload in found:
                upload.stop_at = moment.randrange(len(upload.body) + 1)
        return found

    async def send(self, uploads: list[Upload], go_on: asyncio.Event) -> list[asyncio.Task[None]]:
        """Begin all of them; returns once each waits in its middle."""
        tasks = [asyncio.create_task(upload.send(self.gateway.session, go_on)) for upload in uploads]
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await asyncio.gather(*(upload.middle.wait() for upload in uploads))
        return tasks

    async def send_again(self, uploads: list[Upload]) -> None:
        """Send what was not acknowledged, as clients do: it must go through now."""
        await self.ready()
        go_on = asyncio.Event()
        go_on.set()
        left = [upload for upload in uploads if upload.acknowledged is None]
        async with asyncio.timeout(_PATIENCE_SECONDS):
            await asyncio.gather(*(upload.send(self.gateway.session, go_on) for upload in left))
        assert [upload.problems[-1] for upload in uploads if upload.acknowledged is None] == []

    async def ready(self) -> None:
        """Wait until the gateway says that it takes writes."""

        async def there() -> bool:
            async with self.gateway.session.get("/readyz") as answer:
                return answer.status == 200

        await until(there, _PATIENCE_SECONDS, "the gateway does not recover")

    async def hold_to_promises(self, uploads: list[Upload]) -> None:
        """What was acknowledged is there, whole; `verify` finds nothing wrong; what was left behind is swept away."""
        session, parts = self.gateway.session, self.gateway.parts
        for upload in uploads:
            assert set(upload.recorded) == set(upload.files)
            for path, data in upload.files.items():
                async with session.get(f"/v1/files/{upload.recorded[path]}/content") as answer:
                    found = await answer.read()
                assert hashlib.sha256(found).digest() == hashlib.sha256(data).digest(), path
        report = await verify(parts.log, parts.blobs, parts.views, check_bytes=True)
        assert report.violations == []
        assert report.files == sum(len(upload.files) for upload in uploads)
        tomorrow = datetime.now(UTC) + timedelta(hours=25)
        await parts.blobs.sweep(now=tomorrow)
        assert self.keys("multipart/") == set()

    def keys(self, prefix: str) -> set[str]:
        """What lies below a prefix in the bucket. Blocks."""
        found = self.at.sdk().list_objects(self.at.bucket, prefix=prefix, recursive=True)
        return {str(item.object_name) for item in found}

    async def _put(self, name: str, data: bytes, headers: dict[str, str], stop_at: int) -> Upload:
        path = f"{await self._package()}/{name}"
        return Upload(path, "PUT", data, {name: data}, _with_key(headers), stop_at)

    async def _archive(self, files: Mapping[str, bytes], stop_at: int) -> Upload:
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as archive:
            for name, data in files.items():
                entry = tarfile.TarInfo(name)
                entry.size = len(data)
                archive.addfile(entry, io.BytesIO(data))
        headers = _with_key({"Content-Type": "application/x-tar"})
        return Upload(await self._package(), "POST", out.getvalue(), files, headers, stop_at)

    async def _package(self) -> str:
        async with self.gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
            assert answer.status == 201
            return f"/v1/packages/{(await answer.json())['package_id']}/files"


def _with_key(headers: dict[str, str]) -> dict[str, str]:
    return {**headers, "Idempotency-Key": str(uuid4())}


@asynccontextmanager
async def stage_on(minio: MinioServer, embedded: Settings) -> AsyncIterator[Stage]:
    """A gateway with its log and views in the test's folder, and its blobs in a fresh bucket."""
    bucket = {
        "blobs_url": f"s3+http://{minio.endpoint}/test-{uuid4().hex[:12]}",
        "s3_access_key": minio.access_key,
        "s3_secret_key": minio.secret_key,
        "s3_region": REGION,
    }
    proxy = StoreProxy(minio.endpoint)
    async with proxy.listening() as host:
        url = {"blobs_url": bucket["blobs_url"].replace(minio.endpoint, host)}
        through = Settings(**{**vars(embedded), **bucket, **url})
        for part in (open_log(through), open_blobs(through), open_views(through)):
            await part.migrate()
            await part.close()
        async with running_gateway(through) as gateway:
            yield Stage(gateway, minio, proxy, endpoint(bucket))
