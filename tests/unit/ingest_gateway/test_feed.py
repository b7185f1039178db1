"""The feed between a log and a slow client, and the places of followers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator

import pytest

from artifact_store.errors import PushBackError, UnavailableError
from ingest_gateway.admission import Followers
from ingest_gateway.event_tail import AHEAD_BYTES, feed


async def _everything(lines: AsyncGenerator[bytes]) -> bytes:
    found = b""
    async with feed(lines) as opened:
        while (piece := await opened.take()) is not None:
            found += piece
    return found


async def test_a_feed_hands_over_everything_in_order() -> None:
    async def lines() -> AsyncGenerator[bytes]:
        for number in range(10_000):
            yield b"%d\n" % number
            if number % 100 == 0:
                await asyncio.sleep(0)

    assert await _everything(lines()) == b"".join(b"%d\n" % number for number in range(10_000))


async def test_reading_stops_behind_a_client_that_does_not_take() -> None:
    read = 0

    async def lines() -> AsyncGenerator[bytes]:
        nonlocal read
        for _ in range(1000):
            read += 1024
            yield b"x" * 1024

    async with feed(lines()) as opened:
        for _ in range(100):
            await asyncio.sleep(0)
        assert read <= AHEAD_BYTES + 1024
        piece = await opened.take()
        assert piece is not None
        assert len(piece) <= AHEAD_BYTES + 1024


async def test_what_came_before_an_error_is_handed_over_first() -> None:
    async def lines() -> AsyncGenerator[bytes]:
        yield b"a"
        yield b"b"
        raise UnavailableError("gone")

    async with feed(lines()) as opened:
        assert await opened.take() == b"ab"
        with pytest.raises(UnavailableError):
            await opened.take()


async def test_a_cancelled_take_loses_nothing_and_the_source_is_closed_in_the_end() -> None:
    go_on = asyncio.Event()
    closed = False

    async def lines() -> AsyncGenerator[bytes]:
        nonlocal closed
        try:
            yield b""
            await go_on.wait()
            yield b"late"
            await asyncio.Event().wait()
        finally:
            closed = True

    async with feed(lines()) as opened:
        assert await opened.take() == b""
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await opened.take()
        go_on.set()
        assert await opened.take() == b"late"
    assert closed


async def test_places_are_bounded_and_given_back() -> None:
    followers = Followers(1)
    async with followers.stay("a"):
        with pytest.raises(PushBackError):
            async with followers.stay("b"):
                pytest.fail("there was one place only")
    async with followers.stay("b"):
        assert len(followers) == 1
    assert len(followers) == 0


async def test_dismissed_followers_end_without_an_error_and_nobody_comes_after() -> None:
    followers = Followers(2)
    ended = []

    async def follow(client: str) -> None:
        async with followers.stay(client):
            await asyncio.Event().wait()
        ended.append(True)

    tasks = [asyncio.create_task(follow(client)) for client in "ab"]
    await asyncio.sleep(0)
    followers.dismiss()
    await asyncio.gather(*tasks)
    assert ended == [True, True]
    with pytest.raises(PushBackError):
        async with followers.stay("c"):
            pytest.fail("the gateway closes")


async def test_a_time_out_of_the_follower_s_own_is_not_taken_for_a_dismissal() -> None:
    followers = Followers()
    with pytest.raises(TimeoutError):
        async with followers.stay("a"):
            raise TimeoutError
