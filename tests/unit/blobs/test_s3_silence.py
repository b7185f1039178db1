"""How long callers wait for an S3 store that accepts requests but does not answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from artifact_store.errors import UnavailableError
from services.blobs.s3.requests import Endpoint
from services.blobs.s3.store import S3BlobStore

SECONDS = 0.2


class Silent:
    """A store of that kind, and what it was asked."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.ended = asyncio.Event()

    async def answer(self, request: web.BaseRequest) -> web.StreamResponse:
        self.asked.append(request.method)
        await self.ended.wait()
        return web.Response()


@pytest.fixture
async def silent(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Silent, S3BlobStore]]:
    monkeypatch.setattr("services.blobs.s3.requests.ANSWER_SECONDS", SECONDS)
    server = Silent()
    application = web.Application()
    application.router.add_route("*", "/{path:.*}", server.answer)
    async with TestServer(application) as listening:
        at = Endpoint(f"{listening.host}:{listening.port}", "bucket", False, "user", "secret", "us-east-1")
        store = S3BlobStore(at)
        try:
            yield server, store
        finally:
            server.ended.set()
            await store.close()


async def test_a_silent_store_makes_an_upload_wait_once(silent: tuple[Silent, S3BlobStore]) -> None:
    server, store = silent
    with pytest.raises(UnavailableError, match="gave no answer in time"):
        # The transfer has time of its own, of which nothing is left to wait in vain once more.
        await store._requests.send("PUT", "probe", frozenset({200}), body=bytes(256 * 1024), seconds=SECONDS)
    assert server.asked == ["PUT"]


async def test_a_silent_store_makes_a_download_wait_once(silent: tuple[Silent, S3BlobStore]) -> None:
    server, store = silent
    with pytest.raises(UnavailableError, match="gave no answer in time"):
        async for _ in store.read(f"blobs/blake3/00/00/{'0' * 64}", 0, 10):
            pass
    assert server.asked == ["GET"]
