"""Gateway processes and a steady load on them by plain HTTP, with the time that each command waited."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from time import monotonic
from uuid import UUID, uuid4

from services.config import Settings
from tests.faults.torture.clients import PlainClient
from tests.faults.torture.oracle import Verdict, compare, read_log
from tests.faults.torture.work import Entry, creation
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of, partitions_of
from tests.services.process import free_ports

PRODUCERS = 12


@dataclass
class Load:
    """Producers that create one package after another through any gateway."""

    client: PlainClient

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self._stop = asyncio.Event()
        self._waiting: dict[int, float] = {}
        self._producers = [asyncio.ensure_future(self._produce(n)) for n in range(PRODUCERS)]

    async def settle(self) -> None:
        """Wait until everything begun before this moment is answered, and a good deal more."""
        began, enough = monotonic(), len(self.entries) + 20 * PRODUCERS

        async def there() -> bool:
            if any(producer.done() for producer in self._producers):
                return True
            return len(self.entries) >= enough and all(since > began for since in self._waiting.values())

        await until(there, 60, "commands are not answered any more")

    async def end(self, settings: Settings, *, others: Collection[UUID] = ()) -> None:
        """Finish what is under way and compare it with the log, without the packages of `others`.

        Raises UnexpectedAnswerError: a client saw an error.
        """
        self._stop.set()
        await asyncio.gather(*self._producers)
        verdict = Verdict()
        events = (event for event in read_log(settings) if event.package_id not in others)
        await asyncio.to_thread(compare, self.entries, events, verdict)
        assert verdict.clean, verdict.said

    def longest(self, since: float) -> float:
        """The longest wait, in seconds, of a command that was answered after that moment."""
        return max(entry.ended - entry.began for entry in self.entries if entry.ended > since)

    async def _produce(self, n: int) -> None:
        while not self._stop.is_set():
            work = creation(uuid4())
            began = self._waiting[n] = monotonic()
            answer, attempts = await self.client.send(work)
            self.entries.append(Entry(work, answer, began, monotonic(), attempts))


@asynccontextmanager
async def gateways(settings: Settings, folder: Path, count: int) -> AsyncIterator[list[ProductProcess]]:
    """Gateway processes, each the owner of a partition."""
    output_of(settings, "migrate")
    async with AsyncExitStack() as stack:
        started = []
        for n, port in enumerate(free_ports(count)):
            own = replace(settings, state_dir=folder / f"state-{n}")
            process = ProductProcess(own, folder / f"gateway-{n}", "gateway", port=port)
            await asyncio.to_thread(stack.enter_context, process)
            started.append(process)

        async def spread() -> bool:
            owned = [await asyncio.to_thread(partitions_of, gateway) for gateway in started]
            return sum(owned) == settings.kafka_partitions and min(owned) > 0

        await until(spread, 60, "the gateways do not share the partitions")
        yield started
