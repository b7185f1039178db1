"""How much of the log a reader buffers when its caller takes one event and then nothing."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest

from services.config import Settings
from services.log.kafka import KafkaLog
from services.log.kafka import log as log_
from services.log.kafka.tail import Reader
from tests.contract.log_stage import ready
from tests.integration.kafka_stage import create_in, lone_writer

pytestmark = pytest.mark.services

EVENTS, EVENT_BYTES = 200, 60_000
MOST_HELD = 3 << 20


async def test_records_that_are_packed_well_do_not_wait_all_at_once(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fetch is bounded as it is packed, here by 200 to 1, and unpacked whole."""
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        large = '{"x":"' + "x" * EVENT_BYTES + '"}'
        await asyncio.gather(*(writer.submit(create_in(0, metadata=large)) for _ in range(EVENTS)))
    opened: list[Reader] = []

    class Known(Reader):
        def __init__(self, *arguments: object) -> None:
            super().__init__(*arguments)  # type: ignore[arg-type]
            opened.append(self)

    monkeypatch.setattr(log_, "Reader", Known)
    async with aclosing(log.read()) as events:
        await anext(events)
        (reader,) = opened
        waiting = await asyncio.to_thread(reader.take, EVENTS, 0)
        assert sum(len(record.value) for record in waiting) < MOST_HELD
        assert len([event async for event in log.read()]) == EVENTS
