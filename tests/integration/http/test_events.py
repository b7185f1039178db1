"""Events over HTTP: read to the end, followed, resumed, and dismissed."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from typing import Any
from uuid import UUID

import aiohttp
import pytest

from artifact_store.documents.event_lines import parse_event
from ingest_gateway.admission import Followers
from ingest_gateway.event_tail import Form
from ingest_gateway.routes import event_feed as events
from schemas.codec import EVENT_TYPES, schema_fingerprint, schema_text
from schemas.digests import event_digest
from services.config import Settings
from services.registry.direct import DirectRegistry
from tests.documents import blocks
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import STALLING_BYTES, connected

_PACKAGE = {"name": "n", "producer": "p", "subject": "s", "retention_class": "scratch", "metadata": {"a": [1, 2.5]}}
_STREAM = {"Accept": "text/event-stream"}


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings, max_followers=6, heartbeat_seconds=0.1) as running:
        yield running


async def _publish(gateway: RunningGateway) -> str:
    """A finalized package with one file: three events."""
    async with gateway.session.post("/v1/packages", json=_PACKAGE) as answer:
        path = answer.headers["Location"]
    await gateway.session.put(f"{path}/files/a", data=b"bytes")
    await gateway.session.post(f"{path}/finalize")
    return path.rpartition("/")[2]


async def _lines(gateway: RunningGateway, **query: str) -> list[bytes]:
    async with gateway.session.get("/v1/events", params=query) as answer:
        assert (answer.status, answer.content_type) == (200, "application/x-ndjson")
        return [line for line in (await answer.read()).splitlines() if line]


async def _line(answer: aiohttp.ClientResponse) -> bytes:
    """The next line that is not empty."""
    while not (line := await answer.content.readline()).strip():
        pass
    return line


def _stream_events(text: str) -> list[dict[str, Any]]:
    found = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            found.append(fields)
    return found


async def test_lines_are_the_events_of_the_log(gateway: RunningGateway) -> None:
    await _publish(gateway)
    await _publish(gateway)
    expected = [event async for event in gateway.parts.log.read()]
    lines = await _lines(gateway)
    assert [parse_event(line) for line in lines] == expected
    first = json.loads(lines[0])
    assert first.keys() >= {"type", "id", "package_id", "sequence", "created_at", "actor", "command_id", "payload"}
    assert first.keys() >= {"payload_digest", "previous_digest", "position", "command_index", "command_count"}
    assert first["payload"]["metadata"] == {"a": [1, 2.5]}


async def test_reading_goes_on_behind_any_position(gateway: RunningGateway) -> None:
    await _publish(gateway)
    lines = await _lines(gateway)
    for index, line in enumerate(lines):
        assert await _lines(gateway, since=json.loads(line)["position"]) == lines[index + 1 :]


async def test_one_package_can_be_read_alone(gateway: RunningGateway) -> None:
    package = await _publish(gateway)
    await _publish(gateway)
    lines = await _lines(gateway, package_id=package)
    assert [json.loads(line)["sequence"] for line in lines] == [1, 2, 3]
    assert {json.loads(line)["package_id"] for line in lines} == {package}


async def test_a_request_for_one_package_asks_where_in_the_log_it_lies(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []

    async def extent(_: DirectRegistry, package_id: UUID) -> None:
        asked.append(str(package_id))

    monkeypatch.setattr(DirectRegistry, "package_extent", extent)
    async with running_gateway(embedded_settings) as gateway:
        package = await _publish(gateway)
        await _lines(gateway)
        assert asked == []
        assert len(await _lines(gateway, package_id=package)) == 3
    assert asked == [package]


async def test_a_stream_has_the_position_as_id_and_goes_on_behind_it(gateway: RunningGateway) -> None:
    await _publish(gateway)
    async with gateway.session.get("/v1/events", headers=_STREAM) as answer:
        assert answer.content_type == "text/event-stream"
        events = _stream_events(await answer.text())
    assert [event["event"] for event in events] == ["v1.package.created", "v1.file.ingested", "v1.package.finalized"]
    assert all(json.loads(event["data"])["position"] == event["id"] for event in events)
    # A browser that reconnects sends the last id along with the URL it began with: the id is the newer one.
    headers = {**_STREAM, "Last-Event-ID": events[1]["id"]}
    async with gateway.session.get("/v1/events", params={"since": events[0]["id"]}, headers=headers) as answer:
        assert [event["id"] for event in _stream_events(await answer.text())] == [events[2]["id"]]


async def test_a_follower_sees_what_was_and_what_comes(gateway: RunningGateway) -> None:
    await _publish(gateway)
    async with gateway.session.get("/v1/events?follow=true") as answer:
        before = [parse_event(await _line(answer)) for _ in range(3)]
        package = await _publish(gateway)
        after = [parse_event(await _line(answer)) for _ in range(3)]
    assert [event.sequence for event in before] == [1, 2, 3]
    assert [str(event.package_id) for event in after] == [package] * 3


async def test_a_follower_of_a_quiet_log_gets_its_head_at_once_and_comments_to_stay(gateway: RunningGateway) -> None:
    async with gateway.session.get("/v1/events?follow=true", headers=_STREAM) as answer:
        assert answer.status == 200
        assert await answer.content.readline() == b":\n"


@pytest.mark.parametrize("media_type", ["text/event-stream", "application/x-ndjson"])
async def test_a_followers_place_is_free_as_soon_as_its_connection_is_closed(
    embedded_settings: Settings, media_type: str
) -> None:
    async with running_gateway(embedded_settings, max_followers=2) as gateway:  # one from each address
        for _ in range(50):
            async with connected(gateway.port) as follower:
                follower.send("GET /v1/events?follow=true", f"Accept: {media_type}")
                status, headers = await follower.head()
                assert (status, headers["content-type"], "content-length" in headers) == (200, media_type, False)


async def test_an_event_source_that_finds_no_room_gets_an_answer_after_which_it_tries_again(
    gateway: RunningGateway,
) -> None:
    staying = [await gateway.session.get("/v1/events?follow=true") for _ in range(3)]
    async with gateway.session.get("/v1/events?follow=true", headers=_STREAM) as answer:
        assert (answer.status, answer.content_type) == (200, "text/event-stream")
        assert answer.headers["Connection"] == "close"
        comment, retry, end = (await answer.text()).split("\n", 2)
    assert comment.startswith(": 429 urn:artifact-store:problem:too-many-at-once: ")
    assert int(retry.removeprefix("retry: ")) >= 1000
    assert end == "\n"
    for follower in staying:
        follower.close()


@pytest.mark.parametrize("query", ["?since=nowhere", "?package_id=nothing", "?unknown=1"])
async def test_an_event_source_is_told_of_its_mistakes_by_the_status(gateway: RunningGateway, query: str) -> None:
    async with gateway.session.get(f"/v1/events{query}", headers=_STREAM) as answer:
        assert (answer.status, answer.content_type) == (400, "application/problem+json")


async def test_an_empty_last_event_id_counts_as_absent(gateway: RunningGateway) -> None:
    await _publish(gateway)
    lines = await _lines(gateway)
    params, headers = {"since": json.loads(lines[0])["position"]}, {"Last-Event-ID": ""}
    async with gateway.session.get("/v1/events", params=params, headers=headers) as answer:
        assert answer.status == 200
        assert [line for line in (await answer.read()).splitlines() if line] == lines[1:]


async def test_empty_lines_keep_a_follower_of_lines_connected(gateway: RunningGateway) -> None:
    async with gateway.session.get("/v1/events?follow=true") as answer:
        assert [await answer.content.readline() for _ in range(2)] == [b"\n", b"\n"]
        package = await _publish(gateway)
        assert str(parse_event(await _line(answer)).package_id) == package


async def test_followers_are_bounded_and_their_places_become_free(gateway: RunningGateway) -> None:
    staying = [await gateway.session.get("/v1/events?follow=true") for _ in range(3)]
    async with gateway.session.get("/v1/events?follow=true") as answer:
        assert answer.status == 429
        assert int(answer.headers["Retry-After"]) >= 1
        assert (await answer.json(content_type=None))["type"].endswith(":too-many-at-once")
    assert await _lines(gateway) == []  # who does not stay has places of its own
    for follower in staying:
        follower.close()

    async def free() -> bool:
        async with gateway.session.get("/v1/events?follow=true") as again:
            return again.status == 200

    await until(free, 10, "no place became free")


async def test_a_slow_follower_is_waited_for_and_loses_nothing(embedded_settings: Settings) -> None:
    async with running_gateway(embedded_settings) as gateway:
        metadata = {"text": "x" * 60_000}
        async with gateway.session.get("/v1/events?follow=true") as answer:
            for _ in range(60):
                await gateway.session.post("/v1/packages", json={**_PACKAGE, "metadata": metadata})
            seen = [parse_event(await answer.content.readuntil(b"\n")) for _ in range(60)]
        assert seen == [event async for event in gateway.parts.log.read()]


async def test_followers_are_let_go_when_the_gateway_stops(embedded_settings: Settings) -> None:
    session = aiohttp.ClientSession()
    async with running_gateway(embedded_settings, drain_seconds=30) as gateway:
        answer = await session.get(f"{gateway.url}/v1/events?follow=true")
        assert answer.status == 200
    async with asyncio.timeout(60):
        assert await answer.read() == b""  # a clean end: the position that was seen last leads on
    await session.close()


async def test_a_follower_that_is_let_go_before_its_first_event_is_told_to_come_again(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    reading = asyncio.Event()

    async def silent(*_: Any, follow: bool = False, **__: Any) -> AsyncIterator[Any]:
        if not follow:  # it is the follower itself, which catches up, and not the tail of all
            reading.set()
        await asyncio.Event().wait()
        yield

    async with aiohttp.ClientSession() as session:
        async with running_gateway(embedded_settings) as gateway:
            await _publish(gateway)
            monkeypatch.setattr(gateway.parts.log, "read", silent)
            asked = asyncio.create_task(session.get(f"{gateway.url}/v1/events?follow=true"))
            await reading.wait()
        async with await asked as answer:
            assert answer.status == 503
            assert int(answer.headers["Retry-After"]) >= 1
            assert (await answer.json(content_type=None))["type"].endswith(":push-back")


async def test_a_follower_that_is_let_go_within_an_event_is_cut_off(
    embedded_settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    dismissed = asyncio.Event()
    dismiss = Followers.dismiss

    def told(followers: Followers) -> None:
        dismiss(followers)
        asyncio.get_running_loop().call_later(0, dismissed.set)

    monkeypatch.setattr(Followers, "dismiss", told)
    monkeypatch.setitem(events.FORMS, (events.LINES, True), Form(lambda *_: bytes(STALLING_BYTES)))
    async with AsyncExitStack() as stack:
        gateway = await stack.enter_async_context(running_gateway(embedded_settings))
        await _publish(gateway)
        async with connected(gateway.port) as follower:
            follower.send("GET /v1/events?follow=true")
            assert (await follower.head())[0] == 200
            closing = asyncio.create_task(stack.pop_all().aclose())
            await dismissed.wait()
            rest = await follower.rest()
            await closing
    assert len(rest) < STALLING_BYTES
    assert not rest.endswith(b"0\r\n\r\n"), "a clean end within a line"


async def test_digests_are_computed_from_json_as_the_guide_says(gateway: RunningGateway) -> None:
    first, second = [await _publish(gateway) for _ in range(2)]
    lines = await _lines(gateway)
    script = [sys.executable, "-c", blocks("docs/subscribing.md")["check"]]
    done = await asyncio.to_thread(subprocess.run, script, input=b"\n".join(lines), capture_output=True, check=True)
    heads = {event.package_id: event for event in map(parse_event, lines)}
    expected = {str(package_id): event_digest(event).hex() for package_id, event in heads.items()}
    assert dict(line.split() for line in done.stdout.decode().splitlines()) == expected
    assert expected.keys() == {first, second}
    changed = b"\n".join(lines).replace(b'"actor":"anonymous"', b'"actor":"eve"', 1)
    done = await asyncio.to_thread(subprocess.run, script, input=changed, capture_output=True, check=False)
    assert b"is not what was written" in done.stderr


def test_positions_and_offsets_map_as_the_guide_says() -> None:
    exec(blocks("docs/subscribing.md")["position"], {})  # noqa: S102 - the guide's own example


async def test_a_schema_is_served_by_its_fingerprint(gateway: RunningGateway) -> None:
    for event_type in EVENT_TYPES:
        async with gateway.session.get(f"/v1/schemas/{schema_fingerprint(event_type).hex()}") as answer:
            assert (answer.status, await answer.text()) == (200, schema_text(event_type))
    for fingerprint, status in (("0" * 16, 404), ("nothing", 400)):
        async with gateway.session.get(f"/v1/schemas/{fingerprint}") as answer:
            assert answer.status == status


async def test_a_log_that_breaks_cuts_the_stream(gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch) -> None:
    await _publish(gateway)
    healthy = gateway.parts.log.read

    async def breaking(*args: Any, **kwargs: Any) -> AsyncIterator[Any]:
        async for event in healthy(*args, **kwargs):
            yield event
            if event.sequence == 2:
                raise RuntimeError("the disk is gone")

    monkeypatch.setattr(gateway.parts.log, "read", breaking)
    with pytest.raises((aiohttp.ClientPayloadError, aiohttp.ClientConnectionError)):
        await _lines(gateway)
