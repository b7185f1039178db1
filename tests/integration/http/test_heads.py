"""The memory for requests' heads is bounded, finished or not, whatever precedes them on the connection."""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, suppress

import psutil
import pytest

from ingest_gateway.admission import HEADS_ROOM_BYTES
from ingest_gateway.protocol.connections import HEAD_BYTES
from services.config import Settings
from tests.integration.conditions import until
from tests.integration.http_gateway import RunningGateway, running_gateway
from tests.integration.http_raw import SECONDS, Client, connected

LINE = b"GET /healthz HTTP/1.1\r\nHost: [::1]\r\n"


def fields(count: int) -> bytes:
    """So many bytes of headers, and at most 30 KiB each."""
    found = b""
    while len(found) < count:
        name = b"x-%d: " % len(found)
        found += name + b"y" * min(30_000, max(1, count - len(found) - len(name) - 2)) + b"\r\n"
    return found


@pytest.fixture
async def gateway(embedded_settings: Settings) -> AsyncIterator[RunningGateway]:
    async with running_gateway(embedded_settings) as running:
        yield running


async def put(gateway: RunningGateway, framing: str, body: bytes) -> bytes:
    """A whole request, after which the connection continues."""
    package = await gateway.parts.registry.create_package("n", "p", "s", "scratch")
    return f"PUT /v1/packages/{package}/files/a HTTP/1.1\r\nHost: [::1]\r\n{framing}\r\n\r\n".encode() + body


@pytest.mark.parametrize("ended", [False, True], ids=["unfinished", "finished"])
async def test_a_head_that_is_too_long_is_refused(gateway: RunningGateway, ended: bool) -> None:
    async with connected(gateway.port) as client:
        client.writer.write(LINE + fields(HEAD_BYTES) + (b"\r\n" if ended else b""))
        answer = await client.answer()
        assert (answer.status, answer.problem()["type"].rpartition(":")[2]) == (431, "head-too-large")
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


async def test_a_head_that_is_as_long_as_it_may_be_is_taken_again_and_again(gateway: RunningGateway) -> None:
    async with connected(gateway.port) as client:
        for _ in range(3 * HEADS_ROOM_BYTES // HEAD_BYTES // 2):
            client.writer.write(LINE + fields(HEAD_BYTES - 1024) + b"\r\n")
            assert (await client.answer()).status == 200


@pytest.mark.parametrize("length", ["0" * 5_000 + "5", "9" * 5_000, "٣", "+5", "5_0"])
async def test_a_length_that_is_no_plain_number_is_malformed(gateway: RunningGateway, length: str) -> None:
    request = await put(gateway, f"Content-Length: {length}", b"12345")
    async with connected(gateway.port) as client:
        client.writer.write(request)
        answer = await client.answer()
        assert (answer.status, answer.problem()["type"].rpartition(":")[2]) == (400, "malformed-http")
        assert answer.headers["connection"] == "close"
        assert await client.is_closed()


async def test_a_target_that_is_no_url_is_malformed(gateway: RunningGateway) -> None:
    async with connected(gateway.port) as client:
        client.writer.write(b"GET http://[::1]@/healthz HTTP/1.1\r\nHost: [::1]\r\n\r\n")
        answer = await client.answer()
        assert (answer.status, answer.problem()["type"].rpartition(":")[2]) == (400, "malformed-http")
        assert await client.is_closed()


FRAMINGS = pytest.mark.parametrize(
    ("framing", "body"),
    [
        ("Content-Length: 0", b""),
        ("Content-Length: 100000", os.urandom(99_992) + b"\r\n\r\n" * 2),
        ("Transfer-Encoding: chunked", b"186a0\r\n" + bytes(100_000) + b"\r\n0\r\n\r\n"),
        ("Transfer-Encoding: chunked", b"186a0\r\n" + b"\r\n\r\n" * 25_000 + b"\r\n0\r\nx: y\r\n\r\n"),
    ],
    ids=["empty", "length", "chunks", "chunks of ends"],
)


@FRAMINGS
async def test_a_head_behind_a_body_is_bounded_as_well(gateway: RunningGateway, framing: str, body: bytes) -> None:
    first = await put(gateway, framing, body)
    async with connected(gateway.port) as client:
        client.writer.write(first + LINE + fields(2 * HEAD_BYTES))
        statuses = [(await client.answer()).status]
        if statuses == [201]:
            statuses.append((await client.answer()).status)
        assert statuses[-1] == 431
        assert await client.is_closed()


@FRAMINGS
async def test_requests_behind_each_other_are_answered_however_they_are_cut(
    gateway: RunningGateway, framing: str, body: bytes
) -> None:
    first = await put(gateway, framing, body)
    sent = first + (LINE + fields(20_000) + b"\r\n") * 3
    for seed in range(3):
        cuts = random.Random(seed)
        async with connected(gateway.port) as client:
            at = 0
            while at < len(sent):
                size = cuts.choice((1, 3, 1000, 70_000))
                client.writer.write(sent[at : at + size])
                await client.writer.drain()
                at += size
            statuses = [(await client.answer()).status for _ in range(4)]
            assert statuses == [201 if seed == 0 else 409, 200, 200, 200]


async def test_heads_that_grow_and_grow_take_little_memory(gateway: RunningGateway) -> None:
    resident = psutil.Process().memory_info().rss
    grown = fields(100_000)
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(gateway.port)) for _ in range(40)]
        for _ in range(30):
            for client in clients:
                with suppress(ConnectionError):
                    client.writer.write(LINE + grown if _ == 0 else grown)
                    await client.writer.drain()
        statuses = await asyncio.gather(*map(answered, clients))
        assert psutil.Process().memory_info().rss - resident < 4 * HEADS_ROOM_BYTES
        assert statuses == [431] * len(clients)


async def test_unfinished_heads_of_many_take_little_memory_and_leave_room_for_others(gateway: RunningGateway) -> None:
    resident = psutil.Process().memory_info().rss
    async with AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(connected(gateway.port)) for _ in range(400)]
        for client in clients:
            client.writer.write(LINE + fields(HEAD_BYTES - 5_000))
            await client.writer.drain()
        statuses = await asyncio.gather(*(answered(client) for client in clients))
        refused = [status for status in statuses if status]
        assert set(refused) == {429}
        assert len(clients) - len(refused) <= HEADS_ROOM_BYTES // 2 // (HEAD_BYTES - 6_000)
        assert psutil.Process().memory_info().rss - resident < 4 * HEADS_ROOM_BYTES

    async def free() -> bool:
        async with connected(gateway.port) as client:
            client.writer.write(LINE + fields(HEAD_BYTES - 5_000) + b"\r\n")
            return (await client.answer()).status == 200

    await until(free, SECONDS, "the room did not come back")


async def answered(client: Client) -> int | None:
    """The status of what came without the head's end; None when nothing did."""
    try:
        async with asyncio.timeout(5):
            status, _ = await client.head()
            return status
    except TimeoutError:
        return None
