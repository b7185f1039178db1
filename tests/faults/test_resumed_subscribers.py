"""Subscribers that are cut off repeatedly get every event once, whichever gateway they reconnect to.

Prints its seed; `FAULT_SEED` repeats it, as far as processes can be repeated.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from uuid import UUID

import aiohttp
import pytest

from artifact_store import Client, RetryPolicy
from artifact_store.events import PackageCreated, RecordedEvent
from artifact_store.models import EventFilter
from services.config import Settings
from services.log.kafka import KafkaLog
from tests.integration.processes import ProductProcess, output_of
from tests.services.process import free_ports

pytestmark = [pytest.mark.services, pytest.mark.processes, pytest.mark.endurance, pytest.mark.timeout(1800)]

SUBSCRIBERS = 100
RESUMES = 20
RESTARTS = 6
PACKAGES = 60
"""Published at least while they are cut off."""

FILES = 3
SEED = int(os.environ.get("FAULT_SEED", Random().randrange(1 << 32)))

_FILE, _CREATED, _FINALIZED = "v1.file.ingested", "v1.package.created", "v1.package.finalized"
_CLASSES = ("scratch", "report")
FILTERS = (
    EventFilter(),
    EventFilter(producers={"p0"}),
    EventFilter(producers={"p1", "p2"}, types={_FILE}),
    EventFilter(subjects={"s1"}),
    EventFilter(retention_classes={"report"}, types={_CREATED, _FINALIZED}),
    EventFilter(producers={"p0", "p2"}, subjects={"s0", "s2"}, retention_classes={"scratch"}),
    EventFilter(producers={"nobody"}),
)


@dataclass
class Subscriber:
    """An event source: it knows its last id and nothing else of where it stands."""

    wanted: EventFilter
    draw: Random
    resumes: int = 0
    last_id: str = ""
    seen: list[tuple[str, int]] = field(default_factory=list)

    async def follow(self, urls: Sequence[str], expected: asyncio.Future[dict[int, int]]) -> None:
        """Connect, read for a while and cut, until it has resumed often enough and has what it must get."""
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
            while not self._has_all(expected) or self.resumes < RESUMES:
                with suppress(aiohttp.ClientError, TimeoutError, ConnectionError):
                    async with asyncio.timeout(self.draw.uniform(0.05, 1.5)):
                        await self._read(session, self.draw.choice(urls))
                await asyncio.sleep(0.02)  # the other gateway is there, or this one soon

    def _has_all(self, expected: asyncio.Future[dict[int, int]]) -> bool:
        return expected.done() and len(self.seen) >= expected.result()[FILTERS.index(self.wanted)]

    async def _read(self, session: aiohttp.ClientSession, url: str) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": self.last_id}
        names = ("producer", "subject", "retention_class", "type")
        values = (self.wanted.producers, self.wanted.subjects, self.wanted.retention_classes, self.wanted.types)
        query = [("follow", "true"), *((name, v) for name, some in zip(names, values, strict=True) for v in some)]
        async with session.get(f"{url}/v1/events", params=query, headers=headers) as answer:
            if answer.status != 200:
                return
            self.resumes += bool(self.last_id)
            rest = b""
            async for piece in answer.content.iter_any():
                *blocks, rest = (rest + piece).split(b"\n\n")
                for block in blocks:
                    self._take(block.decode())

    def _take(self, block: str) -> None:
        """As an `EventSource` does it: the id counts once the whole event is there."""
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        self.last_id = fields.get("id", self.last_id)
        if "data" in fields:
            event = json.loads(fields["data"])
            self.seen.append((event["package_id"], event["sequence"]))


async def test_every_event_comes_once_and_in_order_of_its_package(real_settings: Settings, tmp_path: Path) -> None:
    print(f"FAULT_SEED={SEED}")  # noqa: T201 - to repeat it
    draw = Random(SEED)
    output_of(real_settings, "migrate")
    gateways = [
        ProductProcess(real_settings, tmp_path / f"gateway-{number}", "gateway", port=port)
        for number, port in enumerate(free_ports(2))
    ]
    urls = [gateway.endpoint for gateway in gateways]
    with gateways[0], gateways[1]:
        expected: asyncio.Future[dict[int, int]] = asyncio.get_running_loop().create_future()
        subscribers = [
            Subscriber(FILTERS[number % len(FILTERS)], Random(draw.random())) for number in range(SUBSCRIBERS)
        ]
        async with asyncio.timeout(1500), asyncio.TaskGroup() as tasks:
            for subscriber in subscribers:
                tasks.create_task(subscriber.follow(urls, expected))
            restarting = tasks.create_task(asyncio.to_thread(_restart, gateways, draw))
            published = 0
            while published < PACKAGES or not restarting.done() or not all(map(_is_done, subscribers)):
                await _publish(draw.choice(urls), draw)
                published += 1
            events = await _all_events(real_settings)
            expected.set_result({n: len(_wanted(events, wanted)) for n, wanted in enumerate(FILTERS)})
    print(f"{len(events):,} events, {sum(s.resumes for s in subscribers):,} connections")  # noqa: T201
    for subscriber in subscribers:
        wanted = _wanted(events, subscriber.wanted)
        assert sorted(subscriber.seen) == sorted(wanted)
        for package_id in {package_id for package_id, _ in wanted}:
            numbers = [number for found, number in subscriber.seen if found == package_id]
            assert numbers == sorted(numbers)


def _is_done(subscriber: Subscriber) -> bool:
    """Whether it has resumed often enough. One of whose events none is wanted resumes from positions alone."""
    return subscriber.resumes >= RESUMES


def _restart(gateways: Sequence[ProductProcess], draw: Random) -> None:
    """Kill or stop one gateway after the other, and start it again. Blocks."""
    for number in range(RESTARTS):
        gateway = gateways[number % len(gateways)]
        if draw.random() < 0.5:
            gateway.kill()
        else:
            gateway.stop()
        gateway.start()


async def _publish(url: str, draw: Random) -> None:
    """A package, by whichever gateway is there."""
    policy = RetryPolicy(total_seconds=120.0)
    async with Client(url, policy, lambda *_: None) as registry:
        package = await registry.create_package(
            "n", f"p{draw.randrange(4)}", f"s{draw.randrange(3)}", draw.choice(_CLASSES)
        )
        for number in range(FILES):
            await registry.ingest_file(package, f"{number}", "x/y", f"{number}".encode())
        await registry.finalize_package(package)


async def _all_events(settings: Settings) -> list[RecordedEvent]:
    log = KafkaLog(settings)
    try:
        return [event async for event in log.read()]
    finally:
        await log.close()


def _wanted(events: Sequence[RecordedEvent], wanted: EventFilter) -> list[tuple[str, int]]:
    created: dict[UUID, PackageCreated] = {
        event.package_id: event.payload for event in events if isinstance(event.payload, PackageCreated)
    }
    found = []
    for event in events:
        origin = created[event.package_id]
        if wanted.takes(event.package_id, event.event_type) and wanted.includes(
            origin.producer, origin.subject, origin.retention_class
        ):
            found.append((str(event.package_id), event.sequence))
    return found
