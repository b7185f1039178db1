"""`get-single`: contents of 4 KiB, got one by one, 64 at a time, in files/s.

Ours are `GET`s of contents from one gateway process, in random order. Each run reads a package of its own, which nobody
has read before: its files lie in packs, as every producer of small files leaves them, and the view knows them. Every
content is checked against its digest by the gateway. The baseline are presigned `GET`s of as many objects of the same
size straight from the same store. Both by the same client (aiohttp, kept connections), with addresses made before the
clock starts.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any
from uuid import uuid4

import aiohttp
from yarl import URL

from artifact_store.client.client import Client
from artifact_store.models import MAX_PAGE, all_pages
from artifact_store.registry import ANYONE
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from benchmarks.single_puts import CONCURRENCY, FILE_BYTES, FILES, presigned, put_all, send_all, with_costs
from services.config import Settings

_ROUNDS = 5


class SingleGets:
    """The same amount of content by two ways; see the module."""

    def __init__(self, stage: Stage, packages: Sequence[Sequence[URL]], copies: Sequence[URL]) -> None:
        """`packages` has the addresses of contents for each run, `copies` those of the objects."""
        self._stage = stage
        self._packages = iter(packages)
        self._copies = copies
        self._draw = Random(12)
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {"files": FILES, "file_bytes": FILE_BYTES, "concurrency": CONCURRENCY, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        addresses = list(next(self._packages))
        self._draw.shuffle(addresses)
        seconds, self._found = await with_costs(self._stage, _get_all(addresses))
        return FILES / seconds

    async def baseline(self) -> float:
        """Straight from the store."""
        addresses = list(self._copies)
        self._draw.shuffle(addresses)
        seconds, _ = await _get_all(addresses)
        return FILES / seconds


async def _get_all(addresses: Sequence[URL]) -> tuple[float, list[float]]:
    """As `send_all`."""

    async def get(session: aiohttp.ClientSession, address: URL) -> None:
        async with session.get(address) as answer:
            body = await answer.read()
        assert (answer.status, len(body)) == (200, FILE_BYTES)

    return await send_all(addresses, get, CONCURRENCY)


async def _package(stage: Stage, number: int, draw: Random) -> list[URL]:
    """A package of new files, once the view has all of it: the addresses of their contents."""
    async with Client(stage.gateway.endpoint) as registry:
        package_id = await registry.create_package(f"read-{number}", "benchmark", "read", "scratch")
        async with registry.stream(package_id) as files:
            for frame in range(FILES):
                await files.add(f"frame-{frame:05}.bin", draw.randbytes(FILE_BYTES))
        await registry.finalize(package_id, ANYONE)
        pages = all_pages(lambda cursor: registry.list_files(package_id, limit=MAX_PAGE, cursor=cursor))
        found = [file.file_id async for page in pages for file in page.items]
    assert len(found) == FILES
    return [URL(f"{stage.gateway.endpoint}/v1/files/{file_id}/content") for file_id in found]


async def _copies(stage: Stage, draw: Random) -> list[URL]:
    """Objects straight in the bucket: their presigned addresses."""
    prefix = f"copies/{uuid4().hex}"
    await put_all(presigned(stage.bucket, prefix, (draw.randbytes(FILE_BYTES) for _ in range(FILES))), CONCURRENCY)
    client = stage.bucket.client()
    names = [f"{prefix}/{number:05}" for number in range(FILES)]
    return [URL(client.presigned_get_object(stage.bucket.name, name), encoded=True) for name in names]


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[SingleGets]:
    draw = Random(11)
    async with gateway_stage(settings, projectors=True) as stage:
        packages = [await _package(stage, number, draw) for number in range(1 + _ROUNDS)]
        yield SingleGets(stage, packages, await _copies(stage, draw))


PLAN = Plan("get-single", "files/s", 0.8, _opened, rounds=_ROUNDS)
