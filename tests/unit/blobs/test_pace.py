"""A slow body is given up while others wait for the memory that it holds, and only then."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from artifact_store.errors import PushBackError
from services.blobs.intake import SLOW_BYTES_PER_SECOND, Pace
from services.blobs.memory import ByteBudget

LOOK = 0.05


class Body:
    """Brings pieces until it is told to end, and waits in between; `many` is set once it brought so many."""

    def __init__(self, piece: bytes = b"x", many: int = 30) -> None:
        self.end = asyncio.Event()
        self.many = asyncio.Event()
        self.pieces = 0
        self._piece = piece
        self._many = many

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while not self.end.is_set():
            self.pieces += 1
            if self.pieces == self._many:
                self.many.set()
            yield self._piece
            await asyncio.wait({asyncio.create_task(self.end.wait())}, timeout=LOOK / 5)


async def consumed(pace: Pace[bytes]) -> int:
    got = 0
    async with pace:
        async for chunk in pace:
            got += len(chunk)
    return got


async def test_a_slow_body_is_given_up_when_others_wait() -> None:
    async with asyncio.timeout(30):
        with pytest.raises(PushBackError, match="KiB/s"):
            await consumed(Pace(Body(), lambda: True, size=len, look_seconds=LOOK))


async def test_a_slow_body_may_take_its_time_while_nobody_waits() -> None:
    body, waiting = Body(), False
    reading = asyncio.create_task(consumed(Pace(body, lambda: waiting, size=len, look_seconds=LOOK)))
    await body.many.wait()
    assert not reading.done()
    waiting = True
    with pytest.raises(PushBackError):
        await reading


@pytest.mark.slow
async def test_a_fast_body_goes_on_while_others_wait() -> None:
    look = 2.0  # longer than a busy machine lets a body wait
    body = Body(bytes(SLOW_BYTES_PER_SECOND), many=round(3 * look / (LOOK / 5)))
    reading = asyncio.create_task(consumed(Pace(body, lambda: True, size=len, look_seconds=look)))
    await body.many.wait()
    body.end.set()
    assert await reading == body.pieces * SLOW_BYTES_PER_SECOND


async def test_a_slow_reader_is_not_held_against_the_body() -> None:
    async def ready() -> AsyncIterator[bytes]:
        for _ in range(10):
            yield b"x"

    async with Pace(ready(), lambda: True, size=len, look_seconds=LOOK) as pace:
        count = 0
        async for _ in pace:
            await asyncio.sleep(LOOK)  # what takes time here is the reader
            count += 1
    assert count == 10


async def test_a_time_out_of_the_body_itself_and_a_cancellation_come_through() -> None:
    async def timed_out() -> AsyncIterator[bytes]:
        yield b"x"
        raise TimeoutError("of its own")

    with pytest.raises(TimeoutError, match="of its own"):
        await consumed(Pace(timed_out(), lambda: True, size=len))
    body = Body()
    reading = asyncio.create_task(consumed(Pace(body, lambda: False, size=len)))
    await body.many.wait()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading


async def test_a_budget_is_contended_while_somebody_waits() -> None:
    budget = ByteBudget(10)
    await budget.take(10)
    assert not budget.contended
    waiting = asyncio.create_task(budget.take(1))
    await asyncio.sleep(0)
    found = [budget.contended]
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    found.append(budget.contended)
    assert found == [True, False]
