"""TCP proxies in front of a store that break the connection, or flip a bit, at a chosen request."""

from __future__ import annotations

import asyncio
import re
from contextlib import AbstractAsyncContextManager

from tests.tcp import Connections


class Tripwire:
    """Breaks the connection, up to a number of times, once a request begins with a pattern.

    The request reaches the store. What the store answers is lost from its `after`-th byte on.
    """

    def __init__(self, host: str, request: bytes, *, times: int = 1, after: int = 0) -> None:
        self._upstream = host.split(":")
        self._request = re.compile(request)
        self._left = times
        self._after = after
        self.tripped = 0

    def listening(self) -> AbstractAsyncContextManager[str]:
        """`host:port` of the proxy, which is there until the context ends."""
        return Connections(self._serve).listening()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        up_reader, up_writer = await asyncio.open_connection(*self._upstream)
        tripped = asyncio.Event()
        ways = [
            asyncio.create_task(self._forth(reader, up_writer, tripped)),
            asyncio.create_task(self._back(up_reader, writer, tripped)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for end in (writer, up_writer):  # before anything is waited for: this may be the end of the proxy, too
                end.close()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            await asyncio.gather(writer.wait_closed(), up_writer.wait_closed(), return_exceptions=True)

    async def _forth(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter, tripped: asyncio.Event) -> None:
        while data := await reader.read(65536):
            if self._left and self._request.match(data):
                self._left -= 1
                self.tripped += 1
                tripped.set()
            up.write(data)
            await up.drain()

    async def _back(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter, tripped: asyncio.Event) -> None:
        passed = 0
        while data := await up.read(65536):
            if not tripped.is_set():
                writer.write(data)
            else:
                writer.write(data[: max(0, self._after - passed)])
                passed += len(data)
                if passed >= self._after:
                    return
            await writer.drain()


class BitFlipper(Tripwire):
    """Flips a bit of what passes once a request begins with a pattern, up to a number of times.

    `after` bytes behind the end of the request's head; with `back`, of the answer's.
    """

    def __init__(self, host: str, request: bytes, *, times: int = 1, after: int = 0, back: bool = False) -> None:
        super().__init__(host, request, times=times, after=after)
        self._flips_back = back

    async def _forth(self, reader: asyncio.StreamReader, up: asyncio.StreamWriter, tripped: asyncio.Event) -> None:
        at: int | None = None  # where the bit to flip is, counted from the chunk at hand
        while data := await reader.read(65536):
            if self._left and self._request.match(data):
                self._left -= 1
                self.tripped += 1
                if self._flips_back:
                    tripped.set()
                else:
                    at = _body(data) + self._after
            data, at = _flipped(data, at)
            up.write(data)
            await up.drain()

    async def _back(self, up: asyncio.StreamReader, writer: asyncio.StreamWriter, tripped: asyncio.Event) -> None:
        at: int | None = None
        while data := await up.read(65536):
            if tripped.is_set():
                tripped.clear()
                at = _body(data) + self._after
            data, at = _flipped(data, at)
            writer.write(data)
            await writer.drain()


def _body(data: bytes) -> int:
    return data.index(b"\r\n\r\n") + 4


def _flipped(data: bytes, at: int | None) -> tuple[bytes, int | None]:
    """The chunk with a bit flipped if `at` lies in it, and where `at` is from the next chunk on."""
    if at is None or at >= len(data):
        return data, None if at is None else at - len(data)
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :], None
