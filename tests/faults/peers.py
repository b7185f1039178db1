"""A network among the brokers of a cluster, from which one can be cut off while clients still reach it."""

from __future__ import annotations

import asyncio
import re
import struct
import threading
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.faults.proxy import read_frame
from tests.services.kafka import KafkaBroker, KafkaCluster
from tests.services.process import free_ports

_PIECE_BYTES = 65536
_SECONDS = 10.0


class SplitCluster(KafkaCluster):
    """Brokers that reach each other, and the controller, through proxies alone; clients reach them as always.

    Each broker advertises to its peers the proxies of its two inner listeners. A proxy learns from
    the first request which broker has connected, since Kafka advertises one address of a listener to all. The proxies
    run in a thread of their own.
    """

    def __init__(self, folder: Path, brokers: int = 3) -> None:
        super().__init__(folder, brokers)
        ports = free_ports(3 * brokers)
        peers, outer_peers, outer_controllers = (ports[n * brokers : (n + 1) * brokers] for n in range(3))
        voters = {broker.node_id: port for broker, port in zip(self.brokers, outer_controllers, strict=True)}
        self._routes: dict[int, tuple[KafkaBroker, int]] = {}
        for broker, peer, outer in zip(self.brokers, peers, outer_peers, strict=True):
            controller = voters[broker.node_id]
            self._routes[outer] = broker, peer
            self._routes[controller] = broker, broker.controller_port
            broker.voters = voters
            broker.listeners |= {"PEERS": (peer, outer), "CONTROLLER": (broker.controller_port, controller)}
            broker.options["inter.broker.listener.name"] = "PEERS"
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="peers", daemon=True)
        self._servers: list[asyncio.Server] = []
        self._cut: set[int] = set()
        self._passing: dict[asyncio.Task[None], frozenset[int]] = {}
        """What passes, and which brokers it lies between."""

    def start(self) -> None:
        """As with any cluster; the proxies listen first."""
        if not self._thread.is_alive():
            self._thread.start()
            self._run(self._listen())
        super().start()

    def close(self) -> None:
        """As with any cluster, and end the proxies."""
        super().close()
        self.end_network()

    def end_network(self) -> None:
        """End the proxies, after which the brokers cannot be started again."""
        if self._thread.is_alive():
            self._run(self._end())
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()
        self._loop.close()

    @contextmanager
    def without_peers(self, broker: KafkaBroker) -> Iterator[None]:
        """Within the block nothing passes between this broker and the others, in either direction. Clients pass."""
        self._loop.call_soon_threadsafe(self._separate, broker.node_id)
        try:
            yield
        finally:
            self._loop.call_soon_threadsafe(self._cut.discard, broker.node_id)

    def _run(self, act: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(act, self._loop).result(_SECONDS)

    async def _listen(self) -> None:
        for outer, (broker, port) in self._routes.items():

            def accept(
                reader: asyncio.StreamReader,
                writer: asyncio.StreamWriter,
                broker: KafkaBroker = broker,
                port: int = port,
            ) -> None:
                task = self._loop.create_task(self._pass(reader, writer, broker, port))
                self._passing[task] = frozenset()
                task.add_done_callback(self._passing.pop)
                task.add_done_callback(lambda _: writer.transport.abort())  # also when it is cancelled before it begins

            self._servers.append(await asyncio.start_server(accept, "127.0.0.1", outer))

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, broker: KafkaBroker, port: int
    ) -> None:
        """Pass on what comes, both ways, until either side ends it."""
        task, first = asyncio.current_task(), await read_frame(reader)
        if first is None:
            return
        assert task is not None
        ends = self._passing[task] = frozenset({broker.node_id, _sender(first)})
        if self._between(ends):
            return
        try:
            there, back = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            return
        back.write(first)
        ways = [asyncio.create_task(_copy(reader, back)), asyncio.create_task(_copy(there, writer))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.transport.abort()
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    async def _end(self) -> None:
        for server in self._servers:
            server.close()
        passing = list(self._passing)
        for task in passing:
            task.cancel()
        await asyncio.gather(*passing, return_exceptions=True)
        for server in self._servers:
            await server.wait_closed()

    def _separate(self, broker: int) -> None:
        self._cut.add(broker)
        for task, ends in self._passing.items():
            if self._between(ends):
                task.cancel()

    def _between(self, ends: frozenset[int]) -> bool:
        """Whether the connection leads from a broker that is cut off to another one, or back."""
        return len(ends) > 1 and bool(ends & self._cut)


def _sender(request: bytes) -> int:
    """The broker that sends this request; 0 when it is none.

    The client ids of its clients name it: `3`, `raft-client-3`, `broker-3-fetcher-0`.
    """
    (length,) = struct.unpack(">h", request[12:14])  # after the frame's length, key, version and correlation id
    number = re.search(rb"\d+", request[14 : 14 + max(0, length)])
    return 0 if number is None else int(number[0])


async def _copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(_PIECE_BYTES):
        writer.write(data)
        await writer.drain()
