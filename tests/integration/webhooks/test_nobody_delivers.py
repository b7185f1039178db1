"""Webhooks that nobody delivers are seen."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from artifact_store.models import EventFilter
from artifact_store.position import Position
from ingest_gateway.health import Deliveries
from services.views.database import Views
from services.webhooks.subscriptions import LAPSE_SECONDS, Heartbeat, State, Subscriptions, create_tables

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
