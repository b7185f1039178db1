"""Hand-overs within a projection's group on Kafka: who has partitions, and from when on."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from tests.contract.log_stage import PATIENCE_SECONDS, Projection
from tests.integration.kafka_stage import PARTITIONS, kafka_settings, open_kafka_log

pytestmark = pytest.mark.services


async def test_partitions_go_over_when_what_was_read_of_them_is_folded(kafka_url: str, tmp_path: Path) -> None:
    asked, folded = asyncio.Event(), asyncio.Event()

    async def settled() -> None:
        asked.set()
        await folded.wait()

    async with open_kafka_log(kafka_settings(kafka_url, tmp_path)) as log:
        projection = Projection(log)
        async with AsyncExitStack() as joined:
            one = await projection.subscribe(settled)
            joined.push_async_callback(one.close)
            joined.callback(folded.set)
            await projection.poll_until(one, lambda: len(one.assigned) == PARTITIONS)
            two = await projection.subscribe()
            joined.push_async_callback(two.close)
            giving = asyncio.create_task(projection.poll_until(one, lambda: len(two.assigned) > 0))
            async with asyncio.timeout(PATIENCE_SECONDS):
                while not asked.is_set():
                    await projection.poll(two)
            for _ in range(5):  # it would have come by then: the group asks every half second
                await projection.poll(two)
                assert two.assigned == frozenset()
            folded.set()
            taking = asyncio.create_task(projection.poll_until(two, lambda: len(two.assigned) > 0))
            await asyncio.gather(giving, taking)
            assert two.assigned | one.assigned == frozenset(range(PARTITIONS))
            assert not two.assigned & one.assigned


async def test_an_assignment_that_brings_nothing_new_is_asked_for_too(kafka_url: str, tmp_path: Path) -> None:
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path, kafka_partitions=1)) as log:
        projection, late = Projection(log), Projection(log)
        async with AsyncExitStack() as joined:
            one = await projection.subscribe()
            joined.push_async_callback(one.close)
            await projection.poll_until(one, lambda: len(one.assigned) == 1)
            two = await late.subscribe()
            joined.push_async_callback(two.close)
            both = [
                asyncio.create_task(projection.poll_until(one, lambda: len(projection.asked) > 1)),
                asyncio.create_task(late.poll_until(two, lambda: len(late.asked) > 0)),
            ]
            await asyncio.gather(*both)
        assert [list(partitions) for partitions in (*projection.asked[:2], late.asked[0])] == [[0], [], []]
