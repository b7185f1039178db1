"""A network between a gateway and its blob store that can be made slow, silent, or cut."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager

from tests.integration.conditions import until
from tests.tcp import Connections

_CHUNK = 65536
_QUIET_SECONDS = 0.5
_UNDER_WAY = 64
"""So many chunks of one connection may be on their way at a time, each way: what latency delays, it does not narrow."""


class StoreProxy:
    """Passes bytes on between whoever connects and `host:port`. Belongs to one event loop."""

    def __init__(self, upstream: str) -> None:
        self._upstream = upstream.split(":")
        self._latency = 0.0
        self._audible = asyncio.Event()
        self._audible.set()
        self._asking: set[asyncio.StreamReader] = set()
        """Connections whose last bytes came from the gateway: no answer to them has begun."""
        self._moved = 0.0
        self._left: int | None = None
        self._reached = asyncio.Event()
        self._connections = Connections(self._serve)

    def listening(self) -> AbstractAsyncContextManager[str]:
        """`host:port` of the proxy, which is there until the context ends."""
        return self._connections.listening()

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Within the block everything arrives so much later, each way."""
        self._latency = seconds
        try:
            yield
        finally:
            self._latency = 0.0

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Within the block connections stay, and new ones are taken; nothing passes."""
        self._audible.clear()
        try:
            yield
        finally:
            self._audible.set()

    @contextmanager
    def silent_after(self, size: int) -> Iterator[asyncio.Event]:
        """Within the block nothing passes once the store has sent `size` more bytes, which sets the event."""
        self._left, self._reached = size, asyncio.Event()
        try:
            yield self._reached
        finally:
            self._left = None
            self._audible.set()

    async def quiet(self) -> None:
        """Wait until the store has answered all that came by, and nothing comes for a while."""
        loop = asyncio.get_running_loop()

        async def still() -> bool:
            return not self._asking and loop.time() - self._moved > _QUIET_SECONDS

        await until(still, 60, "the store is asked all the time")

    async def cut(self) -> None:
        """Break every connection, and what is on its way with them."""
        await self._connections.cut()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._audible.wait()
            try:
                up_reader, up_writer = await asyncio.open_connection(*self._upstream)
            except OSError:
                return
            try:

                def asked(_: int) -> None:
                    self._asking.add(reader)
                    self._moved = asyncio.get_running_loop().time()

                def answered(size: int) -> None:
                    self._asking.discard(reader)
                    self._moved = asyncio.get_running_loop().time()
                    if self._left is not None:
                        self._left -= size
                        if self._left <= 0:
                            self._audible.clear()
                            self._reached.set()

                ways = [
                    asyncio.create_task(self._pass(reader, up_writer, asked)),
                    asyncio.create_task(self._pass(up_reader, writer, answered)),
                ]
                try:
                    await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                finally:
                    for way in ways:
                        way.cancel()
                    await asyncio.gather(*ways, return_exceptions=True)
            finally:
                self._asking.discard(reader)
                up_writer.transport.abort()
        finally:
            writer.transport.abort()

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passed: Callable[[int], None]
    ) -> None:
        loop = asyncio.get_running_loop()
        under_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(_UNDER_WAY)

        async def take() -> None:
            data = None
            while data != b"":
                try:
                    data = await reader.read(_CHUNK)
                except ConnectionError:
                    data = b""
                await under_way.put((loop.time() + self._latency, data))

        taking = asyncio.create_task(take())
        try:
            while True:
                due, data = await under_way.get()
                if not data:
                    return
                await asyncio.sleep(due - loop.time())
                await self._audible.wait()
                passed(len(data))
                writer.write(data)
                await writer.drain()
        finally:
            taking.cancel()
