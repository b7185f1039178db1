"""A follower's parameters: which events, from where, in which form; and its progress past filtered events."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import parse_qs
from uuid import UUID, uuid4

import aiohttp
import pytest

from artifact_store import Client
from artifact_store.documents import times
from artifact_store.documents.event_lines import parse_event
from artifact_store.errors import InvalidRequestError
from artifact_store.events import PackageFinalized, RecordedEvent
from artifact_store.models import EventFilter
from services.config import Settings
from tests.integration.http.test_archive import tar_of
from tests.integration.http_gateway import RunningGateway, running_gateway

LINES, STREAM = "application/x-ndjson", "text/event-stream"


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    """Three finalized packages: of producers a, a and b, subjects x, y and y, classes scratch, report and scratch."""
    async with running_gateway(embedded_settings, heartbeat_seconds=0.1) as running:
        for producer, subject, kind in (("a", "x", "scratch"), ("a", "y", "report"), ("b", "y", "scratch")):
            registry = running.parts.registry
            package = await registry.create_package(f"{producer}{subject}", producer, subject, kind)
            await registry.ingest_file(package, "file", "x/y", b"bytes")
            await registry.finalize_package(package)
        yield running


async def recorded(gateway: RunningGateway) -> list[RecordedEvent]:
    return [event async for event in gateway.parts.log.read()]


async def read(gateway: RunningGateway, query: str, media_type: str = LINES) -> tuple[list[dict[str, Any]], str]:
    """The events, and the position of the log's end."""
    async with gateway.session.get(f"/v1/events?{query}", headers={"Accept": media_type}) as answer:
        assert (answer.status, answer.content_type) == (200, media_type), await answer.text()
        lines = (await answer.text()).splitlines()
        data = [line.removeprefix("data: ") for line in lines if line.startswith(("{", "data: "))]
        return [json.loads(line) for line in data], answer.headers["X-Log-End"]


async def test_programs_filter_as_http_does(gateway: RunningGateway) -> None:
    """In this process, and through the gateway."""
    events = await recorded(gateway)
    names = {event.package_id: event.payload.name for event in events if event.sequence == 1}  # type: ignore[union-attr]
    async with Client(gateway.url) as client:
        for query, wanted, types in FILTERS:
            asked = parse_qs(query)
            where = EventFilter(
                producers=set(asked.get("producer", ())),
                subjects=set(asked.get("subject", ())),
                retention_classes=set(asked.get("retention_class", ())),
                types=set(asked.get("type", ())),
            )
            expected = [
                event
                for event in events
                if names[event.package_id] in wanted and (types is None or event.event_type in types)
            ]
            for registry in (client, gateway.parts.registry):
                assert [event async for event in registry.read_events(where=where)] == expected, query
        alone = EventFilter(events[0].package_id, types={events[2].event_type})
        for registry in (client, gateway.parts.registry):
            assert [event async for event in registry.read_events(where=alone)] == [events[2]]
            assert [e async for e in registry.read_events(package_id=alone.package_id, where=alone)] == [events[2]]
            with pytest.raises(InvalidRequestError, match="different packages"):
                await anext(aiter(registry.read_events(package_id=events[-1].package_id, where=alone)))


async def test_programs_begin_where_http_does(gateway: RunningGateway) -> None:
    events = await recorded(gateway)
    at = events[4]
    moment = datetime.fromtimestamp(0, UTC) + timedelta(microseconds=at.created_at)
    async with Client(gateway.url) as client:
        for registry in (client, gateway.parts.registry):
            for since in (moment, moment.isoformat(), times.to_text(at.created_at)):
                found = [event async for event in registry.read_events(since)]
                assert at in found
                assert all(event.created_at // 1_000 >= at.created_at // 1_000 for event in found)
            assert [event async for event in registry.read_events("now")] == []
            assert [event async for event in registry.read_events(str(at.position))] == events[5:]
            in_time = [event async for event in registry.read_events(order="time")]
            assert [event.event_id for event in in_time] == [event.event_id for event in events]
            with pytest.raises(InvalidRequestError):
                await anext(aiter(registry.read_events("yesterday")))
            with pytest.raises(InvalidRequestError):
                await anext(aiter(registry.read_events(moment.replace(tzinfo=None))))
            with pytest.raises(InvalidRequestError):
                await anext(aiter(registry.read_events(order="time", follow=True)))


async def test_programs_follow_what_they_filter(gateway: RunningGateway) -> None:
    end, wanted = await gateway.parts.log.end(), EventFilter(producers={"b"})
    async with Client(gateway.url) as client, asyncio.timeout(60):
        for registry in (client, gateway.parts.registry):
            events = registry.tail_events(0, 0.01, since=end, where=wanted)
            await gateway.parts.registry.create_package("later", "a", "y", "scratch")
            ours = await gateway.parts.registry.create_package("later", "b", "y", "scratch")
            event = await anext(events)
            assert event.package_id == ours
            end = event.position


FILTERS = [
    ("producer=a", "axay", None),
    ("producer=a&producer=b", "axayby", None),
    ("producer=nobody", "", None),
    ("subject=y", "ayby", None),
    ("producer=a&subject=y", "ay", None),
    ("retention_class=report", "ay", None),
    ("type=v1.package.finalized", "axayby", {"v1.package.finalized"}),
    ("type=v1.package.created&type=v1.package.finalized", "axayby", {"v1.package.created", "v1.package.finalized"}),
    ("type=v7.package.imagined", "", set[str]()),
    ("type=v1.file.ingested&producer=b&retention_class=scratch", "by", {"v1.file.ingested"}),
]


@pytest.mark.parametrize("media_type", [LINES, STREAM])
async def test_events_are_filtered_by_producer_subject_class_and_type(gateway: RunningGateway, media_type: str) -> None:
    events = await recorded(gateway)
    names = {event.package_id: event.payload.name for event in events if event.sequence == 1}  # type: ignore[union-attr]
    for query, wanted, types in FILTERS:
        expected = [
            str(event.event_id)
            for event in events
            if names[event.package_id] in wanted and (types is None or event.event_type in types)
        ]
        found, _ = await read(gateway, query, media_type)
        assert [event["id"] for event in found] == expected, query


async def test_a_follower_sees_the_wanted_ones_alone_of_what_was_and_what_comes(gateway: RunningGateway) -> None:
    query = "follow=true&producer=b&type=v1.package.created&type=v1.package.finalized"
    async with gateway.session.get(f"/v1/events?{query}") as answer, asyncio.timeout(60):
        seen = [await event_of(answer.content) for _ in range(2)]
        await gateway.parts.registry.create_package("later", "a", "y", "scratch")
        later = await gateway.parts.registry.create_package("later", "b", "y", "scratch")
        seen.append(await event_of(answer.content))
    assert [event.sequence for event in seen] == [1, 3, 1]
    assert seen[-1].package_id == later


async def event_of(content: aiohttp.StreamReader) -> RecordedEvent:
    while not (line := await content.readline()).strip():
        pass
    return parse_event(line)


async def test_reading_begins_now_at_a_time_or_at_the_end_that_was_asked_for(gateway: RunningGateway) -> None:
    events = await recorded(gateway)
    async with gateway.session.get("/v1/events/end") as answer:
        end = (await answer.json())["position"]
    assert end == str(events[-1].position)
    assert await read(gateway, "since=now") == ([], end)
    assert await read(gateway, f"since={end}") == ([], end)
    for at in events:
        found, _ = await read(gateway, f"since={times.to_text(at.created_at)}")
        wanted = [str(event.event_id) for event in events if event.created_at >= at.created_at]
        assert [event["id"] for event in found][-len(wanted) :] == wanted
        first = times.from_text(found[0]["created_at"])
        assert first // 1_000 == at.created_at // 1_000 or first >= at.created_at
    assert await read(gateway, "since=2999-01-01T00:00:00Z") == ([], end)
    assert len((await read(gateway, "since=1970-01-01T00:00:00%2B00:00"))[0]) == len(events)
    query = "follow=true&since=now"
    async with gateway.session.get(f"/v1/events?{query}") as answer, asyncio.timeout(60):
        later = await gateway.parts.registry.create_package("later", "a", "y", "scratch")
        assert (await event_of(answer.content)).package_id == later


async def test_every_write_says_where_reading_goes_on_after_it(gateway: RunningGateway) -> None:
    async def position(method: str, path: str, **request: Any) -> str:
        headers = {"Idempotency-Key": str(uuid4()), **request.pop("headers", {})}
        answers = []
        for _ in range(2):  # the second is a repeat
            async with gateway.session.request(method, path, headers=headers, **request) as answer:
                assert answer.status in (200, 201), await answer.text()
                answers.append(await answer.json())
        assert answers[0] == answers[1]
        packages.append(answers[0]["package_id"])
        found: str = answers[0]["position"]
        assert found == (await read(gateway, ""))[0][-1]["position"]
        assert (await read(gateway, f"since={found}"))[0] == []
        return found

    packages: list[str] = []
    about = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch"}
    first = await position("POST", "/v1/packages", json=about)
    package = f"/v1/packages/{packages[0]}"
    await position("PUT", f"{package}/files/a", data=b"a")
    archive = tar_of({"b": b"b", "c": b"c"})
    await position("POST", f"{package}/files", data=archive, headers={"Content-Type": "application/x-tar"})
    await position("POST", f"{package}/finalize")
    rest, _ = await read(gateway, f"since={first}")
    assert [event["sequence"] for event in rest] == [2, 3, 4, 5]


@pytest.mark.parametrize("query", ["since=2026-01-01T00:00", "since=yesterday", "type=x", "order=time&follow=true"])
async def test_what_cannot_be_asked_for_is_refused(gateway: RunningGateway, query: str) -> None:
    async with gateway.session.get(f"/v1/events?{query}") as answer:
        assert answer.status == 400


@pytest.mark.parametrize("media_type", [LINES, STREAM])
async def test_a_follower_of_which_nothing_is_wanted_hears_how_far_it_has_come(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch, media_type: str
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.MARK_SECONDS", 0.05)
    query = "follow=true&positions=true&producer=nobody"
    async with (
        gateway.session.get(f"/v1/events?{query}", headers={"Accept": media_type}) as answer,
        asyncio.timeout(60),
    ):
        assert await position_of(answer.content) == str(await gateway.parts.log.end())
        await gateway.parts.registry.create_package("later", "a", "y", "scratch")
        end = str(await gateway.parts.log.end())
        while await position_of(answer.content) != end:
            pass
    assert await read(gateway, f"since={end}") == ([], end)


async def position_of(content: aiohttp.StreamReader) -> str:
    while True:
        line = (await content.readline()).decode().strip()
        if line.startswith("id: "):
            return line.removeprefix("id: ")
        if line.startswith("{"):
            found = json.loads(line)
            assert found.keys() == {"type", "position"}
            assert found["type"] == "position"
            return str(found["position"])


async def test_lines_hold_no_positions_unless_they_are_asked_for(gateway: RunningGateway) -> None:
    assert (await read(gateway, "producer=nobody"))[0] == []
    found, end = await read(gateway, "producer=nobody&positions=true")
    assert found == [{"type": "position", "position": end}]


@pytest.mark.parametrize("media_type", [LINES, STREAM])
async def test_manifests_are_left_out_on_request(gateway: RunningGateway, media_type: str) -> None:
    (first, *_), _ = await read(gateway, "type=v1.package.finalized&manifests=false", media_type)
    (whole, *_), _ = await read(gateway, "type=v1.package.finalized", media_type)
    assert whole["payload"]["manifest"] is not None
    assert first == {**whole, "payload": {**whole["payload"], "manifest": None}}
    async with gateway.session.get(f"/v1/packages/{UUID(first['package_id'])}/manifest") as answer:
        assert answer.headers["ETag"] == f'"blake3:{first["payload_digest"]}"'
    async with gateway.session.get("/v1/events?follow=true&type=v1.package.finalized&manifests=false") as answer:
        payload = (await event_of(answer.content)).payload
    assert isinstance(payload, PackageFinalized)
    assert payload.manifest is None


async def test_history_by_time_goes_on_after_any_of_its_positions(gateway: RunningGateway) -> None:
    events, _ = await read(gateway, "order=time&type=v1.file.ingested")
    assert [event["sequence"] for event in events] == [2, 2, 2]
    rest, _ = await read(gateway, f"order=time&type=v1.file.ingested&since={events[0]['position']}")
    assert [event["id"] for event in rest] == [event["id"] for event in events[1:]]
