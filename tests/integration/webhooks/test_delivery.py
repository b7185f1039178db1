"""Webhooks: each event once and in order per package, signed, across restarts and rebuilds and owners' commands."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from functools import partial
from uuid import UUID

import pytest
from aiohttp import web
from prometheus_client import CollectorRegistry

from artifact_store.position import Position
from projector import replay
from services.config import Settings
from services.core.access import Grant, Packages, Right
from services.runtime.clock import system_clock
from services.webhooks.deliverer import DeliveryMetrics
from services.webhooks.subscriptions import Subscriptions
from tests.integration.conditions import until
from tests.integration.webhooks.receiver import SECONDS, Received, receiving
from tests.integration.webhooks.stage import QUICK, delivering, stage


async def test_a_subscription_gets_every_event_as_a_signed_cloud_event(settings: Settings) -> None:
    async with stage(settings) as on, receiving() as receiver:
        await on.publish()
        await on.subscribe(receiver)
        async with delivering(on):
            package = await on.publish(files=3)
            await receiver.has(5)
    assert receiver.sequences() == {str(package): [1, 2, 3, 4, 5]}
    assert receiver.forged == []
    first = receiver.accepted[0]
    assert first.event["type"] == "v1.package.created"
    assert first.event["actor"] == first.event["data"]["actor"]
    assert first.headers["webhook-id"] == first.event["id"]


async def test_a_package_whose_event_fails_waits_alone_and_goes_on_in_order(
    embedded_settings: Settings, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    shown, failing = CollectorRegistry(), asyncio.Event()

    async def shows(state: str) -> bool:
        return shown.get_sample_value("artifact_store_webhook_subscriptions", {"state": state}) == 1

    async with stage(embedded_settings) as on, receiving() as receiver:
        poisoned = await on.registry.create_package("poisoned", "ci", "main", "scratch")

        async def behave(got: Received) -> web.StreamResponse | None:
            refused = got.package_id == str(poisoned) and not failing.is_set()
            return web.Response(status=503) if refused else None

        receiver.behave = behave
        await on.subscribe(receiver, since=str(Position((await on.gateway.parts.log.end()).log, {})))
        async with delivering(on, metrics=DeliveryMetrics(shown)):
            await until(partial(shows, "failing"), SECONDS, "nothing says that the receiver fails")
            assert "its receiver refuses events: the receiver answered 503" in caplog.text
            await on.registry.ingest_file(poisoned, "a", "x/y", b"1")
            sound = await on.publish(files=2)
            await receiver.has(4)
            assert receiver.sequences() == {str(sound): [1, 2, 3, 4]}
            failing.set()
            await receiver.has(6)
            await on.registry.finalize_package(poisoned)
            await receiver.has(7)
            await until(partial(shows, "served"), SECONDS, "nothing says that the receiver works")
            assert "no event waits for its receiver" in caplog.text
            assert caplog.text.count("its receiver refuses events") == 1
    assert receiver.sequences()[str(poisoned)] == [1, 2, 3]


async def test_nothing_is_lost_or_repeated_over_an_orderly_restart_or_a_rebuild(settings: Settings) -> None:
    async with stage(settings) as on, receiving() as receiver:
        await on.subscribe(receiver)
        packages = []
        for _ in range(3):
            async with delivering(on):
                packages.append(await on.publish(files=2))
                await receiver.has(4 * len(packages))
            packages.append(await on.publish(files=2))
        async with delivering(on):
            await receiver.has(4 * len(packages))
            for in_place in (False, True):
                await replay(on.settings, "registry", in_place=in_place)
                packages.append(await on.publish(files=2))
                await receiver.has(4 * len(packages))
        async with delivering(on):  # from what is kept: nothing but this package is new
            packages.append(await on.publish(files=2))
            await receiver.has(4 * len(packages))
        assert receiver.sequences() == {str(package): [1, 2, 3, 4] for package in packages}
        assert len(receiver.received) == len(receiver.accepted)


async def test_a_parked_package_waits_for_its_owner_and_holds_back_nothing_else(embedded_settings: Settings) -> None:
    async with stage(embedded_settings) as on, receiving() as receiver, receiving() as other:
        parked = await on.registry.create_package("parked", "ci", "main", "scratch")
        mended = asyncio.Event()

        async def behave(got: Received) -> web.StreamResponse | None:
            refused = got.package_id == str(parked) and not mended.is_set()
            return web.Response(status=400, text="I do not understand") if refused else None

        receiver.behave = behave
        subscription = await on.subscribe(receiver)
        await on.subscribe(other)
        async with delivering(on, policy=replace(QUICK, park_after_seconds=0.1)):
            await on.registry.ingest_file(parked, "a", "x/y", b"1")
            held = await on.until_held(subscription, parked=True)
            assert (held["package_id"], held["sequence"], held["next_at"]) == (str(parked), 2, None)
            sound = await on.publish()
            await receiver.has(3)
        async with delivering(on):
            tried = len(receiver.received)
            await on.registry.finalize_package(parked)
            more = await on.publish()
            await receiver.has(6)
            await other.has(8)
            assert len(receiver.received) == tried + 3
            mended.set()
            (failed, *_) = [one for one in await on.deliveries(subscription) if one["status"] == 400]
            assert failed["answer"] is None, "what a private network answers is shown"
            await on.call("POST", f"/{subscription}/redeliver", 202, event_id=failed["event_id"])
            await receiver.has(8)
    everything = {str(sound): [1, 2, 3], str(more): [1, 2, 3], str(parked): [2, 3]}
    assert receiver.sequences() == other.sequences() == everything


async def test_owners_pause_rotate_test_and_redeliver(embedded_settings: Settings) -> None:
    async with stage(embedded_settings) as on, receiving() as receiver:
        before = await on.gateway.parts.log.end()
        subscription = await on.subscribe(receiver)
        first = receiver.secrets[0]
        async with delivering(on):
            package = await on.publish()
            await receiver.has(3)
            await on.call("PATCH", f"/{subscription}", 200, paused=True)
            tested = await on.call("POST", f"/{subscription}/test", 202)  # changes are taken in their order
            await receiver.has(4)
            other = await on.publish()
            assert receiver.accepted[-1].event["id"] == tested["event_id"]
            rotated = await on.call("POST", f"/{subscription}/rotate", 200)
            await on.call("PATCH", f"/{subscription}", 200, paused=False)
            await receiver.has(7)
            signatures = receiver.accepted[-1].headers["webhook-signature"].split()
            assert len(signatures) == 2
            receiver.secrets[:] = [rotated["secret"]]
            await on.call("POST", f"/{subscription}/redeliver", 202, since=str(before))
            await receiver.has(13)
            assert rotated["secret"] != first
            assert receiver.forged == []
            await on.call("DELETE", f"/{subscription}", 204)
            await on.call("GET", f"/{subscription}", 404)
    (test,) = [got for got in receiver.accepted if got.package_id == subscription]
    receiver.accepted.remove(test)
    assert receiver.sequences() == {str(package): [1, 2, 3, 1, 2, 3], str(other): [1, 2, 3, 1, 2, 3]}


async def test_filters_and_rights_decide_what_is_sent_and_lost_rights_end_it(embedded_settings: Settings) -> None:
    grants: list[Grant] = [Grant(frozenset({Right.READ, Right.SUBSCRIBE}), Packages(("team-a", "team-b")))]
    async with stage(embedded_settings) as on, receiving() as receiver:
        subscription = await on.subscribe(
            receiver, filters={"producer": ["team-a", "team-c"], "type": ["v1.package.finalized"]}
        )
        async with delivering(on, grants_of=lambda _: tuple(grants)):
            for producer in ("team-b", "team-c"):
                await on.publish(producer=producer)
            wanted = await on.publish(producer="team-a")
            await receiver.has(1)
            grants.clear()
            await on.until_shown(subscription, trouble="the owner has lost the right to subscribe and read")
            await on.publish(producer="team-a")
            grants.append(Grant(frozenset({Right.READ, Right.SUBSCRIBE})))
            last = await on.publish(producer="team-c")
            await receiver.has(3)
    assert receiver.accepted[0].package_id == str(wanted)
    assert receiver.accepted[-1].package_id == str(last)


async def test_retry_after_is_waited_for_and_410_disables_until_it_is_resumed(embedded_settings: Settings) -> None:
    times: list[float] = []

    async def leave(_: Received) -> web.StreamResponse | None:
        times.append(asyncio.get_running_loop().time())
        return web.Response(status=429, headers={"Retry-After": "1"}) if len(times) == 1 else web.Response(status=410)

    async with stage(embedded_settings) as on, receiving() as receiver, receiving() as other:
        receiver.behave = leave
        subscription = await on.subscribe(receiver)
        await on.subscribe(other)
        async with delivering(on):
            package = await on.publish(files=3)
            await on.until_shown(subscription, state="disabled")
            assert times[1] - times[0] >= 1.0
        async with delivering(on):
            later = await on.publish()
            await other.has(8)
            assert len(receiver.received) == 2
            receiver.behave = None
            await on.call("PATCH", f"/{subscription}", 200, paused=False)
            await receiver.has(8)
    assert receiver.sequences() == {str(package): [1, 2, 3, 4, 5], str(later): [1, 2, 3]}


def earlier(hours: int) -> int:
    """The time (µs since 1970) so many hours ago."""
    return system_clock() - hours * 3_600_000_000


async def test_the_previous_secret_signs_for_24_hours_and_no_longer(embedded_settings: Settings) -> None:
    async with stage(embedded_settings) as on, receiving() as within, receiving() as after:
        for receiver, hours in ((within, 23), (after, 24)):
            subscription = await on.subscribe(receiver)
            then = Subscriptions(on.gateway.parts.views, partial(earlier, hours))
            rotated = await then.rotate(UUID(subscription), None)
            receiver.secrets[:] = [rotated.secrets[0].secret]
        async with delivering(on):
            await on.publish()
            await within.has(3)
            await after.has(3)
    for receiver, signatures in ((within, 2), (after, 1)):
        assert {len(got.headers["webhook-signature"].split()) for got in receiver.accepted} == {signatures}
        assert receiver.forged == []
