"""The deliverer's saved progress: a slow or failing database causes neither a lost place nor a repeat."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text

from artifact_store.errors import UnavailableError
from artifact_store.models import EventFilter
from artifact_store.position import Position
from services.config import Settings
from services.views.database import Views
from services.webhooks import deliverer
from services.webhooks.subscriptions import (
    KEPT_DELIVERIES,
    Delivery,
    HeldPackage,
    Kind,
    Progress,
    Subscription,
    Subscriptions,
    create_tables,
    webhook_cursors,
)
from tests.integration.conditions import until
from tests.integration.webhooks.receiver import SECONDS, Receiver, receiving
from tests.integration.webhooks.stage import Stage, delivering, stage

START = Position(UUID(int=1), {0: 5, 1: 5})
ME = uuid4()


@pytest.fixture
async def kept(views: Views) -> Subscriptions:
    """On both databases."""
    return await claimed(views)


async def claimed(views: Views) -> Subscriptions:
    """Subscriptions whose progress ME saves."""
    await views.migrate()
    await create_tables(views)
    found = Subscriptions(views)
    assert await found.claim(ME, await found.beat())
    return found


async def subscribed(kept: Subscriptions) -> Subscription:
    return await kept.create("ci:bot", {}, "https://receiver.example/", EventFilter(), START)


def progress(of: Subscription, first: int, last: int, epoch: int = 1) -> Progress:
    """Attempts with these numbers, all accepted, and the cursor after them."""
    event = (uuid4(), "v1.file.ingested", uuid4(), 1, 0)
    made = [Delivery(Kind.EVENT, *event, n, 1, n, 3, status=200, number=n) for n in range(first, last + 1)]
    position = Position(START.log, {0: 5 + last, 1: 5})
    return Progress(of.subscription_id, epoch, position, last, None, {}, frozenset(), made)


async def numbers(kept: Subscriptions, of: Subscription) -> list[int]:
    return [one.number for one in await kept.deliveries(of.subscription_id, 2 * KEPT_DELIVERIES)]


async def test_the_newest_deliveries_and_the_held_packages_are_kept(kept: Subscriptions) -> None:
    one, other = await subscribed(kept), await subscribed(kept)
    held = [HeldPackage(UUID(int=n), 1, 7, None, 2, n, 9, n == 1, "no answer", asked_to_wait=n == 2) for n in (1, 2)]
    first = replace(progress(one, 1, KEPT_DELIVERIES - 1), held={row.package_id: row for row in held})
    of_other = progress(other, 1, 2)
    assert await kept.save(ME, [first, of_other])
    assert (await kept.held([one.subscription_id]))[one.subscription_id] == held
    changed = replace(held[1], attempts=3)
    second = replace(
        progress(one, KEPT_DELIVERIES, KEPT_DELIVERIES + 2),
        held={changed.package_id: changed},
        released=frozenset({held[0].package_id}),
    )
    assert await kept.save(ME, [second])
    assert await kept.held([one.subscription_id, other.subscription_id]) == {one.subscription_id: [changed]}
    assert await numbers(kept, one) == list(range(KEPT_DELIVERIES + 2, 2, -1))
    assert await kept.deliveries(other.subscription_id, 9) == list(reversed(of_other.made))


async def test_deliveries_made_before_a_rewind_keep_their_numbers(kept: Subscriptions) -> None:
    made = await subscribed(kept)
    await kept.save(ME, [progress(made, 1, 1)])
    rewound = await kept.rewind(made.subscription_id, None, START)
    assert await kept.save(ME, [progress(made, 2, 3)])  # what was made in the epoch before
    ((loaded,), _) = await kept.load()
    assert (loaded.position, loaded.epoch, loaded.deliveries) == (START, rewound.epoch, 3)
    assert await kept.save(ME, [progress(made, 4, 4, rewound.epoch)])
    assert await numbers(kept, made) == [4, 3, 2, 1]


async def test_progress_is_saved_once_though_it_is_tried_again(kept: Subscriptions) -> None:
    made = await subscribed(kept)
    first = progress(made, 1, 3)
    for _ in range(2):  # the first time, no answer came
        assert await kept.save(ME, [first])
    assert await kept.deliveries(made.subscription_id, 9) == list(reversed(first.made))


async def test_who_no_longer_delivers_saves_nothing(kept: Subscriptions) -> None:
    made = await subscribed(kept)
    assert await kept.renew(ME)
    assert await kept.claim(uuid4(), await kept.beat())
    assert not await kept.renew(ME)
    assert not await kept.save(ME, [progress(made, 1, 1)])
    assert await kept.find(made.subscription_id, None) == made
    assert await numbers(kept, made) == []


@asynccontextmanager
async def cursors_held(views: Views) -> AsyncIterator[None]:
    """Another transaction has the cursors' rows until the block ends; on SQLite, all there is to write."""
    async with views.writing() as connection:
        await connection.execute(select(webhook_cursors).with_for_update())
        yield


async def until_sending_stops(on: Stage, receiver: Receiver) -> int:
    """Publish one package after the other until one is not delivered; returns how many events there are."""
    events = len(receiver.accepted)

    async def stopped() -> bool:
        nonlocal events
        await on.publish(files=0)
        events += 2
        try:
            await receiver.until(lambda: len(receiver.accepted) >= events, 0.5)
        except AssertionError:
            return True
        return False

    await until(stopped, SECONDS, "it sends on, although nothing is saved")
    return events


async def until_a_save_waits(views: Views, *, and_end_it: bool = False) -> None:
    """Wait until a connection waits for a lock of PostgreSQL's."""
    found = "pg_terminate_backend(pid)" if and_end_it else "pid"
    query = f"SELECT {found} FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"

    async def waits() -> bool:
        async with views.reading() as connection:
            return bool((await connection.execute(text(query))).all())

    await until(waits, SECONDS, "no save waits")


async def test_a_save_that_is_late_or_lost_stops_sending_and_repeats_nothing(
    embedded_settings: Settings, views_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliverer, "LATE_SECONDS", 0.5)
    monkeypatch.setattr(deliverer, "_BEAT_SECONDS", 0.1)
    monkeypatch.setattr(deliverer, "_SAVE_SECONDS", 0.1)
    async with stage(replace(embedded_settings, views_url=views_url)) as on, receiving() as receiver:
        views = on.gateway.parts.views
        subscription = await on.subscribe(receiver)
        async with delivering(on):
            await on.publish()
            await receiver.has(3)
            holder = (await Subscriptions(views).beat()).holder
            async with cursors_held(views):
                events = await until_sending_stops(on, receiver)
                if views.dialect == "postgresql":
                    await until_a_save_waits(views, and_end_it=True)
            await receiver.has(events)
            assert (await Subscriptions(views).beat()).holder == holder
        assert max(one["number"] for one in await on.deliveries(subscription)) == events
    assert len({got.headers["webhook-id"] for got in receiver.received}) == len(receiver.received) == events


@pytest.mark.services
async def test_neither_a_beat_nor_a_gateway_waits_for_a_save(postgres_url: str) -> None:
    views = Views(postgres_url)
    kept = await claimed(views)
    made = await subscribed(kept)
    async with cursors_held(views):
        saving = asyncio.create_task(kept.save(ME, [progress(made, 1, 1)]))
        await until_a_save_waits(views)
        async with asyncio.timeout(SECONDS):
            assert await kept.renew(ME)
            await subscribed(kept)
        assert not saving.done()
    assert await saving
    await views.close()


class Freezing(dict[UUID, HeldPackage]):
    """Held packages; whoever comes to save them stands still with its thread, as a process does that is stopped."""

    def __init__(self) -> None:
        self.reached = threading.Event()
        self.thaws = threading.Event()

    def values(self) -> Any:
        self.reached.set()
        assert self.thaws.wait(60)
        return super().values()


@pytest.mark.services
async def test_a_process_that_freezes_within_a_save_holds_up_nobody_who_takes_over(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.webhooks.subscriptions._FROZEN_SECONDS", 1)
    views, frozen = Views(postgres_url), Freezing()
    kept = await claimed(views)
    made = await subscribed(kept)

    async def save() -> None:
        of_thread = Views(postgres_url)
        try:
            await Subscriptions(of_thread).save(ME, [replace(progress(made, 1, 1), held=frozen)])
        finally:
            await of_thread.close()

    saving = asyncio.create_task(asyncio.to_thread(asyncio.run, save()))
    try:
        assert await asyncio.to_thread(frozen.reached.wait, SECONDS)
        other = uuid4()
        async with asyncio.timeout(SECONDS):
            assert await kept.claim(other, await kept.beat())
            assert await kept.save(other, [progress(made, 1, 2)])
    finally:
        frozen.thaws.set()
    with pytest.raises(UnavailableError):
        await saving
    assert await numbers(kept, made) == [2, 1]
    await views.close()
