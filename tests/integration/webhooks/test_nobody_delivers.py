"""Undelivered webhooks are noticed, and a process that cannot read the log leaves them to one that can."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from prometheus_client import CollectorRegistry

from artifact_store.models import EventFilter
from artifact_store.position import Position
from ingest_gateway.health import Deliveries
from services.core.access import EVERYTHING
from services.views.database import Views
from services.webhooks import deliverer
from services.webhooks.deliverer import Deliverer, DeliveryMetrics
from services.webhooks.subscriptions import LAPSE_SECONDS, Heartbeat, State, Subscriptions, create_tables
from services.webhooks.targets import Targets
from tests.integration.conditions import until
from tests.memory_log import MemoryLog
from tests.tcp import Connections

SECONDS = 20.0


@pytest.fixture
async def views(tmp_path: Path) -> AsyncIterator[Views]:
    """A database with one active subscription."""
    views = Views(f"sqlite+aiosqlite:///{tmp_path}/views.db")
    await create_tables(views)
    await Subscriptions(views).create(
        "ci:bot", {}, "https://receiver.example/", EventFilter(), Position(UUID(int=1), {})
    )
    yield views
    await views.close()


@asynccontextmanager
async def delivering(views: Views, log: MemoryLog) -> AsyncIterator[CollectorRegistry]:
    """A process that delivers or stands by, and its metrics."""
    registry, stop = CollectorRegistry(), asyncio.Event()
    async with Targets(()) as targets:
        process = Deliverer(log, views, targets, lambda _: EVERYTHING, metrics=DeliveryMetrics(registry))
        running = asyncio.create_task(process.run(stop))
        try:
            yield registry
        finally:
            stop.set()
            await running


async def until_delivering(expected: dict[CollectorRegistry, bool]) -> None:
    async def delivering() -> bool:
        found = [process.get_sample_value("artifact_store_webhook_deliverer") for process in expected]
        return found == [float(one) for one in expected.values()]

    await until(delivering, SECONDS, f"it is not so that they deliver: {list(expected.values())}")


async def until_unserved(seen: Deliveries, subscriptions: int) -> None:
    async def so() -> bool:
        return await seen.unserved() == subscriptions

    await until(so, SECONDS, f"it is not so that {subscriptions} subscriptions are unserved")


async def test_a_gateway_counts_active_subscriptions_while_nobody_delivers(views: Views) -> None:
    now, store = [0.0], Subscriptions(views)
    seen = Deliveries(store, Heartbeat(lambda: now[0]))
    assert await seen.unserved() == 1
    me = uuid4()
    assert await store.claim(me, await store.beat())
    assert await seen.unserved() == 0
    now[0] += LAPSE_SECONDS - 1
    assert await store.save(me, [])
    assert await seen.unserved() == 0
    now[0] += LAPSE_SECONDS + 1
    assert await seen.unserved() == 1
    (subscription,) = await store.page(None, 2)
    await store.change(subscription.subscription_id, None, state=State.PAUSED)
    assert await seen.unserved() == 0


async def test_a_gateway_without_the_database_does_not_say_that_all_is_well(tmp_path: Path) -> None:
    views = Views(f"sqlite+aiosqlite:///{tmp_path}/nowhere/views.db")
    assert await Deliveries(Subscriptions(views)).unserved() is None
    await views.close()


async def test_a_process_that_cannot_read_the_log_leaves_delivery_to_one_that_can(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("_BLIND_SECONDS", "_AGAIN_SECONDS", "_STANDBY_SECONDS"):
        monkeypatch.setattr(deliverer, name, 0.1)
    seen, logs = Deliveries(Subscriptions(views)), (MemoryLog(), MemoryLog())
    async with delivering(views, logs[0]) as first:
        await until_delivering({first: True})
        async with delivering(views, logs[1]) as second:
            logs[0].unavailable = True
            await until_delivering({first: False, second: True})
            logs[1].unavailable = True
            await until_delivering({first: False, second: False})
            await until_unserved(seen, 1)  # once the last one has let go
            logs[0].unavailable = False
            await until_delivering({first: True, second: False})
            await until_unserved(seen, 0)


async def test_a_database_that_is_away_is_reported_once_and_not_at_each_attempt(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(deliverer, "_AGAIN_SECONDS", 0.01)
    attempts = 0

    async def refuse(_: asyncio.StreamReader, __: asyncio.StreamWriter) -> None:
        nonlocal attempts
        attempts += 1

    async def several() -> bool:
        return attempts >= 5

    async with Connections(refuse).listening() as address:
        views = Views(f"postgresql+asyncpg://user@{address}/views")
        async with delivering(views, MemoryLog()):
            await until(several, SECONDS, "it is not tried again")
        await views.close()
    said = [record.getMessage() for record in caplog.records if record.name == deliverer.__name__]
    assert len(said) == 1, said
    assert "trying again every" in said[0], said
