"""Reading committed records from given partitions: under `Log.read`, a writer's take-over and its read-back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager

from confluent_kafka import Consumer, Message, TopicPartition

from services.errors import UnavailableError
from services.log.kafka.clients import make_consumer
from services.log.kafka.cluster import Cluster
from services.log.kafka.failures import OutsideError, explained, explaining
from services.log.kafka.settings import KafkaSettings
from services.log.port import Record

_DOING = "reading the log"


class Reader:
    """A read_committed consumer of partitions that it is given; used by one thread at a time. Every method blocks."""

    def __init__(self, kafka: KafkaSettings, starts: Mapping[int, int], cluster: Cluster) -> None:
        """`starts`: the offset to begin at, by partition. Raises ConfigurationError."""
        self._cluster = cluster
        self._parts = [TopicPartition(kafka.topic, p, offset) for p, offset in starts.items()]
        self._starts = dict(starts)
        self._consumer = make_consumer(kafka.reader())
        with explaining(_DOING):
            self._consumer.assign(self._parts)

    def take(self, limit: int, timeout: float) -> list[Record]:
        """What is there, `limit` at most, after waiting `timeout` seconds at most for the first.

        Raises UnavailableError; CorruptError when the offset to read is not in the log; ConfigurationError.
        """
        with self._reading():
            return records(take_messages(self._consumer, limit, timeout))

    def take_exactly(self, count: int, timeout: float) -> tuple[list[bytes | None], int]:
        """Wait until `count` records are there, `timeout` seconds at most; fewer when the time is over.

        Their values, and the offset of the last (0 without any). Raises as `take`.
        """
        with self._reading():
            found: list[Message] = self._consumer.consume(count, timeout)
            # Without a step of Python for each; a KafkaError cannot be compared with None, so `count` and `in` fail.
            if any(map(Message.error, found)):
                for message in found:
                    _checked(message)
            return list(map(Message.value, found)), _checked(found[-1]) if found else 0

    def reached(self) -> dict[int, int]:
        """Per partition the offset to read next: behind all that was taken, and behind markers that follow it."""
        with explaining(_DOING):
            return {**self._starts, **positions(self._consumer, self._parts)}

    def offsets_for_transaction(self) -> tuple[list[TopicPartition], object]:
        """Arguments for a producer's `send_offsets_to_transaction`: any offset, for a group that nobody joins."""
        return self._parts, self._consumer.consumer_group_metadata()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            with explaining(_DOING):
                yield
        except OutsideError as error:
            raise self._cluster.judged(error, self.reached()) from error

    def close(self) -> None:
        """Release the connections."""
        self._consumer.close()


def take_messages(consumer: Consumer, limit: int, timeout: float) -> list[Message]:
    """The first message that comes and all that wait behind it.

    `consume` alone would wait for the full number or the whole time.
    """
    found: list[Message] = consumer.consume(1, timeout)
    if found and limit > 1:
        found += consumer.consume(limit - 1, 0)
    return found


def records(messages: Iterable[Message]) -> list[Record]:
    """The records; an error among the messages is raised as an error of our tree."""
    found = []
    for message in messages:
        partition, offset = message.partition(), message.offset()
        if message.error() is not None or partition is None or offset is None:
            _checked(message)
        else:
            found.append(Record(partition, offset, message.key() or b"", message.value() or b""))
    return found


def _checked(message: Message) -> int:
    """The offset of a message that is a record; an error is raised as an error of our tree."""
    error = message.error()
    if error is not None:
        raise explained(error, _DOING)
    offset = message.offset()
    if offset is None or message.partition() is None:
        raise UnavailableError("the Kafka client returned a record without a place")
    return offset


def positions(consumer: Consumer, partitions: list[TopicPartition]) -> dict[int, int]:
    """The consumer's positions where it has one: transaction markers move it, although they are no messages."""
    return {p.partition: p.offset for p in places(consumer, partitions)}


def places(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """As `positions`, each with the leader epoch of what lies before it."""
    return [p for p in consumer.position(partitions) if p.offset >= 0]
