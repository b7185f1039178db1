"""A partition's writer tells what waits for it, and who looks after it, how it is, whatever its thread waits for."""

from __future__ import annotations

import asyncio
import time
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.log.kafka.writer import Counts, PartitionWriter
from services.log.port import PartitionNotOwnedError
from tests.integration.kafka_stage import create_in


@pytest.fixture
async def writer() -> PartitionWriter:
    """One whose thread does not run, as if it hung in a call."""
    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts())
    return PartitionWriter(0, cast("Any", context))


async def test_what_waits_learns_at_once_that_the_partition_moves(writer: PartitionWriter) -> None:
    answers = [writer.submit(create_in(0)) for _ in range(3)]
    writer.stop()
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PartitionNotOwnedError}
    with pytest.raises(PartitionNotOwnedError):
        writer.submit(create_in(0))


async def test_a_transaction_that_does_not_end_is_told_of(writer: PartitionWriter) -> None:
    writer._trouble = None
    assert writer.status("this process").trouble is None
    writer._serving_since = time.monotonic() - 60
    assert writer.status("this process").trouble == "a transaction has not come to its end for 60 s"
