"""A deposed leader that does not know it was deposed: no peer or controller reaches it, but every client does."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from artifact_store.errors import PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from services.core.decide import Command
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.cluster import Cluster
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import ready
from tests.faults.peers import SplitCluster
from tests.faults.torture.leaders import coordinated_by, leaders, prefer
from tests.integration.conditions import until
from tests.integration.kafka_stage import PARTITIONS, create_in, kafka_settings, lone_writer, open_kafka_log
from tests.services.kafka import KafkaBroker

pytestmark = pytest.mark.services

SECONDS = 90.0

_ANSWERED_SECONDS = 150.0
"""For one command. An attempt of a client that hears of the deposed leader first takes 15 s, and several may."""
PARTITION = 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SplitCluster]:
    with SplitCluster(tmp_path_factory.mktemp("split")) as found:
        yield found


async def led_by_no_coordinator(cluster: SplitCluster, log: KafkaLog) -> KafkaBroker:
    """The broker that leads every partition of the log, which coordinates neither its group nor its transactions."""
    coordinators = set()
    for topic, text in (
        ("__consumer_offsets", log.kafka.writers_group),
        ("__transaction_state", f"{log.kafka.topic}-{PARTITION}"),
    ):
        found = await asyncio.to_thread(leaders, cluster.endpoint, topic)
        coordinators.add(found[coordinated_by(text, len(found))])
    first, *others = sorted(cluster.brokers, key=lambda broker: broker.node_id in coordinators)
    order = [broker.node_id for broker in (first, *others)]
    await asyncio.to_thread(prefer, cluster, log.kafka.topic, range(PARTITIONS), order)

    async def moved() -> bool:
        return set((await asyncio.to_thread(leaders, cluster.endpoint, log.kafka.topic)).values()) == {first.node_id}

    await until(moved, SECONDS, "the leaders do not move")
    return first


async def insist(writer: KafkaWriter, command: Command) -> Acknowledgement:
    """Submit the command until it is answered."""
    async with asyncio.timeout(_ANSWERED_SECONDS):
        while True:
            try:
                return await writer.submit(command)
            except UnavailableError:
                pass  # it has waited for its deadline
            except PushBackError as error:
                await asyncio.sleep(error.retry_after)


async def test_a_take_over_reads_all_that_was_recorded_although_a_deposed_leader_says_where_the_log_ends(
    cluster: SplitCluster, tmp_path: Path
) -> None:
    settings = kafka_settings(
        f"kafka://{cluster.endpoint}/private",
        tmp_path / "first",
        kafka_replication_factor=3,
        kafka_min_insync_replicas=2,
    )
    other = replace(settings, state_dir=tmp_path / "second" / "state")
    async with open_kafka_log(settings) as log, open_kafka_log(other) as successors:
        commands = [create_in(PARTITION) for _ in range(3)]
        async with lone_writer(settings, log) as writer:
            await ready(writer)
            deposed = await led_by_no_coordinator(cluster, log)
            others = ",".join(broker.endpoint for broker in cluster.brokers if broker is not deposed)
            done = [(commands[0], await insist(writer, commands[0]))]
            with cluster.without_peers(deposed):

                async def elected() -> bool:
                    found = await asyncio.to_thread(leaders, others, log.kafka.topic)
                    return not {deposed.node_id, -1} & set(found.values())

                await until(elected, SECONDS, "the other brokers elect no leader")
                done.append((commands[1], await insist(writer, commands[1])))
                await writer.close()
                end = await asyncio.to_thread(Cluster(replace(log.kafka, bootstrap=others)).last_stable, [PARTITION])
                # A process that asks about the log through this one broker.
                successors.cluster = Cluster(replace(log.kafka, bootstrap=deposed.endpoint))
                old = await asyncio.to_thread(successors.cluster.last_stable, [PARTITION])
                assert old[PARTITION] < end[PARTITION], "the deposed leader answers with an old end"
                async with lone_writer(other, successors) as successor:
                    assert await insist(successor, commands[1]) == done[1][1]
                    done.append((commands[2], await insist(successor, commands[2])))

            async def rejoined() -> bool:
                """Until it has heard of its deposition, it tells readers an old end too."""
                door = Cluster(replace(log.kafka, bootstrap=deposed.endpoint))
                known = await asyncio.to_thread(door.last_stable, [PARTITION])
                return known[PARTITION] > old[PARTITION]

            await until(rejoined, SECONDS, "the deposed leader hears nothing")
        assert_recorded_once(await read_valid(log), done)
