"""Positions in answers to writes: a reader that begins there at another gateway gets all later events."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from uuid import uuid4

import aiohttp
import pytest

from services.config import Settings
from services.log.kafka import KafkaLog, KafkaWriter
from services.registry import direct
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.kafka_stage import shared

pytestmark = pytest.mark.services

ABOUT = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
Written = tuple[str, int]
"""The package and the sequence of an event."""


@dataclass(frozen=True)
class Answered:
    """A write and its answer. Times are those of `time.monotonic`, in seconds."""

    written: Written
    position: str
    began: float
    ended: float


@pytest.fixture
async def gateways(kafka: Settings, log: KafkaLog, tmp_path: Path) -> AsyncIterator[list[RunningGateway]]:
    """Two that share the partitions, so that each forwards some commands to the other."""
    own = replace(kafka, blobs_url=f"file:{tmp_path}/blobs", views_url=f"sqlite+aiosqlite:///{tmp_path}/views.db")
    async with AsyncExitStack() as stack:
        opened = [
            await stack.enter_async_context(running_gateway(replace(own, state_dir=tmp_path / name)))
            for name in ("one", "two")
        ]
        await opened[0].parts.blobs.migrate()
        one, two = (cast("KafkaWriter", gateway.parts.writer) for gateway in opened)
        await shared(one, two)
        yield opened


async def write(gateway: RunningGateway, method: str, path: str, **request: Any) -> Answered:
    began = time.monotonic()
    headers = {"Idempotency-Key": str(uuid4())}
    async with gateway.session.request(method, f"/v1/packages{path}", headers=headers, **request) as answer:
        assert answer.status in (200, 201), await answer.text()
        found = await answer.json()
    return Answered((found["package_id"], found["sequence"]), found["position"], began, time.monotonic())


async def life(one: RunningGateway, two: RunningGateway) -> list[Answered]:
    """A package with two files, whose writes go through one gateway and the other by turns."""
    made = await write(one, "POST", "", json=ABOUT)
    package = made.written[0]
    return [
        made,
        await write(two, "PUT", f"/{package}/files/a", data=b"a"),
        await write(one, "PUT", f"/{package}/files/b", data=b"b"),
        await write(two, "POST", f"/{package}/finalize"),
    ]


async def events_after(gateway: RunningGateway, position: str, **query: str) -> list[Written]:
    async with gateway.session.get("/v1/events", params={"since": position, **query}) as answer:
        assert answer.status == 200, await answer.text()
        return [_written(line) async for line in answer.content]


async def take(answer: aiohttp.ClientResponse, count: int) -> list[Written]:
    """The next so many events of a follower."""
    found: list[Written] = []
    async with asyncio.timeout(60):
        while len(found) < count:
            if line := (await answer.content.readline()).strip():
                found.append(_written(line))
    return found


def _written(line: bytes) -> Written:
    event = json.loads(line)
    return event["package_id"], event["sequence"]


async def test_reading_begins_exactly_after_a_write_at_the_other_gateway(
    gateways: list[RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "FRESH_SECONDS", 0.0)  # as if the second before a write had been quiet
    monkeypatch.setattr(direct, "PATIENCE_SECONDS", 30.0)
    one, two = gateways
    done: list[Answered] = []
    async with AsyncExitStack() as stack:
        followers: list[tuple[int, aiohttp.ClientResponse]] = []
        for number in range(6):
            done += await life(*(gateways if number % 2 else reversed(gateways)))
            query = {"follow": "true", "since": done[-2].position}
            answer = await stack.enter_async_context(gateways[number % 2].session.get("/v1/events", params=query))
            followers.append((len(done) - 1, answer))
        writes = [each.written for each in done]
        for begun, answer in followers:
            assert sorted(await take(answer, len(writes) - begun)) == sorted(writes[begun:])
    for number, each in enumerate(done):
        package, sequence = each.written
        for gateway in (one, two):
            assert sorted(await events_after(gateway, each.position)) == sorted(writes[number + 1 :])
            of_package = await events_after(gateway, each.position, package_id=package)
            assert of_package == [(package, n) for n in range(sequence + 1, 5)]


async def test_nothing_that_came_after_a_write_is_missed_while_both_gateways_write(
    gateways: list[RunningGateway], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct, "PATIENCE_SECONDS", 30.0)  # a slow machine's answers have positions too

    async def lives(one: RunningGateway, two: RunningGateway) -> list[Answered]:
        return [each for _ in range(4) for each in await life(one, two)]

    one, two = gateways
    found = await asyncio.gather(lives(one, two), lives(two, one), lives(one, two), lives(two, one))
    done = [each for some in found for each in some]
    for number, each in enumerate(done):
        after = await events_after(gateways[number % 2], each.position)
        assert len(after) == len(set(after))
        assert set(after) >= {other.written for other in done if other.began > each.ended}
        package, sequence = each.written
        assert [n for of, n in after if of == package] == list(range(sequence + 1, 5))
