"""The cost of followers for a gateway on Kafka: a place for each, and one reader for all of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import aiohttp
import psutil
import pytest

from artifact_store.documents.event_lines import parse_event
from services.config import Settings
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of

pytestmark = [pytest.mark.services, pytest.mark.processes]

FOLLOWERS = 40
_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}


@pytest.fixture
async def gateway(real_settings: Settings, tmp_path: Path) -> AsyncIterator[ProductProcess]:
    output_of(real_settings, "migrate")
    with ProductProcess(real_settings, tmp_path / "gateway", "gateway") as started:
        yield started


async def test_many_followers_have_one_reader_and_each_sees_every_event(gateway: ProductProcess) -> None:
    process = psutil.Process(gateway.pid)
    connector = aiohttp.TCPConnector(limit=0)
    async with AsyncExitStack() as stack, aiohttp.ClientSession(gateway.endpoint, connector=connector) as session:

        async def publish() -> None:
            async with session.post("/v1/packages", json=_PACKAGE) as answer:
                assert answer.status == 201, await answer.text()

        async def follower() -> aiohttp.StreamReader:
            answer = await stack.enter_async_context(session.get("/v1/events?follow=true"))
            async with asyncio.timeout(60):
                parse_event(await answer.content.readline())  # what was before is read
            return answer.content

        await publish()
        readers = [await follower()]
        with_one = process.num_threads()
        readers += [await follower() for _ in range(FOLLOWERS)]

        async def settled() -> bool:
            return process.num_threads() < with_one + FOLLOWERS  # one that reads by itself has five threads

        await until(settled, 60, f"one follower came to {with_one} threads, and {FOLLOWERS} more to one each at least")
        for _ in range(3):
            await publish()
        async with asyncio.timeout(60):
            seen = [{parse_event(await reader.readline()).event_id for _ in range(3)} for reader in readers]
        assert all(ids == seen[0] for ids in seen)
        assert len(seen[0]) == 3
