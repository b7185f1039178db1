"""A way to a gateway that breaks: each connection is cut once so many bytes have gone towards the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

_PIECE_BYTES = 64 * 1024


@dataclass
class CuttingProxy:
    """Passes bytes to `port` on 127.0.0.1 and back."""

    port: int
    budget: Callable[[], int | None]
    """Asked for every connection: after how many bytes it is cut; None is never."""

    stall_at: int | None = None
    """Once so many bytes have passed in all, nothing moves until `go` is set."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    cuts: int = 0
    """Connections that were cut."""
    passed: int = 0
    """Bytes that went towards the gateway."""
    _running: set[asyncio.Task[None]] = field(default_factory=set)

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection of a client, which `end` knows of from the beginning."""
        task = asyncio.ensure_future(self._serve(reader, writer))
        self._running.add(task)
        task.add_done_callback(self._running.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        sides = [writer]
        passing: list[asyncio.Task[None]] = []
        try:
            with suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", self.port)
                sides.append(back)
                passing = [asyncio.create_task(self._forward(reader, back)), asyncio.create_task(_pass(there, writer))]
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for one in passing:
                one.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
            for side in sides:
                side.transport.abort()
                with suppress(OSError):
                    await side.wait_closed()

    async def _forward(self, reader: asyncio.StreamReader, back: asyncio.StreamWriter) -> None:
        left = self.budget()
        while data := await reader.read(_PIECE_BYTES if left is None else min(_PIECE_BYTES, left)):
            back.write(data)
            await back.drain()
            self.passed += len(data)
            if self.stall_at is not None and self.passed >= self.stall_at:
                self.stalled.set()
                await self.go.wait()
            if left is not None and (left := left - len(data)) <= 0:
                self.cuts += 1
                return

    async def end(self) -> None:
        """Cut all connections."""
        for task in list(self._running):
            task.cancel()
        if self._running:
            await asyncio.wait(set(self._running))


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_PIECE_BYTES):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def cutting_proxy(port: int, budget: Callable[[], int | None]) -> AsyncIterator[CuttingProxy]:
    """The proxy, listening on a free port for the length of the block."""
    proxy = CuttingProxy(port, budget)
    server = await asyncio.start_server(proxy.accept, "127.0.0.1", 0)
    proxy.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    try:
        yield proxy
    finally:
        server.close()
        await proxy.end()
        await server.wait_closed()
