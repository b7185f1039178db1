"""Three brokers, one of them always in trouble: leaders move and die under load, and every command is settled once."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from tests.contract.log_stage import ready
from tests.faults.callers import Callers
from tests.faults.torture.leaders import in_sync, prefer
from tests.integration.conditions import until
from tests.integration.kafka_stage import PARTITIONS, kafka_settings, lone_writer, open_kafka_log
from tests.services.kafka import KafkaCluster

pytestmark = [pytest.mark.services, pytest.mark.endurance]  # brokers that come and go take minutes on a busy machine


async def test_leaders_that_move_and_brokers_that_die_one_after_another_are_only_a_delay(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings = kafka_settings(
            f"kafka://{cluster.endpoint}/private", tmp_path, kafka_replication_factor=3, kafka_min_insync_replicas=2
        )

        async def whole() -> bool:
            return await asyncio.to_thread(in_sync, cluster)

        async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:
            await ready(writer)
            callers = Callers(writer)
            await callers.grow()
            for broker in cluster.brokers:
                others = [other.node_id for other in cluster.brokers if other is not broker]
                order = [broker.node_id, *others]
                await asyncio.to_thread(prefer, cluster, log.kafka.topic, range(PARTITIONS), order)
                await callers.grow()
                # It leads all partitions now; of the groups and transactions it coordinates a third.
                await asyncio.to_thread(broker.kill)
                await callers.grow()
                await asyncio.to_thread(broker.start)
                await until(whole, 60, "the brokers do not come together again")
            await callers.end(log)
