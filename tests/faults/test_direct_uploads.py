"""Large files that went straight to the store, when store or gateway fail between the completion and the event.

At that moment the object is there, whole, under the upload's own key, but no gateway has read it to its end yet. What
becomes of wrong and replaced parts is in `tests.contract.test_direct_parts`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

import pytest
from blake3 import blake3

import artifact_store.client.client
from artifact_store import Client, RetryPolicy
from artifact_store.byte_streams import joined
from artifact_store.events import FileIngested
from artifact_store.models import Declared
from services.config import Settings
from tests.buckets import direct_settings
from tests.contract.blobs_stage import some_bytes
from tests.faults.store_proxy import StoreProxy
from tests.integration.http_gateway import running_gateway
from tests.integration.processes import output_of, serving

pytestmark = [pytest.mark.services, pytest.mark.processes]

MIB = 1 << 20
DATA = some_bytes(20 * MIB + 5)
PATIENCE_SECONDS = 60.0
QUICK = RetryPolicy(first_pause_seconds=0.01, longest_pause_seconds=0.1)


@pytest.fixture(autouse=True)
def _small_files_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(artifact_store.client.client, "RESUMABLE_BYTES", MIB)


@asynccontextmanager
async def store_line(embedded: Settings, bucket: dict[str, Any]) -> AsyncIterator[tuple[Settings, StoreProxy]]:
    """Settings of a gateway, and its line to the store. Clients reach the store past that line."""
    with direct_settings(bucket) as public:
        proxy = StoreProxy(urlsplit(bucket["blobs_url"]).netloc)
        async with proxy.listening() as host:
            settings = Settings(**{**vars(embedded), **bucket, **public})
            path = urlsplit(bucket["blobs_url"]).path
            yield replace(settings, blobs_url=f"s3+http://{host}{path}"), proxy


class Sending:
    """One file on its way into a separate package."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._package: UUID | None = None
        self._task: asyncio.Task[UUID] | None = None

    async def begin(self) -> None:
        self._package = await self._client.create_package("n", "p", "s", "scratch")
        declared = Declared(len(DATA), blake3(DATA).digest())
        sending = self._client.ingest_file(self._package, "a", "text/plain", DATA, declared=declared)
        self._task = asyncio.create_task(sending)

    async def files(self) -> list[UUID]:
        """The files that the log names."""
        events = [event async for event in self._client.read_events(package_id=self._package)]
        return [event.payload.file_id for event in events if isinstance(event.payload, FileIngested)]

    async def stays_unrecorded(self) -> None:
        """Check that neither log nor client hears of the file while the store is silent."""
        assert self._task is not None
        await asyncio.wait([self._task], timeout=0.5)
        assert not self._task.done()
        assert await self.files() == []

    async def arrives(self) -> None:
        """Wait until the file is acknowledged, and check that it was recorded once, with its bytes."""
        assert self._task is not None
        async with asyncio.timeout(PATIENCE_SECONDS):
            file_id = await self._task
        assert await self.files() == [file_id]
        assert await joined(await self._client.get_file(file_id)) == DATA


@asynccontextmanager
async def _silent_read_back(line: StoreProxy, file: Sending) -> AsyncIterator[None]:
    """Begin to send the file. Within the context the store is silent to the gateway, which is reading the object."""
    with line.silent_after(4 * MIB) as silent:
        await file.begin()
        async with asyncio.timeout(PATIENCE_SECONDS):
            await silent.wait()
        await file.stays_unrecorded()
        yield


@pytest.mark.parametrize("cut", [False, pytest.param(True, marks=pytest.mark.endurance)], ids=["frozen", "cut"])
async def test_a_store_that_falls_silent_while_an_object_is_read_back_only_delays_its_event(
    embedded_settings: Settings, s3_bucket: dict[str, Any], cut: bool
) -> None:
    async with (
        store_line(embedded_settings, s3_bucket) as (settings, line),
        running_gateway(settings) as gateway,
        Client(gateway.url, QUICK) as client,
    ):
        file = Sending(client)
        async with _silent_read_back(line, file):
            if cut:
                await line.cut()
        await file.arrives()


@pytest.mark.endurance
async def test_a_gateway_that_is_killed_between_the_completion_and_the_event_records_the_file_once(
    embedded_settings: Settings, s3_bucket: dict[str, Any], tmp_path: Path
) -> None:
    with ExitStack() as stack:
        async with store_line(embedded_settings, s3_bucket) as (settings, line):
            # In threads: the line to the store is this event loop's.
            process = await asyncio.to_thread(stack.enter_context, serving(settings, tmp_path))
            async with Client(process.endpoint, QUICK) as client:
                file = Sending(client)
                async with _silent_read_back(line, file):
                    await asyncio.to_thread(process.kill)
                    await line.cut()
                await asyncio.to_thread(process.start)
                await file.arrives()
            await asyncio.to_thread(output_of, settings, "verify", "--bytes")
            await asyncio.to_thread(stack.close)
