"""The kinds of faults. Each causes one, heals it, and returns when everything that it disturbed works again.

A kind names the resource that it takes away; two faults never take away the same resource at one time. So the system
can continue where it promises to (with one broker of three, one gateway of three, one network or one store missing),
and must not lose anything where it cannot: with two brokers of three missing, or settings of the topic that it must
refuse.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from random import Random
from time import monotonic
from uuid import uuid4

from confluent_kafka import KafkaException, Producer

from schemas.digests import record_digest
from services.log.kafka.connection import partition_of
from tests.faults.proxy import ADD_PARTITIONS_TO_TXN, END_TXN, LIST_OFFSETS, PRODUCE
from tests.faults.torture.leaders import coordinated_by, leaders, prefer, set_on_topic
from tests.faults.torture.rudeness import hang_up_half_way, leave_without_answer
from tests.faults.torture.stage import PARTITIONS, Part, Stage, in_thread
from tests.faults.torture.storm import Storm
from tests.faults.torture.work import Entry, JournalReader
from tests.integration.processes import metrics_of, partitions_of, run_command
from tests.services.kafka import KafkaBroker
from tests.services.process import Server

_DAY_SECONDS = 86_400
_LOOK_SECONDS = 0.2
_STRAY_SECONDS = 120.0
_ANSWERED_SECONDS = 5.0
"""How long an answer may be on its way."""

_MEMORY_ONLY = "artifact_store_partition_memory_only{"

ZOMBIE_SECONDS = (17.0, 20.0)
"""Longer than the group's session time-out (6 s) and the transaction time-out (10 s) one after the other."""


@dataclass(frozen=True)
class Scene:
    """What a fault is made with."""

    stage: Stage
    rng: Random
    storm: Storm

    async def pause(self, least: float, most: float) -> None:
        """A fault is a length of time."""
        await asyncio.sleep(self.rng.uniform(least, most))


Act = Callable[[Scene], Awaitable[None]]


@dataclass(frozen=True)
class Kind:
    """`weight`: how often it is chosen, compared with others. `small_disk`: it needs a disk that it can fill."""

    name: str
    takes: frozenset[str]
    weight: float
    act: Act
    small_disk: bool = False


KINDS: list[Kind] = []


def kind(name: str, takes: str, weight: float = 1.0, *, small_disk: bool = False) -> Callable[[Act], Act]:
    """Enter a kind of fault; `takes` are words."""

    def enter(act: Act) -> Act:
        KINDS.append(Kind(name, frozenset(takes.split()), weight, act, small_disk))
        return act

    return enter


# --- gateways ---


@kind("gateway killed", "gateway", 2)
async def gateway_killed(scene: Scene) -> None:
    await _killed(scene, scene.rng.choice(scene.stage.gateways))


@kind("gateway frozen", "gateway")
async def gateway_frozen(scene: Scene) -> None:
    await _frozen(scene, scene.rng.choice(scene.stage.gateways), 0.5, 4.0)


@kind("gateway frozen beyond its transaction", "gateway", 0.7)
async def gateway_zombie(scene: Scene) -> None:
    await _frozen(scene, scene.rng.choice(scene.stage.gateways), *ZOMBIE_SECONDS)


@kind("gateway restarted in order", "gateway")
async def gateway_rolled(scene: Scene) -> None:
    gateway = scene.rng.choice(scene.stage.gateways)
    gateway.wanted = False
    await in_thread(gateway.stop)
    await scene.stage.up_again(gateway)


@kind("gateway's clock a day off", "gateway")
async def clock_wrong(scene: Scene) -> None:
    """The clock steps while the gateway writes, or it starts with a wrong one. It refuses; others go on."""
    gateway, ahead = scene.rng.choice(scene.stage.gateways), scene.rng.choice([_DAY_SECONDS, -_DAY_SECONDS])
    if scene.rng.random() < 0.5:
        gateway.wanted = False
        await in_thread(gateway.stop)
    try:
        gateway.set_clock(ahead)
        if not gateway.running:
            await scene.stage.up_again(gateway)
        await _until(lambda: "clock" in gateway.says(), 60, "a gateway writes by a wrong clock")
        await _until(lambda: partitions_of(gateway) == 0, 60, "a gateway with a wrong clock keeps partitions")
        await scene.storm.carry_out(scene.storm.fresh(scene.rng, 20))
    finally:
        gateway.set_clock(0)
    await _until(lambda: "clock" not in gateway.says(), 60, "a gateway whose clock is right again does not write")


@kind("state disk full", "gateway", 1.5, small_disk=True)
async def state_disk_full(scene: Scene) -> None:
    gateway = scene.stage.gateways[-1]
    with scene.stage.full_disk():
        full = "a full disk is not shown"
        await _until(lambda: _in_memory(gateway) or partitions_of(gateway) == 0, 60, full)
        await scene.pause(0.0, 8.0)
    await _until(lambda: not _in_memory(gateway), 60, "the state does not go back to its file")


# --- brokers ---


@kind("broker killed", "broker", 1.5)
async def broker_killed(scene: Scene) -> None:
    broker = _broker(scene)
    await in_thread(broker.kill)
    await scene.pause(0.0, 4.0)
    await in_thread(broker.start)
    await scene.stage.whole()


@kind("broker restarted in order", "broker")
async def broker_restarted(scene: Scene) -> None:
    await in_thread(_broker(scene).restart)
    await scene.stage.whole()


@kind("broker frozen", "broker")
async def broker_frozen(scene: Scene) -> None:
    await _frozen(scene, _broker(scene), 1.0, 8.0)
    await scene.stage.whole()


@kind("two brokers of three", "broker", 0.7)
async def two_brokers(scene: Scene) -> None:
    """Nothing can be acknowledged meanwhile, and nothing may be lost."""
    two = scene.rng.sample(scene.stage.cluster.brokers, 2)
    if scene.rng.random() < 0.5:
        with contextlib.ExitStack() as frozen:
            for broker in two:
                frozen.enter_context(_freezing(broker))
            await scene.pause(1.0, 12.0)
    else:
        await asyncio.gather(*(in_thread(broker.kill) for broker in two))
        await scene.pause(0.0, 8.0)
        await asyncio.gather(*(in_thread(broker.start) for broker in two))
    await scene.stage.whole()


@kind("broker cut off from its peers", "broker", 1.5)
async def broker_cut_off(scene: Scene) -> None:
    """Clients reach it all the time, and it does not know that it leads nothing any more."""
    with scene.stage.cluster.without_peers(_broker(scene)):
        await scene.pause(2.0, 25.0)
    await scene.stage.whole()


@kind("coordinator away, leaders well", "broker")
async def coordinator_away(scene: Scene) -> None:
    """The broker that coordinates the group of writers, or a writer's transactions, leads no partition of the log."""
    stage = scene.stage
    topic, text = scene.rng.choice(
        [
            ("__consumer_offsets", f"{stage.topic.removesuffix('.events')}.writers"),
            ("__transaction_state", f"{stage.topic}-{scene.rng.randrange(PARTITIONS)}"),
        ]
    )
    await _until(lambda: bool(leaders(stage.cluster.endpoint, topic)), 60, f"there is no topic {topic}")
    led = await in_thread(lambda: leaders(stage.cluster.endpoint, topic))
    away = led[coordinated_by(text, len(led))]
    broker = next(broker for broker in stage.cluster.brokers if broker.node_id == away)
    order = [other.node_id for other in stage.cluster.brokers if other is not broker]
    scene.rng.shuffle(order)
    await in_thread(lambda: prefer(stage.cluster, stage.topic, range(PARTITIONS), [*order, away]))
    await _frozen(scene, broker, 2.0, 12.0)
    await stage.whole()


@kind("leader moved", "broker", 2)
async def leader_moved(scene: Scene) -> None:
    stage = scene.stage
    partitions = scene.rng.sample(range(PARTITIONS), scene.rng.randint(1, 3))
    order = scene.rng.sample([broker.node_id for broker in stage.cluster.brokers], len(stage.cluster.brokers))
    await in_thread(lambda: prefer(stage.cluster, stage.topic, partitions, order))


# --- the network between the first gateway and the brokers ---


@kind("EndTxn late", "network", 1.5)
async def end_txn_late(scene: Scene) -> None:
    with scene.stage.network.holding(_lateness(scene), END_TXN):
        await scene.pause(0.5, 3.0)


@kind("Produce late", "network", 1.5)
async def produce_late(scene: Scene) -> None:
    with scene.stage.network.holding(_lateness(scene), PRODUCE):
        await scene.pause(0.5, 3.0)


@kind("late, then cut", "network", 1.5)
async def late_then_cut(scene: Scene) -> None:
    """The client has given the connection up when its request arrives."""
    kinds = scene.rng.choice([(END_TXN,), (PRODUCE,), (ADD_PARTITIONS_TO_TXN,), (PRODUCE, END_TXN)])
    with scene.stage.network.holding(_lateness(scene), *kinds):
        await scene.pause(0.2, 1.0)
        scene.stage.network.cut()


@kind("connections cut", "network")
async def connections_cut(scene: Scene) -> None:
    for _ in range(scene.rng.randint(1, 8)):
        scene.stage.network.cut()
        await scene.pause(0.0, 0.5)


@kind("answers lost", "network", 1.5)
async def answers_lost(scene: Scene) -> None:
    lost = [(END_TXN,), (PRODUCE,), (LIST_OFFSETS,), (END_TXN, PRODUCE, ADD_PARTITIONS_TO_TXN, LIST_OFFSETS)]
    kinds = scene.rng.choice(lost)
    with scene.stage.network.losing_answers(*kinds):
        await scene.pause(0.5, 3.0)


@kind("network slow", "network")
async def network_slow(scene: Scene) -> None:
    with scene.stage.network.slow(scene.rng.uniform(0.02, 0.3)):
        await scene.pause(1.0, 4.0)


@kind("network silent", "network")
async def network_silent(scene: Scene) -> None:
    with scene.stage.network.silent():
        await scene.pause(1.0, 16.0)


@kind("one broker out of reach", "network")
async def broker_unreachable(scene: Scene) -> None:
    with scene.stage.network.without(scene.rng.randrange(len(scene.stage.cluster.brokers))):
        await scene.pause(2.0, 60.0)


# --- rivals ---


@kind("writer cut off by a rival", "log", 1.5)
async def rival(scene: Scene) -> None:
    """A rival that takes the fence and is gone: the rightful owner must take it back."""
    stage = scene.stage
    for partition in scene.rng.sample(range(PARTITIONS), scene.rng.randint(1, 3)):
        await in_thread(lambda p=partition: _init(stage, f"{stage.topic}-{p}"))  # type: ignore[misc]  # bound early


@kind("stranger's open transaction", "log")
async def foreign_transaction(scene: Scene) -> None:
    partition = scene.rng.randrange(PARTITIONS)
    with suppress(KafkaException):  # the stranger has its own troubles with brokers that are down
        producer = await in_thread(lambda: _init(scene.stage, f"foreign-{uuid4()}"))
        producer.begin_transaction()
        producer.produce(scene.stage.topic, b"no event", b"no package", partition)
        await in_thread(lambda: producer.flush(10))
        await scene.pause(0.5, 6.0)
        await in_thread(lambda: producer.abort_transaction(20))


@kind("stranger's committed record", "log", 1.5)
async def stranger(scene: Scene) -> None:
    """It stops its partition until an operator confirms it, at once or when a gateway names it."""
    stage, partition = scene.stage, scene.rng.randrange(PARTITIONS)
    value = b"no event " + uuid4().bytes
    stage.strays.append(value)
    offset = await in_thread(lambda: stray(stage, partition, value))
    digest = record_digest(b"", value).hex()
    skip = f"log skip {partition} {offset} --digest {digest}"
    if scene.rng.random() < 0.8:
        # Other troubles of the moment may hide it.
        await _becomes(lambda: any(skip in gateway.says() for gateway in stage.gateways), 20)
    await _until(lambda: run_command(stage.settings, *skip.split()).returncode == 0, 150, f"`{skip}` fails")
    works = scene.storm.fresh(scene.rng, 20 * PARTITIONS)
    await scene.storm.carry_out([w for w in works if partition_of(w.package_id, PARTITIONS) == partition])


@kind("topic settings changed", "log broker gateway projector", 4)
async def settings_changed(scene: Scene) -> None:
    """All writers stop within a minute, and come back when it is mended. Nothing that could be lost is put at risk."""
    stage = scene.stage
    name, wrong, right = scene.rng.choice(
        [
            ("retention.ms", "31536000000", "-1"),
            ("cleanup.policy", "compact,delete", "delete"),
            ("min.insync.replicas", "1", "2"),
            ("unclean.leader.election.enable", "true", "false"),
        ]
    )
    journals = JournalReader(list(stage.folder.glob("*.journal")))
    try:
        await in_thread(lambda: set_on_topic(stage.cluster, stage.topic, name, wrong))
        await _until(lambda: all(name in g.says() for g in stage.gateways), 60, f"gateways write with {name}={wrong}")
        stopped = monotonic() + _ANSWERED_SECONDS
        await scene.pause(_ANSWERED_SECONDS + 1, _ANSWERED_SECONDS + 6)
        late = await in_thread(lambda: [e for e in journals.new() if isinstance(e, Entry) and e.ended > stopped])
        if late:
            raise AssertionError(f"{len(late)} commands were acknowledged with {name}={wrong}")
    finally:
        await in_thread(lambda: set_on_topic(stage.cluster, stage.topic, name, right))
    await _until(lambda: not any(name in g.says() for g in stage.gateways), 60, "gateways do not write again")


# --- stores and projectors ---


@kind("projector killed", "projector", 1.5)
async def projector_killed(scene: Scene) -> None:
    await _killed(scene, scene.rng.choice(scene.stage.projectors))


@kind("MinIO killed", "minio")
async def minio_killed(scene: Scene) -> None:
    await in_thread(scene.stage.minio.kill)
    await scene.pause(0.0, 2.0)
    await in_thread(scene.stage.minio.start)


@kind("MinIO frozen", "minio")
async def minio_frozen(scene: Scene) -> None:
    await _frozen(scene, scene.stage.minio, 0.5, 4.0)


@kind("PostgreSQL killed", "postgres")
async def postgres_killed(scene: Scene) -> None:
    await in_thread(scene.stage.postgres.kill)
    await scene.pause(0.0, 4.0)
    await in_thread(scene.stage.postgres.start)


@kind("PostgreSQL frozen", "postgres")
async def postgres_frozen(scene: Scene) -> None:
    await _frozen(scene, scene.stage.postgres, 0.5, 6.0)


# --- clients ---


@kind("client stops half-way", "clients")
async def client_stops(scene: Scene) -> None:
    await hang_up_half_way(scene.rng, scene.stage.urls, await scene.storm.open_package())


@kind("answer not awaited", "clients")
async def answer_not_awaited(scene: Scene) -> None:
    works = scene.storm.fresh(scene.rng, 20)
    await leave_without_answer(scene.rng, scene.stage.urls, works)
    await scene.storm.carry_out(works)


@kind("storm of retries", "clients", 1.5)
async def retry_storm(scene: Scene) -> None:
    await scene.storm.repeat(scene.rng, 150)


# --- what several of them do ---


async def _becomes(condition: Callable[[], bool], seconds: float) -> bool:
    """Wait for a condition, at most that long; whether it came. It does not hold while a gateway gives no answer."""

    def holds() -> bool:
        with suppress(OSError, HTTPException):
            return condition()
        return False

    deadline = monotonic() + seconds
    while not await in_thread(holds):
        if monotonic() > deadline:
            return False
        await asyncio.sleep(_LOOK_SECONDS)
    return True


async def _until(condition: Callable[[], bool], seconds: float, otherwise: str) -> None:
    """Wait for a condition. Raises AssertionError with `otherwise` when it does not come in time."""
    if not await _becomes(condition, seconds):
        raise AssertionError(f"{otherwise} (waited {seconds:.0f} s)")


def _in_memory(gateway: Part) -> bool:
    """Whether the state of a partition that the gateway writes to is in memory alone."""
    return any(value for name, value in metrics_of(gateway).items() if name.startswith(_MEMORY_ONLY))


def stray(stage: Stage, partition: int, value: bytes) -> int:
    """Append a record as a plain producer does that knows nothing of events; its offset. Blocks."""
    options = {"bootstrap.servers": stage.cluster.endpoint, "enable.idempotence": True, "log_level": 0}
    offsets: list[int | None] = []
    producer = Producer({**options, "message.timeout.ms": int(_STRAY_SECONDS * 1000)})
    producer.produce(
        stage.topic, value, partition=partition, on_delivery=lambda e, m: offsets.append(None if e else m.offset())
    )
    producer.flush(_STRAY_SECONDS)
    if offsets and offsets[0] is not None:
        return offsets[0]
    raise AssertionError(f"a stranger's record did not get into the log in {_STRAY_SECONDS:.0f} s")


async def _killed(scene: Scene, part: Part) -> None:
    part.wanted = False
    await in_thread(part.kill)
    await scene.pause(0.0, 3.0)
    await scene.stage.up_again(part)


async def _frozen(scene: Scene, server: Server, least: float, most: float) -> None:
    with _freezing(server):
        await scene.pause(least, most)


@contextlib.contextmanager
def _freezing(server: Server) -> Iterator[None]:
    server.freeze()
    try:
        yield
    finally:
        server.thaw()


def _broker(scene: Scene) -> KafkaBroker:
    return scene.rng.choice(scene.stage.cluster.brokers)


def _lateness(scene: Scene) -> float:
    """Within the transaction time-out or beyond it, in seconds."""
    return scene.rng.choice([scene.rng.uniform(0.5, 5.0), scene.rng.uniform(9.0, 14.0)])


def _init(stage: Stage, transactional_id: str) -> Producer:
    """A producer that has cut off every other one of this id."""
    producer = Producer(
        {"bootstrap.servers": stage.cluster.endpoint, "transactional.id": transactional_id, "log_level": 0}
    )
    with suppress(KafkaException):  # in time or not: a broker may be down at this very moment
        producer.init_transactions(10)
    return producer
