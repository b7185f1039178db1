"""HTTP by hand over a socket, for what no client library would send."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass
from typing import Any


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
    head = (await reader.readuntil(b"\r\n\r\n")).decode()
    status_line, *lines = head.strip().split("\r\n")
    headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    body = b""
    try:
        body = await reader.readexactly(int(headers.get("content-length", 0)))
    except (asyncio.IncompleteReadError, ConnectionResetError):
        return RawAnswer(int(status_line.split()[1]), headers, body, complete=False)
    return RawAnswer(int(status_line.split()[1]), headers, body, complete=True)


async def send_and_leave(port: int, request: bytes) -> None:
    """Send these bytes and close the connection without waiting for an answer."""
    _, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(request)
    await writer.drain()
    writer.close()
    await writer.wait_closed()
