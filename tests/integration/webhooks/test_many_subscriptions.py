"""A thousand subscriptions, a hundred of them down: the others get their events as early as before."""

from __future__ import annotations

import asyncio
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import quantiles

import aiohttp
import pytest

from artifact_store.models import EventFilter
from services.config import Settings
from services.webhooks.outbox import Policy
from services.webhooks.subscriptions import Subscriptions, create_tables, metadata
from tests.integration.conditions import until
from tests.integration.webhooks.stage import Stage, delivering, stage

SUBSCRIPTIONS = 1_000
DOWN = 100
EVENTS = 20
PAUSE_SECONDS = 3.0
"""Between two events; sending one to all takes about a second on one core."""

TIMES = 1.1
RUNS = 2
"""Of each kind; the better one counts, because other processes of the machine can only make it worse."""


@dataclass(frozen=True)
class Crowd:
    """A client of the process of receivers."""

    url: str
    session: aiohttp.ClientSession

    async def delays(self, *, clear: bool = False) -> list[int]:
        """The delays (µs) of those that are healthy in every run, since they were cleared."""
        query = {"first": str(DOWN), **({"clear": "1"} if clear else {})}
        async with self.session.get("/delays", params=query) as answer:
            found: list[int] = await answer.json()
            return found


@asynccontextmanager
async def crowd() -> AsyncIterator[Crowd]:
    """The process of receivers, for the length of the block."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.integration.webhooks.crowd",
        stdout=asyncio.subprocess.PIPE,
        cwd=Path(__file__).parents[3],
    )
    assert process.stdout is not None
    try:
        port = int(await process.stdout.readline())
        async with aiohttp.ClientSession(f"http://127.0.0.1:{port}") as session:
            yield Crowd(f"http://127.0.0.1:{port}", session)
    finally:
        process.kill()
        await process.wait()


async def subscribe_all(on: Stage, receivers: Crowd, down: int) -> None:
    """So many subscriptions, of which the first ones are down: refused, hanging or failing."""
    kept, end = Subscriptions(on.gateway.parts.views), await on.gateway.parts.log.end()
    with socket.create_server(("127.0.0.1", 0)) as closed:
        nobody = f"http://127.0.0.1:{closed.getsockname()[1]}/"
    for number in range(SUBSCRIPTIONS):
        kinds = (nobody, f"{receivers.url}/hangs", f"{receivers.url}/fails")
        url = kinds[number % 3] if number < down else f"{receivers.url}/healthy/{number}"
        await kept.create("ci:load", {}, url, EventFilter(), end)


async def measure(settings: Settings, receivers: Crowd, down: int) -> float:
    """The 99th percentile of the delays of those that are healthy in every run, in seconds."""
    async with stage(settings) as on:
        async with on.gateway.parts.views.writing() as connection:
            await connection.run_sync(metadata.drop_all)  # the subscriptions of earlier runs
        await create_tables(on.gateway.parts.views)
        await subscribe_all(on, receivers, down)
        async with delivering(on, policy=Policy(), timeout_seconds=15.0):
            await send(on, receivers, 3)  # until connections are open, and what is down is known to be
            await receivers.delays(clear=True)
            await send(on, receivers, EVENTS)
            delays = await receivers.delays(clear=True)
    assert len(delays) == EVENTS * (SUBSCRIPTIONS - DOWN)
    return quantiles(delays, n=100)[98] / 1_000_000


async def send(on: Stage, receivers: Crowd, events: int) -> None:
    wanted = len(await receivers.delays()) + events * (SUBSCRIPTIONS - DOWN)
    for _ in range(events):
        await on.registry.create_package("package", "ci", "main", "scratch")
        await asyncio.sleep(PAUSE_SECONDS)

    async def all_came() -> bool:
        return len(await receivers.delays()) >= wanted

    await until(all_came, 120.0, "healthy receivers lack events")


@pytest.mark.endurance
@pytest.mark.timeout(1200)
async def test_a_hundred_receivers_that_are_down_delay_nobody(settings: Settings) -> None:
    async with crowd() as receivers:
        sound: list[float] = []
        troubled: list[float] = []
        for _ in range(RUNS):
            sound.append(await measure(settings, receivers, 0))
            troubled.append(await measure(settings, receivers, DOWN))
    print(f"p99 of the delay without failures {sound}, with them {troubled} s")  # noqa: T201 - for docs/faults.md
    assert min(troubled) <= TIMES * min(sound), (sound, troubled)
