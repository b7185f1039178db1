"""Receivers that fail, hang, lie, redirect, move to a private address, answer late and come back.

Every event arrives in order per package, nothing is sent to a forbidden address, honest receivers notice nothing, and
nothing arrives again after a restart and a rebuild.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from urllib.parse import urlsplit

import pytest
from aiohttp import web

from projector import replay
from services.config import Settings
from tests.integration.webhooks.receiver import Behave, Received, Receiver, receiving
from tests.integration.webhooks.stage import delivering, stage

TIMEOUT = 0.5
PATIENCE = 60.0
FORBIDDEN = "127.0.0.2"


async def fail(_: Received) -> web.StreamResponse | None:
    return web.Response(status=500)


async def hang(_: Received) -> web.StreamResponse | None:
    await asyncio.Event().wait()
    return None


async def answer_late(_: Received) -> web.StreamResponse | None:
    await asyncio.sleep(2 * TIMEOUT)
    return None


async def talk_nonsense(got: Received) -> web.StreamResponse | None:
    assert got.request.transport is not None
    got.request.transport.write(b"220 ready for mail\r\n\r\n")
    got.request.transport.close()
    return web.Response()


async def cut_off(got: Received) -> web.StreamResponse | None:
    assert got.request.transport is not None
    got.request.transport.write(b"HTTP/1.1 200 OK\r\nContent-Le")
    got.request.transport.close()
    return web.Response()


async def never_end(got: Received) -> web.StreamResponse | None:
    answer = web.StreamResponse(status=500)
    await answer.prepare(got.request)
    while True:
        await answer.write(b"x" * 65_536)


async def send_huge_heads(_: Received) -> web.StreamResponse | None:
    return web.Response(headers={"X-Huge": "x" * 100_000})


async def ask_to_wait_for_ever(_: Received) -> web.StreamResponse | None:
    return web.Response(status=429, headers={"Retry-After": "Thu, 01 Jan 1970 00:00:00 GMT"})


def redirect_to(target: Receiver) -> Behave:
    async def redirect(_: Received) -> web.StreamResponse | None:
        return web.Response(status=307, headers={"Location": target.url})

    return redirect


def first_then_accept(behave: Behave) -> Behave:
    """Behave so at the first attempt of each event."""
    seen: set[str] = set()

    async def once(got: Received) -> web.StreamResponse | None:
        name = got.headers["webhook-id"]
        if name in seen:
            return None
        seen.add(name)
        return await behave(got)

    return once


class Moving:
    """A name that leads to 127.0.0.1 at first, then now and then to where nothing may be sent."""

    def __init__(self) -> None:
        self.asked = 0

    async def __call__(self, host: str, port: int) -> Iterable[str]:
        self.asked += 1
        return [FORBIDDEN if self.asked % 2 == 0 else "127.0.0.1"]


async def close_connection(_: Received) -> web.StreamResponse | None:
    return web.Response(headers={"Connection": "close"})


def arrived(receiver: Receiver) -> dict[str, list[int]]:
    """What a receiver has that recognises repeats: by package the numbers of the events."""
    found: dict[str, list[int]] = {}
    seen: set[str] = set()
    for got in receiver.received:
        if got in receiver.accepted and got.headers["webhook-id"] not in seen:
            seen.add(got.headers["webhook-id"])
            found.setdefault(got.package_id, []).append(got.sequence)
    return found


@pytest.mark.endurance
async def test_hostile_receivers_get_every_event_in_order_and_harm_nobody(settings: Settings) -> None:
    async with stage(settings) as on, AsyncExitStack() as stack:
        secret = await stack.enter_async_context(receiving())
        trap = await stack.enter_async_context(receiving(host=FORBIDDEN))
        behaviours = {
            "fails": fail,
            "hangs": hang,
            "late": answer_late,
            "nonsense": talk_nonsense,
            "cut off": cut_off,
            "endless": never_end,
            "huge": send_huge_heads,
            "waits": ask_to_wait_for_ever,
            "redirects": redirect_to(secret),
        }
        receivers = {name: await stack.enter_async_context(receiving()) for name in (*behaviours, "honest")}
        for name, behave in behaviours.items():
            receivers[name].behave = first_then_accept(behave)
        for receiver in receivers.values():
            await on.subscribe(receiver)
        moving = await stack.enter_async_context(receiving(trap_port(trap)))
        moving.url = f"http://moving.example:{trap_port(trap)}/hook"
        moving.behave = closing(moving)
        await on.subscribe(moving)
        receivers["moving"] = moving
        names = Moving()
        async with delivering(on, timeout_seconds=TIMEOUT, allowed=("127.0.0.1/32",), look_up=names):
            packages = [str(await on.publish()) for _ in range(2)]
            await receivers["honest"].has(6)
            wanted = {package: [1, 2, 3] for package in packages}
            for name, receiver in receivers.items():
                await complete(name, receiver, wanted)
        assert (secret.received, trap.received) == ([], [])
        assert names.asked > 2
        assert len(receivers["honest"].received) == 6
        before = {name: len(receiver.received) for name, receiver in receivers.items()}
        async with delivering(on, allowed=("127.0.0.1/32",), look_up=names):
            await replay(on.settings, "registry")
            await replay(on.settings, "retention")
            last = await on.publish()
            for name, receiver in receivers.items():
                await complete(name, receiver, {**wanted, str(last): [1, 2, 3]})
        for name, receiver in receivers.items():
            assert receiver.forged == [], name
            repeats = [got for got in receiver.received[before[name] :] if got.package_id != str(last)]
            assert repeats == [], name


def trap_port(trap: Receiver) -> int:
    return urlsplit(trap.url).port or 0


def closing(receiver: Receiver) -> Behave:
    """Accept, and close the connection, so that the name is looked up again."""

    async def accept(got: Received) -> web.StreamResponse | None:
        receiver.accepted.append(got)
        return await close_connection(got)

    return accept


async def complete(name: str, receiver: Receiver, wanted: dict[str, list[int]]) -> None:
    """Wait until the receiver has all events, and check their order."""
    count = sum(map(len, wanted.values()))
    try:
        await receiver.until(lambda: sum(map(len, arrived(receiver).values())) >= count, PATIENCE)
    finally:
        assert arrived(receiver) == wanted, name


@pytest.mark.endurance
async def test_a_receiver_that_comes_back_gets_what_it_missed(embedded_settings: Settings) -> None:
    async with stage(embedded_settings) as on, receiving() as other:
        async with receiving() as first:
            port = trap_port(first)
            await on.subscribe(first)
        await on.subscribe(other)
        async with delivering(on):
            packages = [str(await on.publish(files=2)) for _ in range(20)]
            await other.has(80)
            async with receiving(port) as back:
                back.secrets.extend(first.secrets)
                await complete("back", back, {package: [1, 2, 3, 4] for package in packages})
