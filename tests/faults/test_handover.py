"""How long clients wait when a partition's owner is killed, frozen or stopped. They never see an error.

The bounds are the project's promise: after a kill, less than twice the group's session time-out; after an orderly stop,
2 s. Time in which the machine as a whole stood still is not counted.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from time import monotonic

import pytest

from services.config import Settings
from services.log.kafka.connection import SESSION_TIMEOUT_MS, TRANSACTION_TIMEOUT_MS
from tests.faults.http_load import Load, gateways
from tests.faults.torture.clients import PlainClient
from tests.integration.processes import ProductProcess
from tests.standstill import Standstill

pytestmark = pytest.mark.services

KILLED_SECONDS = 2 * SESSION_TIMEOUT_MS / 1000
IN_ORDER_SECONDS = 2.0
FROZEN_SECONDS = (SESSION_TIMEOUT_MS + TRANSACTION_TIMEOUT_MS) / 1000 + 1

Happens = Callable[[ProductProcess], Awaitable[None]]


async def killed(owner: ProductProcess) -> None:
    await asyncio.to_thread(owner.kill)


async def told_to_end(owner: ProductProcess) -> None:
    await asyncio.to_thread(owner.stop)


async def frozen(owner: ProductProcess) -> None:
    """The fault is a time: longer than its session, and than any transaction that it had open."""
    owner.freeze()
    await asyncio.sleep(FROZEN_SECONDS)
    owner.thaw()


async def longest_wait(settings: Settings, folder: Path, count: int, happens: Happens) -> float:
    """Let it happen to one of this many gateways under load. Returns the longest wait of any client."""
    async with gateways(settings, folder, count) as started, PlainClient([g.endpoint for g in started]) as client:
        load = Load(client)
        with Standstill() as machine:
            await load.settle()
            moment = monotonic()
            await happens(started[0])
            await load.settle()
            await load.end(settings)
    longest, still = load.longest(moment), machine.longest(moment)
    print(  # noqa: T201 - the figure is half of its purpose
        f"{happens.__name__}: the longest of {len(load.entries)} commands waited {longest:.2f} s, "
        f"the machine stood still for {still:.2f} s at most"
    )
    return longest - still


async def test_who_waits_for_a_killed_owner_waits_less_than_two_session_timeouts(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, 3, killed) < KILLED_SECONDS


async def test_who_waits_for_an_owner_that_ends_in_order_waits_less_than_two_seconds(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, 3, told_to_end) < IN_ORDER_SECONDS


async def test_an_owner_that_is_frozen_beyond_its_transactions_disturbs_nobody_when_it_wakes_up(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, 3, frozen) < FROZEN_SECONDS


async def test_a_gateway_that_is_alone_and_frozen_beyond_its_transactions_settles_all_when_it_wakes_up(
    real_settings: Settings, tmp_path: Path
) -> None:
    assert await longest_wait(real_settings, tmp_path, 1, frozen) < FROZEN_SECONDS + KILLED_SECONDS
