"""A network between Kafka clients and brokers that can be made slow or silent, and can lose answers.

There is one proxy for each broker, which advertises the proxy to clients that come through it. Requests are
distinguished by the `api_key` in their header (Kafka protocol guide). A client's bytes reach the broker even if the
client has closed the connection meanwhile: this is how late requests occur.
"""

from __future__ import annotations

import asyncio
import struct
from collections import Counter, deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Self

from tests.services.kafka import KafkaCluster
from tests.services.process import free_ports

PRODUCE, FETCH, LIST_OFFSETS, ADD_PARTITIONS_TO_TXN, END_TXN = 0, 1, 2, 24, 26
GROUP_REQUESTS = (11, 12, 13, 14, 15)
"""JoinGroup, Heartbeat, LeaveGroup, SyncGroup, DescribeGroups: what a group's coordinator answers."""

_WAITING_FRAMES = 256
_LAST_ANSWERS_SECONDS = 10.0


class ProxiedCluster(KafkaCluster):
    """Brokers with a second listener, which they advertise at the ports of a `Network`."""

    def __init__(self, folder: Path, brokers: int = 3) -> None:
        super().__init__(folder, brokers)
        ports = free_ports(2 * brokers)
        self.outside, self.inside = ports[:brokers], ports[brokers:]
        for broker, outside, inside in zip(self.brokers, self.outside, self.inside, strict=True):
            broker.listeners["PROXIED"] = inside, outside

    @property
    def proxied_endpoint(self) -> str:
        """`host:port,…` of the proxies."""
        return ",".join(f"127.0.0.1:{port}" for port in self.outside)

    def network(self) -> Network:
        """The proxies; they listen inside `async with`."""
        return Network(dict(zip(self.outside, self.inside, strict=True)))


class Network:
    """The proxies and the weather that they share. Belongs to one event loop."""

    def __init__(self, ports: Mapping[int, int]) -> None:
        """`ports`: where to listen, and where the broker behind it does."""
        self.requests: Counter[int] = Counter()
        """How many requests of each kind came by."""
        self.delayed: Counter[int] = Counter()
        """How many of them were held up."""
        self.lost: Counter[int] = Counter()
        """How many answers to each kind were lost."""
        self.late: dict[int, float] = {}
        self.withheld: frozenset[int] = frozenset()
        self.released = asyncio.Event()
        self.losing: frozenset[int] = frozenset()
        self.latency = 0.0
        self.audible = asyncio.Event()
        self.audible.set()
        self.unreachable: set[int] = set()
        """Brokers, by the ports behind the proxies, that nobody gets through to."""
        self._ports = ports
        self._servers: list[asyncio.Server] = []
        self._connections: set[_Connection] = set()

    async def __aenter__(self) -> Self:
        for outside, inside in self._ports.items():

            async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, port: int = inside) -> None:
                await self._serve(port, reader, writer)

            self._servers.append(await asyncio.start_server(accept, "127.0.0.1", outside))
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()
        ended = [connection.end() for connection in list(self._connections)]
        await asyncio.gather(*ended, return_exceptions=True)

    def cut(self) -> None:
        """Every client loses its connections; what it has sent is on its way."""
        for connection in list(self._connections):
            connection.hang_up()

    @contextmanager
    def without(self, broker: int) -> Iterator[None]:
        """Within the block nobody gets through to the broker of this number; all others are there."""
        port = list(self._ports.values())[broker]
        self.unreachable.add(port)
        for connection in list(self._connections):
            if connection.port == port:
                connection.hang_up()
        try:
            yield
        finally:
            self.unreachable.discard(port)

    @contextmanager
    def holding(self, seconds: float, *kinds: int) -> Iterator[None]:
        """Requests of these kinds that come within the block reach the broker so much later."""
        self.late = dict.fromkeys(kinds, seconds)
        try:
            yield
        finally:
            self.late = {}

    @contextmanager
    def withholding(self, *kinds: int) -> Iterator[None]:
        """Within the block requests of these kinds do not get through. They reach the broker when it ends."""
        self.withheld = frozenset(kinds)
        self.released.clear()
        try:
            yield
        finally:
            self.withheld = frozenset()
            self.released.set()

    @contextmanager
    def losing_answers(self, *kinds: int) -> Iterator[None]:
        """Within the block the broker carries such requests out, but the connection breaks instead of an answer."""
        self.losing = frozenset(kinds)
        try:
            yield
        finally:
            self.losing = frozenset()

    @contextmanager
    def slow(self, seconds: float) -> Iterator[None]:
        """Everything takes so much longer, each way."""
        self.latency = seconds
        try:
            yield
        finally:
            self.latency = 0.0

    @contextmanager
    def silent(self) -> Iterator[None]:
        """Connections stay, nothing passes."""
        self.audible.clear()
        try:
            yield
        finally:
            self.audible.set()

    async def _serve(self, port: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if port in self.unreachable:
            writer.transport.abort()
            return
        try:
            broker_reader, broker_writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            writer.close()
            return
        connection = _Connection(self, port, (reader, writer), (broker_reader, broker_writer))
        self._connections.add(connection)
        try:
            await connection.run()
        finally:
            self._connections.discard(connection)


_Stream = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class _Connection:
    """One client's connection and the one to the broker behind it."""

    def __init__(self, network: Network, port: int, client: _Stream, broker: _Stream) -> None:
        self.port = port
        self._network = network
        self._from_client, self._to_client = client
        self._from_broker, self._to_broker = broker
        self._waiting: asyncio.Queue[tuple[float, bytes] | None] = asyncio.Queue(_WAITING_FRAMES)
        self._asked: deque[int] = deque()
        self._answered = asyncio.Event()
        self._answered.set()
        self._tasks: list[asyncio.Task[None]] = []

    async def run(self) -> None:
        requests, sender, answers = (
            asyncio.ensure_future(step) for step in (self._take_requests(), self._pass_requests(), self._pass_answers())
        )
        self._tasks = [requests, sender, answers]
        try:
            # The broker hung up, or the client did and all that it had sent was passed on.
            await asyncio.wait([sender, answers], return_when=asyncio.FIRST_COMPLETED)
        finally:
            await self.end()

    async def end(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for writer in (self._to_client, self._to_broker):
            writer.transport.abort()

    def hang_up(self) -> None:
        self._to_client.transport.abort()

    async def _take_requests(self) -> None:
        loop, network = asyncio.get_running_loop(), self._network
        while (frame := await read_frame(self._from_client)) is not None:
            kind = _kind(frame)
            network.requests[kind] += 1
            if kind in network.late:
                network.delayed[kind] += 1
            await self._waiting.put((loop.time() + network.late.get(kind, network.latency), frame))
        await self._waiting.put(None)

    async def _pass_requests(self) -> None:
        loop = asyncio.get_running_loop()
        while (entry := await self._waiting.get()) is not None:
            due, frame = entry
            if (left := due - loop.time()) > 0:
                await asyncio.sleep(left)
            await self._network.audible.wait()
            if _kind(frame) in self._network.withheld:
                await self._network.released.wait()
            self._asked.append(_kind(frame))
            self._answered.clear()
            self._to_broker.write(frame)
            with suppress(ConnectionError):  # the other direction notices and ends it all
                await self._to_broker.drain()
        with suppress(TimeoutError):
            await asyncio.wait_for(self._answered.wait(), _LAST_ANSWERS_SECONDS)

    async def _pass_answers(self) -> None:
        network = self._network
        while (frame := await read_frame(self._from_broker)) is not None:
            kind = self._asked.popleft()
            if not self._asked:
                self._answered.set()
            if network.latency:
                await asyncio.sleep(network.latency)
            await network.audible.wait()
            if kind in network.losing:
                network.lost[kind] += 1
                self.hang_up()
            elif not self._to_client.is_closing():
                self._to_client.write(frame)
                with suppress(ConnectionError):  # the client is gone; what it sent goes on
                    await self._to_client.drain()


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next request or answer with its length in front; None when the other side has hung up."""
    try:
        head = await reader.readexactly(4)
        return head + await reader.readexactly(int(struct.unpack(">i", head)[0]))
    except (OSError, asyncio.IncompleteReadError):
        return None


def _kind(request: bytes) -> int:
    return int(struct.unpack(">h", request[4:6])[0])
