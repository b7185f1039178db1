"""From the position in an answer to a write, all later events are read, whatever the log answers."""

from __future__ import annotations

import asyncio
import time

import pytest

from artifact_store.position import Position
from services.registry import direct
from services.registry.direct import KnownEnd
from tests.memory_log import MemoryLog
from tests.views_history import History

EVENTS = History().fill(packages=9, files=2).events


async def append(log: MemoryLog, number: int) -> Position:
    """Append the event of this number; the position that its partition's writer tells."""
    event = EVENTS[number]
    partition = log.partition_of(event.package_id)
    log.append(event)
    return Position(log.id, {partition: (await MemoryLog.end(log)).offsets[partition]})


async def write(end: KnownEnd, log: MemoryLog, number: int) -> Position | None:
    """The position in the answer to a write of this event."""
    before = await end.before_write()
    return end.after(await append(log, number), before)


async def test_what_others_write_after_a_write_is_read_and_the_write_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "FRESH_SECONDS", 0.0)
    log = MemoryLog(3)
    end = KnownEnd(log)
    for number in range(0, len(EVENTS) - 1, 2):
        position = await write(end, log, number)
        await append(log, number + 1)
        assert position is not None
        assert [event.event_id async for event in log.read(position)] == [EVENTS[number + 1].event_id]
    await end.close()


async def test_the_log_is_asked_seldom_and_what_its_own_writers_told_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(direct, "FRESH_SECONDS", 3_600.0)
    log = MemoryLog(3)
    end = KnownEnd(log)
    for number in range(len(EVENTS)):
        assert await write(end, log, number) == await log.end()
    await end.close()


async def test_a_log_that_does_not_answer_holds_up_no_write(monkeypatch: pytest.MonkeyPatch) -> None:
    log = MemoryLog(3)
    end = KnownEnd(log)
    position, silent = await append(log, 0), asyncio.Event()
    log.unavailable = True
    assert end.after(position, await end.before_write()) is None
    log.unavailable = False

    async def never(_covering: Position | None = None) -> Position:
        await silent.wait()
        raise AssertionError

    monkeypatch.setattr(log, "end", never)
    began = time.monotonic()
    for _ in range(100):
        assert await end.before_write() is None
    assert time.monotonic() - began < 10 * direct.PATIENCE_SECONDS
    await end.close()


async def test_one_partition_is_all_that_there_is_to_know() -> None:
    log = MemoryLog(1)
    end = KnownEnd(log)
    assert await write(end, log, 0) == await log.end()
    await end.close()
