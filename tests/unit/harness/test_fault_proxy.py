"""The network of the fault tests does what they rely on, shown with a broker that only echoes."""

from __future__ import annotations

import asyncio
import struct
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

import pytest

from tests.faults.proxy import END_TXN, PRODUCE, Network
from tests.integration.conditions import until
from tests.services.process import free_ports


@dataclass
class Stage:
    """A proxy in front of a server that answers every request with its own bytes."""

    network: Network
    port: int
    arrived: asyncio.Queue[bytes] = field(default_factory=asyncio.Queue)


def request(kind: int, text: bytes) -> bytes:
    body = struct.pack(">hhi", kind, 0, 1) + text
    return struct.pack(">i", len(body)) + body


@asynccontextmanager
async def staged() -> AsyncIterator[Stage]:
    outside, inside = free_ports(2)
    stage = Stage(Network({outside: inside}), outside)

    async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = await reader.readexactly(4)
                frame = head + await reader.readexactly(struct.unpack(">i", head)[0])
                stage.arrived.put_nowait(frame)
                writer.write(frame)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(echo, "127.0.0.1", inside)
    try:
        async with stage.network, asyncio.timeout(20):
            yield stage
    finally:
        server.close()


async def counted(counts: Counter[int], kind: int) -> None:
    """Wait until a request of the kind came by."""

    async def there() -> bool:
        return counts[kind] > 0

    await until(there, 10, "no request came by")


async def test_what_is_not_meant_passes_at_once_and_what_is_meant_comes_late_and_in_order() -> None:
    async with staged() as stage:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        with stage.network.holding(0.3, END_TXN):
            began = asyncio.get_running_loop().time()
            writer.write(request(PRODUCE, b"one"))
            assert await reader.readexactly(15) == request(PRODUCE, b"one")
            writer.write(request(END_TXN, b"two"))
            assert await reader.readexactly(15) == request(END_TXN, b"two")
            assert asyncio.get_running_loop().time() - began >= 0.3
        assert stage.network.delayed == {END_TXN: 1}
        writer.close()


@pytest.mark.slow
async def test_a_request_arrives_although_its_client_has_hung_up() -> None:
    async with staged() as stage:
        _, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        with stage.network.holding(3.0, END_TXN):
            writer.write(request(END_TXN, b"late"))
            await counted(stage.network.delayed, END_TXN)
            writer.transport.abort()
        assert stage.arrived.empty()
        assert await stage.arrived.get() == request(END_TXN, b"late")


async def test_a_lost_answer_was_still_a_request_and_ends_the_connection() -> None:
    async with staged() as stage:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        with stage.network.losing_answers(END_TXN):
            writer.write(request(END_TXN, b"lost"))
            assert await stage.arrived.get() == request(END_TXN, b"lost")
            with suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.transport.abort()


async def test_nothing_passes_a_silent_network_until_it_is_heard_again() -> None:
    async with staged() as stage:
        reader, writer = await asyncio.open_connection("127.0.0.1", stage.port)
        with stage.network.silent():
            writer.write(request(PRODUCE, b"hush"))
            await counted(stage.network.requests, PRODUCE)
            assert stage.arrived.empty()
        assert await reader.readexactly(16) == request(PRODUCE, b"hush")
        writer.transport.abort()
