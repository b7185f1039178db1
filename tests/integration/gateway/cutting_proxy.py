"""A proxy to a gateway that cuts each connection after a given number of bytes towards the gateway."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, field

from tests.tcp import Connections

_PIECE_BYTES = 64 * 1024


@dataclass
class CuttingProxy:
    """Passes bytes to `port` on 127.0.0.1 and back."""

    port: int
    budget: Callable[[], int | None]
    """Asked for every connection: after how many bytes it is cut; None is never."""

    stall_at: int | None = None
    """Once this many bytes have passed in all, nothing moves until `go` is set."""

    go: asyncio.Event = field(default_factory=asyncio.Event)
    stalled: asyncio.Event = field(default_factory=asyncio.Event)
    url: str = ""
    cuts: int = 0
    """Connections that were cut."""
    passed: int = 0
    """Bytes that went towards the gateway."""

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection of a client."""
        sides = [writer]
        passing: list[asyncio.Task[None]] = []
        try:
            with suppress(OSError):
                there, back = await asyncio.open_connection("127.0.0.1", self.port)
                sides.append(back)
                passing = [asyncio.create_task(self._forward(reader, back)), asyncio.create_task(_pass(there, writer))]
                await asyncio.wait(passing, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for side in sides:  # before anything is waited for: this may be the end of the proxy, too
                side.transport.abort()
            for one in passing:
                one.cancel()
            await asyncio.gather(*passing, return_exceptions=True)
            for side in sides:
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


async def _pass(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(_PIECE_BYTES):
            writer.write(data)
            await writer.drain()


@asynccontextmanager
async def cutting_proxy(port: int, budget: Callable[[], int | None]) -> AsyncIterator[CuttingProxy]:
    """The proxy, listening on a free port for the length of the block."""
    proxy = CuttingProxy(port, budget)
    async with Connections(proxy.serve).listening() as address:
        proxy.url = f"http://{address}"
        yield proxy
