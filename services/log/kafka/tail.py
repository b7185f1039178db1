"""Reading committed records from given partitions: under `Log.read`, a writer's take-over and its read-back.

`Reader` reads; `Watch` notices when the topic is replaced while it is read, or when nothing more comes.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from uuid import UUID

from confluent_kafka import Consumer, KafkaException, Message, TopicPartition

from artifact_store.errors import LogIdentityError, UnavailableError
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import KafkaSettings, OutsideError, explained, explaining, make_consumer
from services.log.kafka.schema_registry import ConfluentFraming
from services.log.port import Record
from services.runtime import tracing

_DOING = "reading the log"


class Reader:
    """A read_committed consumer of partitions that it is given; used by one thread at a time. Every method blocks."""

    def __init__(
        self, kafka: KafkaSettings, starts: Mapping[int, int], cluster: Cluster, own: Mapping[str, int] | None = None
    ) -> None:
        """`starts`: the offset to begin at, by partition; `own` as in `KafkaSettings.reader`.

        Raises as `Cluster.framing`.
        """
        self._cluster = cluster
        self._framing = cluster.framing()
        self._parts = [TopicPartition(kafka.topic, p, offset) for p, offset in starts.items()]
        self._starts = dict(starts)
        self._consumer = make_consumer(kafka.reader(own))
        with explaining(_DOING):
            self._consumer.assign(self._parts)

    def take(self, limit: int, timeout: float, *, headers: bool = False) -> list[Record]:
        """What is there, `limit` at most, after waiting `timeout` seconds at most for the first; see `records`.

        Raises UnavailableError; CorruptError when the offset to read is not in the log; ConfigurationError.
        """
        with self._reading():
            return records(take_messages(self._consumer, limit, timeout), self._framing, headers=headers)

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
            values: list[bytes | None] = list(map(Message.value, found))
            if self._framing is not None:
                values = [None if value is None else self._framing.received(value) for value in values]
            return values, _checked(found[-1]) if found else 0

    def reached(self) -> dict[int, int]:
        """Per partition the offset to read next: behind all that was taken, and behind markers that follow it."""
        with explaining(_DOING):
            return {**self._starts, **positions(self._consumer, self._parts)}

    def look_for_leaders(self, timeout: float) -> None:
        """Ask any broker who leads the partitions, for `timeout` seconds at most. An answer that is older is ignored.

        The client asks by itself only every five minutes, and after an error. A deposed leader gives none.
        """
        with suppress(KafkaException):
            self._consumer.list_topics(self._parts[0].topic, timeout)

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


def records(messages: Iterable[Message], framing: ConfluentFraming | None, *, headers: bool = False) -> list[Record]:
    """The records, with values in single-object encoding. Raises an error among the messages as one of our tree.

    They have times and headers if asked for, or while this process makes spans.
    """
    found = []
    headers = headers or tracing.tracer is not None
    for message in messages:
        partition, offset = message.partition(), message.offset()
        if message.error() is not None or partition is None or offset is None:
            _checked(message)
        else:
            value = message.value() or b""
            record = Record(
                partition, offset, message.key() or b"", value if framing is None else framing.received(value)
            )
            found.append(_whole(record, message) if headers else record)
    return found


def _whole(record: Record, message: Message) -> Record:
    found: Any = message.headers() or ()
    return record._replace(timestamp=message.timestamp()[1], headers=tuple(found))


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


IDENTITY_SECONDS = 10.0
"""How often a reader looks whether the topic is still the same one; it also does when it has come to its end."""

PATIENCE_SECONDS = 30.0
"""How long reading up to an end may make no progress; leaders are found anew, and brokers start, in less."""


class Watch:
    """Of one pass over the log. `took` is for the thread that reads, `check` for the event loop, by turns."""

    def __init__(self, identity: UUID, ask: Callable[[], Awaitable[UUID]]) -> None:
        """`ask` says what the log's identity is now."""
        self._identity = identity
        self._ask = ask
        self._looked = time.monotonic()
        self._reached: Mapping[int, int] = {}
        self._still = 0.0

    def took(self, reached: Mapping[int, int], seconds: float) -> None:
        """Reading took so long and has come this far. Only for who reads to an end: elsewhere silence is no news."""
        self._still = self._still + seconds if reached == self._reached else 0.0
        self._reached = reached

    async def check(self, *, at_end: bool = False) -> None:
        """Call it after every read, before anything of it is passed on.

        Raises:
            LogIdentityError: the topic was deleted and created again meanwhile, so the records may be of either log.
            UnavailableError: nothing has come for PATIENCE_SECONDS, or nobody says which topic it is.
            ConfigurationError: the topic is gone.
        """
        stuck = self._still > PATIENCE_SECONDS
        if at_end or stuck or time.monotonic() > self._looked + IDENTITY_SECONDS:
            now = await self._ask()
            if now != self._identity:
                raise LogIdentityError(
                    f"the topic was deleted and created again while it was read: it was {self._identity}, is {now}"
                )
            self._looked = time.monotonic()
        if stuck:
            raise UnavailableError(
                f"the log cannot be read to its end: no broker has sent anything for {PATIENCE_SECONDS:g} s"
            )
