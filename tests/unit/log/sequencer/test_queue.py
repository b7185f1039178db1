"""The queue of one partition: which requests share a transaction, and which wait for which."""

from __future__ import annotations

import asyncio
from threading import Thread

import pytest

from services.core.decide import IngestCheck
from services.log.sequencer import queue as requests
from services.log.sequencer.queue import ENOUGH_TOGETHER, Request, RequestQueue
from tests.commands import create, ingest

PACKAGE = create().package_id
LONG = 3_600.0
"""Nobody waits so long: a test that did would be ended by its own time-out."""


@pytest.fixture(params=[0.05, LONG], ids=["as-it-is", "for-ever"])
def gathering(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> float:
    """How long commands wait for announced ones."""
    seconds: float = request.param
    monkeypatch.setattr(requests, "GATHER_SECONDS", seconds)
    return seconds


def command(number: int = 0) -> Request:
    """A file's command."""
    return Request(ingest(PACKAGE, f"{number}.txt", name=number), asyncio.get_running_loop().create_future())


def question() -> Request:
    """Whether a file could be ingested."""
    return Request(IngestCheck(PACKAGE, ("a.txt",), None), asyncio.get_running_loop().create_future())


@pytest.mark.usefixtures("gathering")
async def test_nothing_waits_when_nothing_is_announced() -> None:
    waiting, first, second = RequestQueue(), command(1), command(2)
    waiting.put(first)
    waiting.put(second)
    assert waiting.take(LONG) == [first, second]
    waiting.announce(1)
    waiting.put(first)  # the one that was announced
    assert waiting.take(LONG) == [first]


@pytest.mark.usefixtures("gathering")
async def test_commands_wait_for_the_last_that_is_announced() -> None:
    waiting, sent = RequestQueue(), [command(number) for number in range(3)]
    waiting.announce(3)
    taken: list[list[Request] | None] = []
    taker = Thread(target=lambda: taken.append(waiting.take(LONG)))
    for request in sent[:2]:
        waiting.put(request)
    taker.start()
    waiting.put(sent[2])
    await asyncio.to_thread(taker.join)
    found = taken[0]
    assert found == sent or (found == sent[:2] and waiting.take(LONG) == sent[2:])


async def test_a_command_that_is_announced_and_does_not_come_is_not_waited_for_longer_than_agreed() -> None:
    waiting, first = RequestQueue(), command()
    waiting.announce(2)
    waiting.put(first)
    assert waiting.take(LONG) == [first]
    assert asyncio.get_running_loop().time() - first.came >= requests.GATHER_SECONDS


async def test_what_was_announced_long_ago_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GATHER_SECONDS", LONG)
    monkeypatch.setattr(requests, "ANNOUNCED_SECONDS", -1.0)
    waiting, first = RequestQueue(), command()
    waiting.announce(2)
    waiting.put(first)
    assert waiting.take(LONG) == [first]


async def test_a_question_is_answered_while_commands_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GATHER_SECONDS", LONG)
    waiting, first, asked, last = RequestQueue(), command(1), question(), command(2)
    waiting.announce(2)
    waiting.put(first)
    waiting.put(asked)
    assert waiting.take(LONG) == [asked]
    waiting.put(last)
    assert waiting.take(LONG) == [first, last]
    assert len(waiting) == 0


async def test_enough_commands_do_not_wait_and_neither_does_who_is_woken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GATHER_SECONDS", LONG)
    waiting, many = RequestQueue(), [command(number) for number in range(ENOUGH_TOGETHER)]
    waiting.announce(2 * ENOUGH_TOGETHER)
    for request in many:
        waiting.put(request)
    assert waiting.take(LONG) == many
    waiting.put_back(many[:1])
    waiting.wake()
    assert waiting.take(LONG) == many[:1]
    waiting.put_back(many[:1])
    waiting.close()
    assert waiting.take(LONG) is None
    assert waiting.drain() == many[:1]


@pytest.mark.slow
async def test_one_that_never_comes_holds_up_nobody_once_it_is_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "GATHER_SECONDS", LONG)
    waiting = RequestQueue()
    waiting.announce(1)
    announced = asyncio.get_running_loop().time()
    for number in range(3):
        waiting.announce(1)
        request = command(number)
        request.came = announced + requests.ANNOUNCED_SECONDS + number + 0.1
        waiting.put(request)
        assert waiting.take(LONG) == [request]
