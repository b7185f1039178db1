"""Brokers die, freeze and return under load: every command is answered, and recorded exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextlib import suppress
from itertools import count
from pathlib import Path

import pytest
from confluent_kafka import Producer

from artifact_store.errors import PushBackError, UnavailableError
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core.decide import Command
from services.log.kafka import KafkaLog, KafkaWriter
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import ready
from tests.faults.torture.leaders import coordinated_by, in_sync, leaders, prefer
from tests.integration.conditions import until
from tests.integration.kafka_stage import PARTITIONS, create_in, cut_off, kafka_settings, lone_writer, open_kafka_log
from tests.services.kafka import KafkaBroker, KafkaCluster

pytestmark = pytest.mark.services

CLIENTS = 3
PAUSE_SECONDS = 0.01
"""Between two commands of a client: the brokers under test share the machine with it."""

ANSWER_SECONDS = 180.0
"""How long a client insists; a broker that starts on a busy machine takes its time."""


class Load:
    """Callers that write one command after another, each retried until it is answered."""

    def __init__(self, writer: KafkaWriter) -> None:
        self.done: list[tuple[Command, Acknowledgement]] = []
        self._stop = asyncio.Event()
        self._writer = writer
        self._clients = [asyncio.ensure_future(self._client(n)) for n in range(CLIENTS)]

    async def grows(self, by: int = 50) -> None:
        """Wait until this many more commands are answered."""
        enough = len(self.done) + by

        async def there() -> bool:
            return len(self.done) >= enough or any(client.done() for client in self._clients)

        await until(there, ANSWER_SECONDS, "commands are not answered any more")

    async def end(self) -> None:
        """Finish what is under way. Raises what a caller met."""
        self._stop.set()
        await asyncio.gather(*self._clients)

    async def _client(self, n: int) -> None:
        while not self._stop.is_set():
            command = create_in(n % PARTITIONS)
            self.done.append((command, await self._insist(command)))
            await asyncio.sleep(PAUSE_SECONDS)  # the rate of the load

    async def _insist(self, command: Command) -> Acknowledgement:
        async with asyncio.timeout(ANSWER_SECONDS):
            while True:
                with suppress(UnavailableError, PushBackError):
                    return await self._writer.submit(command)


async def held_up(log: KafkaLog, writer: KafkaWriter, fault: Callable[[], Awaitable[None]]) -> None:
    """Write under load before, during and after the fault; then hold the log to its promises."""
    await ready(writer)
    load = Load(writer)
    await load.grows()
    await fault()
    await load.grows()
    await ready(writer)
    await load.grows()
    await load.end()
    events = await read_valid(log)
    assert_recorded_once(events, load.done)
    assert len(events) == len(load.done)


@pytest.mark.parametrize("fault", ["killed", "restarted", "frozen"])
async def test_one_broker_goes_and_comes_back_on_its_data(tmp_path: Path, fault: str) -> None:
    with KafkaBroker(tmp_path / "broker") as broker:
        settings = kafka_settings(f"kafka://{broker.endpoint}/private", tmp_path)
        async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:

            async def happens() -> None:
                match fault:
                    case "killed":
                        await asyncio.to_thread(broker.kill)
                        await asyncio.to_thread(broker.start)
                    case "restarted":
                        await asyncio.to_thread(broker.restart)
                    case "frozen":
                        broker.freeze()
                        await asyncio.sleep(3)  # the fault is a time: longer than a heartbeat, shorter than a session
                        broker.thaw()

            await held_up(log, writer, happens)


async def test_the_leader_of_a_partition_is_killed_and_another_broker_leads(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings = kafka_settings(
            f"kafka://{cluster.endpoint}/private", tmp_path, kafka_replication_factor=3, kafka_min_insync_replicas=2
        )
        async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:

            async def happens() -> None:
                await asyncio.to_thread(cluster.brokers[0].kill)

            await held_up(log, writer, happens)


async def test_a_group_is_seen_although_its_coordinator_died_and_is_none_any_more(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings = kafka_settings(
            f"kafka://{cluster.endpoint}/private", tmp_path, kafka_replication_factor=3, kafka_min_insync_replicas=2
        )
        async with open_kafka_log(settings) as log, lone_writer(settings, log) as writer:
            await ready(writer)
            group, topic = log.kafka.writers_group, "__consumer_offsets"
            own = coordinated_by(group, len(await asyncio.to_thread(leaders, cluster.endpoint, topic)))

            async def seen() -> bool:
                return await asyncio.to_thread(log.cluster.members, group) is not None

            async def led() -> int:
                return (await asyncio.to_thread(leaders, cluster.endpoint, topic))[own]

            async def whole() -> bool:
                return await asyncio.to_thread(in_sync, cluster)

            await until(seen, 60, "the group has no members")
            before = await led()
            (coordinator,) = (broker for broker in cluster.brokers if broker.node_id == before)
            await asyncio.to_thread(coordinator.kill)

            async def moved() -> bool:
                return await led() not in (before, -1)

            await until(moved, 30, "nobody coordinates the group")
            await asyncio.to_thread(coordinator.start)
            await until(whole, 60, "the brokers do not come together again")
            await until(seen, 60, "the group has no members")


async def test_what_a_group_has_committed_is_known_although_another_broker_coordinates_it_by_now(
    tmp_path: Path,
) -> None:
    """An admin client that is answered NOT_COORDINATOR to OffsetFetch ends its process (librdkafka 2.16.0)."""
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings = kafka_settings(
            f"kafka://{cluster.endpoint}/private", tmp_path, kafka_replication_factor=3, kafka_min_insync_replicas=2
        )
        async with open_kafka_log(settings) as log:
            group, topic, offsets = "private.projector.registry", "__consumer_offsets", {0: 3, 2: 5}

            async def commits() -> bool:
                with suppress(UnavailableError):  # the coordinator is only just being made
                    return await asyncio.to_thread(log.cluster.commit, group, offsets, "of a view")
                return False

            await until(commits, 60, "the group cannot commit")
            committed = {p: (offset, "of a view") for p, offset in offsets.items()}
            own = coordinated_by(group, len(await asyncio.to_thread(leaders, cluster.endpoint, topic)))
            for broker in cluster.brokers:
                assert await asyncio.to_thread(log.cluster.committed, group) == committed
                others = [other.node_id for other in cluster.brokers if other is not broker]
                await asyncio.to_thread(prefer, cluster, topic, [own], [broker.node_id, *others])

                async def moved(to: int = broker.node_id) -> bool:
                    return (await asyncio.to_thread(leaders, cluster.endpoint, topic))[own] == to

                await until(moved, 30, "the group's coordinator does not move")
                assert await asyncio.to_thread(log.cluster.committed, group) == committed


async def test_offsets_are_asked_of_whoever_leads_now(tmp_path: Path) -> None:
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings = kafka_settings(
            f"kafka://{cluster.endpoint}/private", tmp_path, kafka_replication_factor=3, kafka_min_insync_replicas=2
        )
        async with open_kafka_log(settings) as log:
            topic, partitions = log.kafka.topic, range(PARTITIONS)
            before = await asyncio.to_thread(log.cluster.last_stable, partitions)
            for broker in cluster.brokers:
                others = [other.node_id for other in cluster.brokers if other is not broker]
                await asyncio.to_thread(prefer, cluster, topic, partitions, [broker.node_id, *others])

                async def moved(to: int = broker.node_id) -> bool:
                    return set((await asyncio.to_thread(leaders, cluster.endpoint, topic)).values()) == {to}

                await until(moved, 30, "the leaders do not move")
                assert await asyncio.to_thread(log.cluster.last_stable, partitions) == before


async def led_apart(cluster: KafkaCluster, folder: Path) -> tuple[Settings, int, KafkaBroker]:
    """A log with a partition that one broker leads while another coordinates its transactions; and that leader.

    Brokers spread partitions from a random one on, so a topic may have none such: then another topic is made.
    """
    for number in count():
        settings = kafka_settings(f"kafka://{cluster.endpoint}/private-{number}", folder)
        async with open_kafka_log(settings) as log:
            await asyncio.to_thread(cut_off, log, 0)
            of_log = await asyncio.to_thread(leaders, cluster.endpoint, log.kafka.topic)
            of_ids = await asyncio.to_thread(leaders, cluster.endpoint, "__transaction_state")
            for partition, leader in of_log.items():
                if leader != of_ids[coordinated_by(f"{log.kafka.topic}-{partition}", len(of_ids))]:
                    return settings, partition, cluster.brokers[leader - 1]
    raise AssertionError("never reached: the numbers do not end")


async def test_a_transaction_whose_marker_was_left_out_does_not_hold_its_partition_for_ever(tmp_path: Path) -> None:
    """The coordinator leaves the marker out while a partition has no leader, and calls the transaction complete."""
    with KafkaCluster(tmp_path / "cluster") as cluster:
        settings, partition, leader = await led_apart(cluster, tmp_path)
        async with open_kafka_log(settings) as log:
            producer = Producer({**log.kafka.producer(partition)})
            await asyncio.to_thread(producer.init_transactions, 30)
            producer.begin_transaction()
            producer.produce(log.kafka.topic, b"committed, they said", b"key", partition)
            assert await asyncio.to_thread(producer.flush, 30) == 0
            await asyncio.to_thread(leader.kill)
            await asyncio.to_thread(producer.commit_transaction, 30)
            # It succeeds once the coordinator holds the transaction for complete.
            await asyncio.to_thread(cut_off, log, partition)
            await asyncio.to_thread(leader.start)

            async def leads_again() -> bool:
                return (await asyncio.to_thread(leaders, cluster.endpoint, log.kafka.topic))[partition] != -1

            await until(leads_again, ANSWER_SECONDS, "the partition has no leader")
            stable = (await log.end()).offsets[partition]
            assert stable < (await asyncio.to_thread(log.cluster.high_watermark, [partition]))[partition]
            async with lone_writer(settings, log) as writer:
                await ready(writer)
                done: list[tuple[Command, Acknowledgement]] = []
                for _ in range(5):
                    command = create_in(partition)
                    done.append((command, await writer.submit(command)))
            events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == 5
