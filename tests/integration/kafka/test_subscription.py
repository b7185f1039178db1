"""Hand-overs within a projection's group on Kafka: who has which partitions, and when."""

from __future__ import annotations

import asyncio
from contextlib import AsyncExitStack
from pathlib import Path
from typing import cast

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from services.log.kafka.tail import KafkaSubscription
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


async def test_a_member_that_joins_again_has_the_leader_check_what_it_has_read(
    kafka_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the leader's epoch: a deposed leader, or a log that lost its end, then answers with an error."""
    assigned: list[TopicPartition] = []

    class Watched(Consumer):
        def incremental_assign(self, partitions: list[TopicPartition]) -> None:
            assigned.extend(partitions)
            super().incremental_assign(partitions)

    monkeypatch.setattr("services.log.kafka.connection.Consumer", Watched)
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path, kafka_partitions=1)) as log:
        producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
        producer.produce(log.kafka.topic, b"a record", partition=0)
        assert await asyncio.to_thread(producer.flush, 30) == 0
        projection = Projection(log)
        member = cast("KafkaSubscription", await projection.subscribe())
        try:
            await projection.catch_up(member)
            await member._run(member._leave)
            await projection.poll_until(member, lambda: len(projection.asked) > 1)
        finally:
            await member.close()
    assert [(place.offset, place.leader_epoch) for place in assigned] == [(0, None), (1, 0)]
