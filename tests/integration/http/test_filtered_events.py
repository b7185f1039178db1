"""Events for readers with limited rights: filtered, with positions that advance, and ended with the token."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from http.cookies import Morsel
from types import SimpleNamespace
from uuid import UUID, uuid4

import aiohttp
import pytest

from artifact_store.documents.event_lines import parse_event
from artifact_store.errors import UnavailableError
from artifact_store.position import Position
from ingest_gateway.protocol import request
from ingest_gateway.routes.event_feed import COOKIE
from services.config import Settings
from services.core.access import Right
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS, STALLING_BYTES, connected
from tests.integration.tokens import Tokens, bearer, principal

OWN = principal("t", Right.READ, producers=("own",))
HEARTBEAT_SECONDS = 0.05
LAST_CHUNK = b"0\r\n\r\n"


@pytest.fixture
def tokens() -> Tokens:
    return Tokens(t=OWN)


@pytest.fixture
async def gateway(embedded_settings: Settings, tokens: Tokens) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings, authenticate=tokens, heartbeat_seconds=HEARTBEAT_SECONDS) as running:
        yield running


async def create(gateway: RunningGateway, *producers: str) -> list[UUID]:
    registry = gateway.parts.registry
    return [await registry.create_package("n", producer, "s", "scratch") for producer in producers]


async def read(gateway: RunningGateway, since: str | None = None) -> list[tuple[UUID, str]]:
    """Package and position of each event."""
    params = {} if since is None else {"since": since}
    async with gateway.session.get("/v1/events", params=params, headers=bearer("t")) as answer:
        assert answer.status == 200
        events = [parse_event(line) for line in (await answer.read()).splitlines() if line]
    return [(event.package_id, str(event.position)) for event in events]


async def test_positions_go_on_over_what_is_left_out(gateway: RunningGateway) -> None:
    own, _, _, later = await create(gateway, "own", "foreign", "foreign", "own")
    first, second = await read(gateway)
    assert (first[0], second[0]) == (own, later)
    end = await gateway.parts.log.end()
    assert Position.parse(second[1]) == end
    assert await read(gateway, second[1]) == []


@pytest.mark.parametrize("known", [True, False])
async def test_events_after_a_creation_that_was_not_seen_are_filtered_too(
    gateway: RunningGateway, known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = gateway.parts.registry
    own, foreign = await create(gateway, "own", "foreign")
    since = str(await gateway.parts.log.end())
    for package in (own, foreign):
        await registry.finalize_package(package)
    if known:
        await registry.list_packages()  # which brings the view up to the log
    else:

        async def away(*_: object) -> dict[UUID, tuple[str, str]]:
            raise UnavailableError("the database is away")

        monkeypatch.setattr("services.views.queries.Queries.origins", away)
    assert [package for package, _ in await read(gateway, since)] == [own]


async def test_a_follower_sees_its_own_events_alone_and_hears_how_far_it_has_come(
    gateway: RunningGateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ingest_gateway.event_tail.MARK_SECONDS", 0.0)
    await create(gateway, "foreign")
    headers = {**bearer("t"), "Accept": "text/event-stream"}
    async with gateway.session.get("/v1/events?follow=true", headers=headers) as answer, asyncio.timeout(30):
        assert await mark(answer) == await gateway.parts.log.end()  # after what was there
        await create(gateway, "foreign")
        while await mark(answer) != await gateway.parts.log.end():  # and after what comes
            pass
        (own,) = await create(gateway, "own")
        block = b""
        while b"data:" not in block:
            block = await answer.content.readuntil(b"\n\n")
    assert str(own).encode() in block


@pytest.mark.parametrize("media_type", ["text/event-stream", "application/x-ndjson"])
async def test_nothing_tells_whether_there_is_a_package_that_may_not_be_read(
    gateway: RunningGateway, media_type: str
) -> None:
    (foreign,) = await create(gateway, "foreign")
    headers = {**bearer("t"), "Accept": media_type}
    for package_id in (foreign, uuid4()):
        params = {"package_id": str(package_id)}
        async with gateway.session.get("/v1/events", params=params, headers=headers) as answer:
            assert (answer.status, (await answer.read()).strip(b":\n")) == (200, b"")


async def mark(answer: aiohttp.ClientResponse) -> Position:
    """The position that the next block without an event names."""
    while True:
        block = (await answer.content.readuntil(b"\n\n")).decode().strip()
        assert "data:" not in block
        if block.startswith("id: "):
            return Position.parse(block.removeprefix("id: "))


async def test_a_stream_ends_with_the_token(gateway: RunningGateway, tokens: Tokens) -> None:
    tokens.principals["t"] = replace(OWN, expires_at=time.time() + 1.0)
    await create(gateway, "own")
    async with gateway.session.get("/v1/events?follow=true", headers=bearer("t")) as answer, asyncio.timeout(30):
        assert len((await answer.read()).split()) == 1
    assert time.time() >= (tokens.principals["t"].expires_at or 0.0)
    async with gateway.session.get("/v1/events", headers=bearer("t")) as answer:
        assert answer.status == 401


async def test_a_stream_ends_with_the_token_also_between_two_heartbeats(
    embedded_settings: Settings, tokens: Tokens, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = replace(embedded_settings, max_metadata_bytes=1 << 20)
    async with running_gateway(settings, authenticate=tokens, heartbeat_seconds=600.0) as gateway:
        size = 900_000
        for _ in range(STALLING_BYTES // size):  # together more than a client that stalls is sent
            await gateway.parts.registry.create_package("n", "own", "s", "scratch", metadata={"x": "x" * size})
        ends = time.time() + 600
        tokens.principals["t"] = replace(OWN, expires_at=ends)
        monkeypatch.setattr(request, "time", SimpleNamespace(time=lambda: ends - 0.2))  # is left from any moment on
        async with connected(gateway.port) as reader, connected(gateway.port) as follower:
            reader.send("GET /v1/events", "Authorization: Bearer t")
            assert (await reader.head())[0] == 200
            follower.send("GET /v1/events?follow=true&since=now", "Authorization: Bearer t")
            assert (await follower.head())[0] == 200
            async with asyncio.timeout(SECONDS):
                assert await follower.reader.readuntil(LAST_CHUNK) == LAST_CHUNK
            assert len(await reader.rest()) < STALLING_BYTES - size


@pytest.mark.parametrize("change", ["revoked", "fewer rights"])
async def test_a_stream_ends_when_its_rights_do(gateway: RunningGateway, tokens: Tokens, change: str) -> None:
    await create(gateway, "own")
    async with gateway.session.get("/v1/events?follow=true", headers=bearer("t")) as answer, asyncio.timeout(30):
        while not (await answer.content.readline()).strip():
            pass
        if change == "revoked":
            del tokens.principals["t"]
        else:
            tokens.principals["t"] = principal("t", Right.READ, producers=("other",))
        assert (await answer.read()).strip() == b""


async def cookie_of(gateway: RunningGateway, token: str) -> Morsel[str]:
    async with gateway.session.post("/v1/events/cookie", headers=bearer(token)) as answer:
        assert answer.status == 204
        return answer.cookies[COOKIE]


async def test_a_browser_follows_by_a_cookie_that_only_the_feed_takes(gateway: RunningGateway) -> None:
    own, _ = await create(gateway, "own", "foreign")
    cookie = await cookie_of(gateway, "t")
    assert (cookie["path"], cookie["samesite"], cookie["max-age"]) == ("/v1/events", "Strict", "3600")
    assert cookie["secure"]
    assert cookie["httponly"]
    headers = {"Cookie": f"{COOKIE}={cookie.value}"}
    async with gateway.session.get("/v1/events", headers=headers) as answer:
        assert answer.status == 200
        events = [parse_event(line) for line in (await answer.read()).splitlines() if line]
    assert [event.package_id for event in events] == [own]
    for method, path in (("GET", "/v1/packages"), ("POST", "/v1/packages"), ("POST", "/v1/events/cookie")):
        async with gateway.session.request(method, path, headers=headers) as answer:
            assert answer.status == 401
    for others in ({}, {**headers, **bearer("no token")}):  # a token that is sent is the one that counts
        async with gateway.session.get("/v1/events", headers=others) as answer:
            assert answer.status == 401


async def test_the_cookie_lives_no_longer_than_the_token_and_ends_with_it(
    gateway: RunningGateway, tokens: Tokens
) -> None:
    tokens.principals["t"] = replace(OWN, expires_at=time.time() + 100_000)
    assert (await cookie_of(gateway, "t"))["max-age"] == "3600"
    tokens.principals["t"] = replace(OWN, expires_at=time.time() + 100)
    cookie = await cookie_of(gateway, "t")
    assert 0 < int(cookie["max-age"]) <= 100
    headers = {"Cookie": f"{COOKIE}={cookie.value}"}
    async with gateway.session.get("/v1/events?follow=true", headers=headers) as answer, asyncio.timeout(30):
        assert answer.status == 200
        del tokens.principals["t"]
        await answer.read()
    async with gateway.session.get("/v1/events", headers=headers) as answer:
        assert answer.status == 401


async def test_a_browser_can_be_made_to_forget_the_cookie(gateway: RunningGateway) -> None:
    async with gateway.session.delete("/v1/events/cookie") as answer:
        assert (answer.status, answer.cookies[COOKIE]["max-age"]) == (204, "0")


async def test_a_token_that_no_cookie_holds_is_refused(gateway: RunningGateway, tokens: Tokens) -> None:
    tokens.principals["x" * 4000] = OWN
    async with gateway.session.post("/v1/events/cookie", headers=bearer("x" * 4000)) as answer:
        assert answer.status == 400
