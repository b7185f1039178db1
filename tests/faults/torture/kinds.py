"""The kinds of faults. Each makes one, heals it, and returns when what it took away is whole again.

A kind names what it takes away; two faults never take away the same at one time, so that the whole never asks for more
than the system promises to survive: one broker of three, one gateway of three, one network, one store.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from random import Random
from uuid import uuid4

from confluent_kafka import KafkaException, Producer

from tests.faults.proxy import ADD_PARTITIONS_TO_TXN, END_TXN, LIST_OFFSETS, PRODUCE
from tests.faults.torture.leaders import prefer
from tests.faults.torture.rudeness import hang_up_half_way, leave_without_answer
from tests.faults.torture.stage import PARTITIONS, Part, Stage, in_thread
from tests.faults.torture.storm import Storm
from tests.services.kafka import KafkaBroker
from tests.services.process import Server

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
    """`weight`: how often it is chosen, compared with others."""

    name: str
    takes: str
    weight: float
    act: Act


KINDS: list[Kind] = []


def kind(name: str, takes: str, weight: float = 1.0) -> Callable[[Act], Act]:
    """Enter a kind of fault."""

    def enter(act: Act) -> Act:
        KINDS.append(Kind(name, takes, weight, act))
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
