"""`ingest-stream`: files of 4 KiB that one producer process adds to a stream, one after the other, in files/s.

Ours is a plain loop of `add` and the end of its block: every file is hashed, stored, recorded and acknowledged by then.
No spool, one gateway process, no projector. The baseline are presigned `PUT`s of the same size straight to the same
store, 64 at a time, as in `ingest-single`. Bodies and addresses are made before the clock starts.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from random import Random
from typing import Any
from uuid import uuid4

from artifact_store.client.client import Client
from artifact_store.registry import ANYONE
from benchmarks.gateway_stage import Stage, gateway_stage
from benchmarks.harness import Plan
from benchmarks.single_puts import CONCURRENCY, FILE_BYTES, FILES, MICROS, presigned, put_all
from services.config import Settings

STREAMED_FILES = 20_000


class StreamedFiles:
    """Files by one stream; see the module."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._draw = Random(9)
        self._found: dict[str, Any] = {}

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        work = {"files": STREAMED_FILES, "baseline_files": FILES, "file_bytes": FILE_BYTES, "concurrency": CONCURRENCY}
        return {**work, **self._found}

    async def ours(self) -> float:
        """Through the gateway."""
        bodies = self._bodies(STREAMED_FILES)
        async with Client(self._stage.gateway.endpoint) as registry:
            package_id = await registry.create_package("streamed", "benchmark", "stream", "scratch")
            gateway, client, began = self._stage.gateway_cpu(), time.process_time(), time.perf_counter()
            async with registry.stream(package_id) as files:
                for number, body in enumerate(bodies):
                    await files.add(f"frame-{number:05}.bin", body)
            seconds = time.perf_counter() - began
            self._found = {
                "gateway_cpu_micros_a_file": round((self._stage.gateway_cpu() - gateway) / STREAMED_FILES * MICROS),
                "client_cpu_micros_a_file": round((time.process_time() - client) / STREAMED_FILES * MICROS),
            }
            recorded = (await registry.finalize(package_id, ANYONE)).sequence - 2
        assert recorded == STREAMED_FILES, f"{recorded:,} files are recorded instead of {STREAMED_FILES:,}"
        return STREAMED_FILES / seconds

    async def baseline(self) -> float:
        """Straight to the store."""
        prefix = f"copies/{uuid4().hex}"
        seconds, _ = await put_all(presigned(self._stage.bucket, prefix, self._bodies(FILES)), CONCURRENCY)
        found = await asyncio.to_thread(self._stage.count, prefix)
        assert found == FILES, f"{found} objects are there instead of {FILES}"
        return FILES / seconds

    def _bodies(self, count: int) -> list[bytes]:
        """Bytes that were never seen before."""
        return [self._draw.randbytes(FILE_BYTES) for _ in range(count)]


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[StreamedFiles]:
    async with gateway_stage(settings, projectors=False) as stage:
        yield StreamedFiles(stage)


PLAN = Plan("ingest-stream", "files/s", 6.0, _opened)
