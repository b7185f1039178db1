"""HTTP by hand over a socket, for requests that no client library would send."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

SECONDS = 60.0
"""How long a test waits for the other side at most."""

STALLING_BYTES = 16 << 20
"""More than all buffers between a gateway and a client that does not read."""

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_READ_AHEAD_BYTES = 16 * 1024


@dataclass(frozen=True)
class RawAnswer:
    """An answer as it came; header names in lower case. `complete` says whether the body ended where it should."""

    status: int
    headers: dict[str, str]
    body: bytes
    complete: bool

    def problem(self) -> dict[str, Any]:
        """The body as a problem document."""
        assert self.headers["content-type"] == "application/problem+json"
        found: dict[str, Any] = json.loads(self.body)
        return found


class Client:
    """One connection, which takes few bytes more than it is asked to read."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def send(self, line: str, *headers: str, body: bytes = b"") -> None:
        """Send a request: method and target, header lines, body."""
        self.writer.write("\r\n".join([f"{line} HTTP/1.1", "Host: [::1]", *headers, "", ""]).encode() + body)

    async def answer(self) -> RawAnswer:
        """Read a whole answer."""
        async with asyncio.timeout(SECONDS):
            return await read_answer(self.reader)

    async def head(self) -> tuple[int, dict[str, str]]:
        """Read the head of an answer: status and headers."""
        async with asyncio.timeout(SECONDS):
            return await read_head(self.reader)

    async def may_go_on(self) -> None:
        """Wait for 100-continue."""
        async with asyncio.timeout(SECONDS):
            assert await self.reader.readexactly(len(_CONTINUE)) == _CONTINUE

    async def rest(self) -> bytes:
        """What comes until the other side closes or cuts the connection."""
        found = bytearray()
        async with asyncio.timeout(SECONDS):
            try:
                while piece := await self.reader.read(1 << 20):
                    found += piece
            except ConnectionResetError:
                pass
        return bytes(found)

    async def is_closed(self) -> bool:
        """Wait until the other side has closed; whether it did so without another byte."""
        return await self.rest() == b""


@asynccontextmanager
async def connected(port: int, address: str = "127.0.0.1") -> AsyncIterator[Client]:
    """A connection to 127.0.0.1 from this address, aborted at the end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, local_addr=(address, 0), limit=_READ_AHEAD_BYTES)
    try:
        yield Client(reader, writer)
    finally:
        writer.transport.abort()


async def exchange(port: int, request: bytes, *, seconds: float = 30.0) -> RawAnswer:
    """Send these bytes to 127.0.0.1 and read the whole answer, up to the end of the connection if need be."""
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(request)
            await writer.drain()
            return await read_answer(reader)
        finally:
            writer.close()
            await writer.wait_closed()


async def read_answer(reader: asyncio.StreamReader) -> RawAnswer:
    """Read one answer with a Content-Length."""
    status, headers = await read_head(reader)
    body = b""
    try:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return RawAnswer(status, headers, body, complete=False)
    return RawAnswer(status, headers, body, complete=True)


async def read_head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    """Read the head of an answer: status and headers, their names in lower case."""
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    return int(status_line.split()[1]), headers


async def send_and_leave(port: int, request: bytes) -> None:
    """Send these bytes and close the connection without waiting for an answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
