"""Requests of a partition without an answer in time get an error, by one timer for all of them."""

from __future__ import annotations

import asyncio

import pytest
import uvloop

from artifact_store.errors import UnavailableError
from services.log.sequencer.queue import Deadlines

SECONDS = 0.05


def late() -> Exception:
    """What a request that waits too long is told."""
    return UnavailableError("no answer in time")


async def test_only_what_is_not_answered_in_time_gets_the_error() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(SECONDS, late)
    answers: list[asyncio.Future[int]] = [loop.create_future() for _ in range(3)]
    began = loop.time()
    for answer in answers:
        deadlines.watch(answer)
    answers[1].set_result(7)
    found = await asyncio.gather(*answers, return_exceptions=True)
    assert [type(outcome) for outcome in found] == [UnavailableError, int, UnavailableError]
    assert loop.time() - began >= SECONDS * 0.9


async def test_every_request_gets_its_whole_time() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(SECONDS, late)
    first: asyncio.Future[int] = loop.create_future()
    deadlines.watch(first)
    await asyncio.sleep(SECONDS / 2)  # not to wait for something: it is the time between the two
    second: asyncio.Future[int] = loop.create_future()
    began = loop.time()
    deadlines.watch(second)
    for answer in (first, second):
        with pytest.raises(UnavailableError):
            await answer
    assert loop.time() - began >= SECONDS * 0.9


async def test_one_with_less_time_is_told_before_those_that_came_earlier() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(3_600, late)
    early: asyncio.Future[int] = loop.create_future()
    hurried: asyncio.Future[int] = loop.create_future()
    deadlines.watch(early)
    deadlines.watch(hurried, loop.time() + SECONDS)
    with pytest.raises(UnavailableError):
        await hurried
    assert deadlines.unanswered() == [early]
    early.cancel()


async def test_one_that_comes_after_a_quiet_time_is_told_too() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(SECONDS, late)
    for _ in range(2):
        answer: asyncio.Future[int] = loop.create_future()
        deadlines.watch(answer)
        with pytest.raises(UnavailableError):
            await answer


async def test_answered_requests_are_forgotten_long_before_their_time() -> None:
    loop = asyncio.get_running_loop()
    deadlines = Deadlines(3_600, late)
    for number in range(1_000):
        answer: asyncio.Future[int] = loop.create_future()
        deadlines.watch(answer)
        answer.set_result(number)
    assert deadlines.remembered == 1


def test_one_whose_time_is_over_when_it_comes_is_told_under_uvloop_too() -> None:
    """uvloop's `call_at` of a time that has passed gives a handle that does not say when it rings."""

    async def both() -> list[object]:
        loop = asyncio.get_running_loop()
        deadlines = Deadlines(SECONDS, late)
        answers: list[asyncio.Future[int]] = [loop.create_future() for _ in range(2)]
        for answer in answers:
            deadlines.watch(answer, loop.time() - 1)
        return await asyncio.gather(*answers, return_exceptions=True)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        found = runner.run(both())
    assert [type(outcome) for outcome in found] == [UnavailableError] * 2
