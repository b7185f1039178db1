"""One package's events are read from its first to its last, however much its partition holds."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from uuid import UUID, uuid4

import pytest

from artifact_store.documents.event_lines import parse_event
from artifact_store.events import RecordedEvent
from artifact_store.models import EventFilter
from ingest_gateway.event_tail import Form, Tail
from ingest_gateway.routes.event_feed import FRAMES, LINES
from services.blobs.local import LocalBlobStore
from services.config import Settings
from services.core.decide import Command, FinalizePackage, IngestFiles, Limits
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.tail import Reader
from services.log.port import CommandWriter, PackageExtent, Record
from services.registry.direct import DirectRegistry
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.queries import Queries
from tests.commands import ingest
from tests.contract.log_stage import settled
from tests.integration.kafka_stage import create_in, gateway, kafka_settings, open_kafka_log
from tests.services.process import free_ports

pytestmark = pytest.mark.services

AS_LINES = Form(FRAMES[LINES])
FILLER = 1_000
"""Events before the package, and as many behind it, in its partition."""


@dataclass
class Stage:
    """Two gateways; the package lies in the middle of a partition that one of them writes to."""

    log: KafkaLog
    writers: tuple[KafkaWriter, KafkaWriter]
    package_id: UUID
    views: Views
    blobs: LocalBlobStore
    records: list[Record]
    """What readers have taken from the broker."""

    def registry(self, writer: CommandWriter) -> DirectRegistry:
        return DirectRegistry(self.log, writer, self.blobs, Queries(self.views), limits=Limits())


async def _fill(writer: CommandWriter) -> None:
    made = create_in(0)
    await settled(writer, made)
    await settled(writer, ingest(made.package_id, *(f"{n}.txt" for n in range(FILLER))))


@pytest.fixture
async def stage(kafka_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Stage]:
    settings: Settings = kafka_settings(kafka_url, tmp_path)
    records: list[Record] = []
    take = Reader.take

    def counted(self: Reader, limit: int, timeout: float, *, headers: bool = False) -> list[Record]:
        found = take(self, limit, timeout, headers=headers)
        records.extend(found)
        return found

    nowhere = f"postgresql+asyncpg://user@127.0.0.1:{free_ports(1)[0]}/views?ssl=disable"
    views = Views(nowhere)
    async with open_kafka_log(settings) as log, gateway(settings, log) as one, gateway(settings, log) as two:
        await _fill(one)
        made = create_in(0)
        commands: list[Command] = [made, ingest(made.package_id, "a", name="a"), ingest(made.package_id, "b", name="b")]
        for command in commands:
            await settled(one, command)
        await _fill(two)
        monkeypatch.setattr(Reader, "take", counted)
        opened = Stage(log, (one, two), made.package_id, views, LocalBlobStore(tmp_path / "blobs"), records)
        yield opened
        await opened.views.close()


async def _events(events: AsyncIterator[RecordedEvent]) -> list[RecordedEvent]:
    async with asyncio.timeout(30):
        return [event async for event in events]


async def test_the_writer_says_where_a_package_lies_to_whichever_gateway_asks(stage: Stage) -> None:
    events = await _events(stage.log.read(package_id=stage.package_id))
    extent = PackageExtent(events[0].created_at, 3)
    assert [await writer.extent(stage.package_id) for writer in stage.writers] == [extent, extent]
    assert [await writer.extent(uuid4()) for writer in stage.writers] == [None, None]
    assert len(stage.records) >= 2 * FILLER

    await settled(stage.writers[0], FinalizePackage(stage.package_id, uuid4(), "ada"))
    assert [await writer.extent(stage.package_id) for writer in stage.writers] == [
        PackageExtent(events[0].created_at, 4)
    ] * 2


async def test_a_packages_events_are_read_without_its_partition_and_without_the_database(stage: Stage) -> None:
    expected = await _events(stage.log.read(package_id=stage.package_id))
    for writer in stage.writers:
        registry = stage.registry(writer)
        stage.records.clear()
        found = await _events(registry.read_events(package_id=stage.package_id))
        assert [event.event_id for event in found] == [event.event_id for event in expected]
        assert len(stage.records) < FILLER
        rest = await _events(registry.read_events(found[0].position, package_id=stage.package_id))
        assert [event.sequence for event in rest] == [2, 3]
        stage.records.clear()
        assert await _events(registry.read_events(found[-1].position, package_id=stage.package_id)) == []
        assert len(stage.records) < FILLER

        stage.records.clear()
        tail, wanted = Tail(stage.log, extent=registry.package_extent), EventFilter(stage.package_id)
        async with (
            asyncio.timeout(30),
            aclosing(tail.read(None, await stage.log.end(), wanted, AS_LINES)) as pieces,
        ):
            lines = [line async for piece in pieces for line in piece.splitlines()]
        assert [parse_event(line).sequence for line in lines] == [1, 2, 3]
        assert len(stage.records) < FILLER


async def test_a_follower_of_a_package_reads_from_its_creation_to_the_end(stage: Stage) -> None:
    stage.records.clear()
    tail = Tail(stage.log, extent=stage.registry(stage.writers[0]).package_extent)
    lines: list[bytes] = []
    async with (
        asyncio.timeout(30),
        aclosing(tail.follow(None, EventFilter(stage.package_id), AS_LINES)) as pieces,
    ):
        while piece := await anext(pieces):
            lines += piece.splitlines()
        before = len(stage.records)
        adding = IngestFiles(stage.package_id, uuid4(), "ada", ingest(stage.package_id, "c").files)
        await settled(stage.writers[0], adding)
        lines += (await anext(pieces)).splitlines()
    assert [parse_event(line).sequence for line in lines] == [1, 2, 3, 4]
    assert before <= FILLER + 10


async def test_the_view_says_where_a_package_begins_when_no_writer_does(stage: Stage, tmp_path: Path) -> None:
    class Silent:
        async def extent(self, _package_id: UUID) -> None:
            return None

    silent = cast("CommandWriter", Silent())
    everything = await _events(stage.registry(silent).read_events(package_id=stage.package_id))
    stage.views = Views(f"sqlite+aiosqlite:///{tmp_path}/views.db")
    await stage.views.migrate()
    await catch_up(stage.views, stage.log, PROJECTIONS["registry"])
    stage.records.clear()
    found = await _events(stage.registry(silent).read_events(package_id=stage.package_id))
    assert found == everything
    assert [event.sequence for event in found] == [1, 2, 3]
    assert FILLER <= len(stage.records) <= FILLER + 10


async def test_reading_goes_on_after_a_write_through_any_gateway(stage: Stage) -> None:
    """Also when another gateway writes to the package's partition, and when events lie in other partitions."""
    one, two = (stage.registry(writer) for writer in stage.writers)
    for number in range(12):
        await two.create(f"before {number}", "p", "s", "scratch", "ada", {})
        done = await one.create(f"mine {number}", "p", "s", "scratch", "ada", {})
        later = await two.create(f"after {number}", "p", "s", "scratch", "ada", {})
        assert done.position is not None
        seen = [event.package_id for event in await _events(stage.log.read(done.position))]
        assert later.package_id in seen
        assert done.package_id not in seen
    for registry in (one, two):
        await registry.close()
