"""The model against real Kafka: short scripts of client calls, played on both, have the same outcome."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any
from uuid import uuid4

import confluent_kafka
import confluent_kafka.admin
import pytest
from confluent_kafka import IsolationLevel, KafkaError, KafkaException, TopicPartition

from tests.simulation import clients
from tests.simulation.clients import Network, World
from tests.simulation.kafka import Cluster
from tests.simulation.scheduler import Process, Scheduler, installed

_admin: Any = confluent_kafka.admin
_SECONDS = 20.0


class Kafka:
    """One topic of one partition, and the clients that a script makes; on real Kafka or on the model."""

    def __init__(self, topic: str, kinds: dict[str, Any], config: dict[str, Any], clock: Callable[[], float]) -> None:
        self.topic = topic
        self._kinds = kinds
        self._config = config
        self._clock = clock

    def producer(self, name: str = "one", timeout_ms: int = 10_000) -> Any:
        """A transactional one, not initialised yet."""
        return self._kinds["producer"](
            {
                **self._config,
                "transactional.id": f"{self.topic}-{name}",
                "transaction.timeout.ms": timeout_ms,
                "retry.backoff.ms": 2,
            }
        )

    def begun(self, name: str = "one") -> Any:
        """One in its first transaction."""
        producer = self.producer(name)
        producer.init_transactions(_SECONDS)
        producer.begin_transaction()
        return producer

    def reader(self, start: int = 0, isolation: str = "read_committed") -> Any:
        """A consumer of the partition."""
        reader = self._kinds["consumer"](
            {
                **self._config,
                "group.id": f"{self.topic}-readers",
                "isolation.level": isolation,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",
            }
        )
        reader.assign([TopicPartition(self.topic, 0, start)])
        return reader

    def read(self, start: int = 0, count: int = 0) -> tuple[list[bytes], int]:
        """The values of so many committed records, and the position once nothing more comes."""
        reader = self.reader(start)
        found = [message.value() for message in reader.consume(count, _SECONDS)] if count else []
        reader.consume(1, 1.0)
        (position,) = reader.position([TopicPartition(self.topic, 0)])
        reader.close()
        return found, position.offset

    def ends(self) -> tuple[int, int]:
        """The last stable offset and the high watermark."""
        admin = self._kinds["admin"](self._config)
        ends = []
        for isolation in (IsolationLevel.READ_COMMITTED, IsolationLevel.READ_UNCOMMITTED):
            asked = {TopicPartition(self.topic, 0): _admin.OffsetSpec.latest()}
            (answer,) = admin.list_offsets(asked, isolation_level=isolation).values()
            ends.append(answer.result(_SECONDS).offset)
        return ends[0], ends[1]

    def until(self, ends: tuple[int, int]) -> bool:
        """Wait until the ends are these: markers are written after the answer to a commit."""
        deadline = self._clock() + _SECONDS
        while self.ends() != ends:
            if self._clock() > deadline:
                return False
        return True


def _outcome(call: Callable[[], Any]) -> str:
    """What a call ends in: the name of the client's error, or "done"."""
    try:
        call()
    except KafkaException as error:
        found: KafkaError = error.args[0]
        return f"{found.name()}{' (fatal)' if found.fatal() else ''}"
    return "done"


def _put(kafka: Kafka, producer: Any, *values: bytes) -> list[int]:
    offsets: list[int] = []
    for value in values:
        producer.produce(
            kafka.topic, value, b"key", 0, on_delivery=lambda error, message: offsets.append(message.offset())
        )
    producer.flush(_SECONDS)
    return offsets


def _markers_take_offsets(kafka: Kafka) -> list[Any]:
    one = kafka.begun()
    offsets = _put(kafka, one, b"a", b"b")
    one.commit_transaction(_SECONDS)
    one.begin_transaction()
    offsets += _put(kafka, one, b"c")
    one.abort_transaction(_SECONDS)
    return [offsets, kafka.until((5, 5)), kafka.read(count=2), kafka.read(start=3), kafka.read(start=5)]


def _open_transaction_hides_the_end(kafka: Kafka) -> list[Any]:
    stranger = kafka.begun("stranger")
    _put(kafka, stranger, b"s")
    one = kafka.begun()
    _put(kafka, one, b"a")
    one.commit_transaction(_SECONDS)
    seen: list[Any] = [kafka.until((0, 3)), kafka.read()]
    stranger.abort_transaction(_SECONDS)
    return [*seen, kafka.until((4, 4)), kafka.read(count=1)]


def _newcomer_fences(kafka: Kafka) -> list[Any]:
    old = kafka.begun()
    _put(kafka, old, b"a")
    new = kafka.producer()
    new.init_transactions(_SECONDS)
    seen: list[Any] = [kafka.until((2, 2)), _outcome(lambda: old.commit_transaction(_SECONDS))]
    new.begin_transaction()
    _put(kafka, new, b"b")
    return [*seen, _outcome(lambda: new.commit_transaction(_SECONDS)), kafka.until((4, 4)), kafka.read(count=1)]


def _fenced_cannot_send_offsets(kafka: Kafka) -> list[Any]:
    old = kafka.producer()
    old.init_transactions(_SECONDS)
    reader = kafka.reader()

    def prove() -> None:
        old.begin_transaction()
        old.send_offsets_to_transaction([TopicPartition(kafka.topic, 0, 0)], reader.consumer_group_metadata(), _SECONDS)
        old.abort_transaction(_SECONDS)

    seen = [_outcome(prove), _outcome(prove), kafka.ends()]
    kafka.producer().init_transactions(_SECONDS)
    return [*seen, _outcome(prove), kafka.ends()]


def _empty_transactions_ask_nobody(kafka: Kafka) -> list[Any]:
    old = kafka.producer()
    old.init_transactions(_SECONDS)
    kafka.producer().init_transactions(_SECONDS)
    old.begin_transaction()
    return [_outcome(lambda: old.abort_transaction(_SECONDS)), kafka.ends()]


def _out_of_range(kafka: Kafka) -> list[Any]:
    one = kafka.begun()
    _put(kafka, one, b"a")
    one.commit_transaction(_SECONDS)
    kafka.until((2, 2))
    reader = kafka.reader(start=7)
    (message,) = reader.consume(1, _SECONDS)
    reader.close()
    return [message.error().name(), kafka.read(start=2)]


SCRIPTS = [
    _markers_take_offsets,
    _open_transaction_hides_the_end,
    _newcomer_fences,
    _fenced_cannot_send_offsets,
    _empty_transactions_ask_nobody,
    _out_of_range,
]


def _on_model(script: Callable[[Kafka], list[Any]]) -> list[Any]:
    scheduler = Scheduler(1)
    World.scheduler, World.network = scheduler, Network()
    World.cluster = Cluster(scheduler, "model", 1)
    World.cluster.exists = True
    kinds = {"producer": clients.Producer, "consumer": clients.Consumer, "admin": clients.AdminClient}
    outcome: list[Any] = []
    with installed(scheduler, (), {}):
        process = Process(scheduler, "script")
        kafka = Kafka("model", kinds, {}, lambda: scheduler.now)
        process.spawn(lambda: outcome.append(script(kafka)), "script")
        while not outcome and scheduler.now < 600:
            scheduler.step()
        process.kill()
        scheduler.end()
    assert scheduler.crashes == []
    return outcome[0]  # type: ignore[no-any-return]


def _on_kafka(script: Callable[[Kafka], list[Any]], url: str) -> list[Any]:
    bootstrap = url.removeprefix("kafka://").partition("/")[0]
    config = {"bootstrap.servers": bootstrap}
    kinds = {
        "producer": confluent_kafka.Producer,
        "consumer": confluent_kafka.Consumer,
        "admin": confluent_kafka.admin.AdminClient,
    }
    topic = f"model-{uuid4().hex[:8]}"
    admin = _admin.AdminClient(config)
    admin.create_topics([_admin.NewTopic(topic, 1, 1)])[topic].result(_SECONDS)
    try:
        return script(Kafka(topic, kinds, config, time.monotonic))
    finally:
        admin.delete_topics([topic])[topic].result(_SECONDS)


@pytest.mark.services
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__.strip("_"))
def test_the_model_does_what_kafka_does(script: Callable[[Kafka], list[Any]], kafka_url: str) -> None:
    assert _on_model(script) == _on_kafka(script, kafka_url)
