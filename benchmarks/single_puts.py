"""`ingest-single`: files of 4 KiB put one by one, 64 at a time, in files/s.

Ours are `PUT`s to one gateway process, in eight packages: every file is hashed, stored as a blob of its own and
recorded before it is answered. The baseline are presigned `PUT`s of the same size straight to the same MinIO. Both by
the same client (aiohttp, 64 kept connections), with addresses and bodies made before the clock starts. No projector
runs: ingest needs no view.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from typing import Any
from uuid import uuid4

import aiohttp
from yarl import URL

from artifact_store.client.client import Client
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from services.config import Settings

FILES = 4_000
FILE_BYTES = 4_096
CONCURRENCY = 64
PACKAGES = 8

_MICROS = 1_000_000

Put = tuple[URL, bytes, int]
"""Address, body, and the status that says that it is stored."""


class SinglePuts:
    """The same files by two ways; see the module."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._draw = Random(7)
        self._found: dict[str, Any] = {}
        self._stored = 0

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {"files": FILES, "file_bytes": FILE_BYTES, "concurrency": CONCURRENCY, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        async with Client(self._stage.gateway.endpoint) as registry:
            packages = [
                await registry.create_package(f"single-{number}", "benchmark", "single", "scratch")
                for number in range(PACKAGES)
            ]
        base = f"{self._stage.gateway.endpoint}/v1/packages"
        puts = [
            (URL(f"{base}/{packages[number % PACKAGES]}/files/frame-{number:05}.bin"), body, 201)
            for number, body in enumerate(self._bodies())
        ]
        gateway, client = self._stage.gateway_cpu(), time.process_time()
        seconds, waits = await _put_all(puts)
        self._found = {
            "gateway_cpu_micros_a_file": round((self._stage.gateway_cpu() - gateway) / FILES * _MICROS),
            "client_cpu_micros_a_file": round((time.process_time() - client) / FILES * _MICROS),
            "p50_ms": round(waits[len(waits) // 2] * 1_000, 1),
            "p99_ms": round(waits[len(waits) * 99 // 100] * 1_000, 1),
        }
        self._stored += FILES
        await self._look("blobs/", self._stored)
        return FILES / seconds

    async def baseline(self) -> float:
        """Straight to the store."""
        bucket, prefix = self._stage.bucket, f"copies/{uuid4().hex}"
        client = bucket.client()
        puts = [
            (URL(client.presigned_put_object(bucket.name, f"{prefix}/{number:05}"), encoded=True), body, 200)
            for number, body in enumerate(self._bodies())
        ]
        seconds, _ = await _put_all(puts)
        await self._look(prefix, FILES)
        return FILES / seconds

    async def _look(self, prefix: str, expected: int) -> None:
        """Objects stay until the end: where many were removed a moment ago, making new ones takes longer."""
        found = await asyncio.to_thread(self._stage.count, prefix)
        assert found == expected, f"{found} objects are there instead of {expected}"

    def _bodies(self) -> Iterator[bytes]:
        """Bytes that were never seen before."""
        return (self._draw.randbytes(FILE_BYTES) for _ in range(FILES))


async def _put_all(puts: Sequence[Put]) -> tuple[float, list[float]]:
    """Seconds for all, and how long each waited for its answer, sorted."""
    waits = []
    waiting = iter(puts)

    async def work(session: aiohttp.ClientSession) -> None:
        for address, body, stored in waiting:
            began = time.perf_counter()
            async with session.put(address, data=body) as answer:
                said = await answer.read()
            assert answer.status == stored, said
            waits.append(time.perf_counter() - began)

    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=CONCURRENCY)) as session:
        began = time.perf_counter()
        async with asyncio.TaskGroup() as group:
            for _ in range(CONCURRENCY):
                group.create_task(work(session))
        seconds = time.perf_counter() - began
    return seconds, sorted(waits)


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[SinglePuts]:
    async with gateway_stage(settings, projectors=False) as stage:
        yield SinglePuts(stage)


PLAN = Plan("ingest-single", "files/s", 0.5, _opened)
