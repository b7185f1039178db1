"""How long clients wait when the owner of a partition goes: killed, frozen, or told to end. They never see an error.

The bounds are the project's promise: after a kill under twice the group's session time-out, after an orderly end 2 s.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from uuid import uuid4

import pytest

from services.config import Settings
from services.log.kafka.settings import SESSION_TIMEOUT_MS
from tests.faults.torture.clients import PlainClient
from tests.faults.torture.oracle import Verdict, compare, read_log
from tests.faults.torture.work import Entry, creation
from tests.integration.conditions import until
from tests.integration.processes import ProductProcess, output_of
from tests.services.process import free_ports

pytestmark = pytest.mark.services

KILLED_SECONDS = 2 * SESSION_TIMEOUT_MS / 1000
IN_ORDER_SECONDS = 2.0
PRODUCERS = 12
GATEWAYS = 3


@dataclass
class Load:
    """Producers that create one package after another through any gateway, and how long each waited."""

    client: PlainClient

    def __post_init__(self) -> None:
        self.entries: list[Entry] = []
        self._stop = asyncio.Event()
        self._waiting: dict[int, float] = {}
        self._producers = [asyncio.ensure_future(self._produce(n)) for n in range(PRODUCERS)]

    async def settles(self) -> None:
        """Wait until everything begun before this moment is answered, and a good deal more."""
        began, enough = monotonic(), len(self.entries) + 20 * PRODUCERS

        async def there() -> bool:
            if any(producer.done() for producer in self._producers):
                return True
            return len(self.entries) >= enough and all(since > began for since in self._waiting.values())

        await until(there, 60, "commands are not answered any more")

    async def end(self) -> None:
        """Finish what is under way. Raises UnexpectedAnswerError: a client saw an error."""
        self._stop.set()
        await asyncio.gather(*self._producers)

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
async def gateways(settings: Settings, folder: Path) -> AsyncIterator[list[ProductProcess]]:
    """Gateway processes, each the owner of a partition."""
    output_of(settings, "migrate")
    async with AsyncExitStack() as stack:
        started = []
        for n, port in enumerate(free_ports(GATEWAYS)):
            own = settings.model_copy(update={"state_dir": folder / f"state-{n}"})
            process = ProductProcess(own, folder / f"gateway-{n}", "gateway", port=port)
            await asyncio.to_thread(stack.enter_context, process)
            started.append(process)
        await until(lambda: spread(settings), 60, "the gateways do not share the partitions")
        yield started


async def spread(settings: Settings) -> bool:
    """Whether every gateway owns a partition."""
    status = json.loads(await asyncio.to_thread(output_of, settings, "status", "--json"))
    owners = {writer["owner"] for writer in status["writers"]}
    return None not in owners and len(owners) == GATEWAYS


async def longest_wait(settings: Settings, folder: Path, happens: str) -> float:
    """Under load, let an owner go; the longest that any client waited."""
    async with gateways(settings, folder) as started, PlainClient([g.endpoint for g in started]) as client:
        load = Load(client)
        await load.settles()
        moment = monotonic()
        match happens:
            case "kill":
                await asyncio.to_thread(started[0].kill)
            case "stop":
                await asyncio.to_thread(started[0].stop)
        await load.settles()
        await load.end()
        verdict = Verdict()
        await asyncio.to_thread(lambda: compare(load.entries, read_log(settings), verdict))
        assert verdict.clean, verdict.said
    longest = load.longest(moment)
    print(f"{happens}: the longest of {len(load.entries)} commands waited {longest:.2f} s")  # noqa: T201  for the record
    return longest


async def test_who_waits_for_a_killed_owner_waits_less_than_two_session_timeouts(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, "kill") < KILLED_SECONDS


async def test_who_waits_for_an_owner_that_ends_in_order_waits_less_than_two_seconds(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, "stop") < IN_ORDER_SECONDS
