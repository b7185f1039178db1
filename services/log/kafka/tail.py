"""Reading committed records.

`Reader` reads given partitions: under `Log.read`, a writer's take-over and its read-back. `Watch` notices when the
topic is replaced while it is read, or when nothing more comes. `KafkaSubscription` is a member of a projection's
consumer group, and reads the partitions that the group assigns to it.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import Any, Self, TypeVar
from uuid import UUID

from confluent_kafka import Consumer, KafkaError, KafkaException, Message, TopicPartition

from artifact_store.errors import ArtifactStoreError, CorruptError, LogIdentityError, UnavailableError
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import (
    INTERFACE,
    PROJECTOR,
    KafkaSettings,
    OutsideError,
    bounded,
    explained,
    explaining,
    kafka_error,
    make_consumer,
)
from services.log.kafka.schema_registry import ConfluentFraming
from services.log.port import Batch, Record, Settled, StartOffsets
from services.runtime import tracing
from services.runtime.metrics import release

_DOING = "reading the log"


class Reader:
    """A read_committed consumer of given partitions, for one thread at a time. Every method blocks."""

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
        """The available records, at most `limit`, after waiting at most `timeout` seconds for the first; see `records`.

        Raises UnavailableError, ConfigurationError, and CorruptError if the offset to read is not in the log.
        """
        with self._reading():
            found: list[Record] = []
            for messages in take_messages(self._consumer, limit, timeout):
                found += records(messages, self._framing, headers=headers)
            return found

    def take_values(self, limit: int, timeout: float) -> tuple[list[bytes | None], int]:
        """Wait for the next `limit` records, at most fifty at a time. After `timeout` seconds, return what came.

        Returns their values, and the offset of the last (0 if there are none). Raises as `take`.
        """
        with self._reading():
            found: list[Message] = self._consumer.consume(min(limit, _TAKEN_AT_ONCE), timeout)
            # Avoids a Python step for each. A KafkaError cannot be compared with None, so `count` and `in` fail.
            if any(map(Message.error, found)):
                for message in found:
                    _checked(message)
            values: list[bytes | None] = list(map(Message.value, found))
            if self._framing is not None:
                values = [None if value is None else self._framing.received(value) for value in values]
            return values, _checked(found[-1]) if found else 0

    def reached(self) -> dict[int, int]:
        """The offset to read next, by partition: after all records that were taken, and the markers that follow."""
        with explaining(_DOING):
            return {**self._starts, **positions(self._consumer, self._parts)}

    def look_for_leaders(self, timeout: float) -> None:
        """Ask any broker who leads the partitions, for `timeout` seconds at most. Older answers are ignored.

        By itself the client asks only every five minutes, and after an error. A deposed leader gives no error.
        """
        with suppress(KafkaException):
            self._consumer.list_topics(self._parts[0].topic, timeout)

    def offsets_for_transaction(self) -> tuple[list[TopicPartition], object]:
        """Arguments for a producer's `send_offsets_to_transaction`: an arbitrary offset, for a group that nobody
        joins."""
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


_TAKEN_AT_ONCE = 50
"""A message takes about fifteen blocks of memory, because the client splits its headers. Two thousand messages exceed a
processor's cache, and creating and freeing them then takes three times as long."""


def take_messages(consumer: Consumer, limit: int, timeout: float) -> Iterator[list[Message]]:
    """The first message that comes and all messages that wait behind it, in groups; at most `limit` in all.

    `consume` alone would wait for the full number, or for the whole time.
    """
    wanted = 1
    while limit > 0 and (found := consumer.consume(wanted, timeout)):
        yield found
        limit -= len(found)
        wanted, timeout = min(limit, _TAKEN_AT_ONCE), 0


def records(messages: Iterable[Message], framing: ConfluentFraming | None, *, headers: bool = False) -> list[Record]:
    """The records, with values in single-object encoding. An error among the messages is raised as one of ours.

    Records have times and headers if requested, or while this process creates spans.
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
    """The offset of a message that is a record. If it is an error, raises it as one of ours."""
    error = message.error()
    if error is not None:
        raise explained(error, _DOING)
    offset = message.offset()
    if offset is None or message.partition() is None:
        raise UnavailableError("the Kafka client returned a record without a place")
    return offset


def positions(consumer: Consumer, partitions: list[TopicPartition]) -> dict[int, int]:
    """The consumer's positions, by partition, as far as it has them. Transaction markers move a position too, although
    they are not messages."""
    return {p.partition: p.offset for p in places(consumer, partitions)}


def places(consumer: Consumer, partitions: list[TopicPartition]) -> list[TopicPartition]:
    """As `positions`, each with the leader epoch of the record before it."""
    return [p for p in consumer.position(partitions) if p.offset >= 0]


IDENTITY_SECONDS = 10.0
"""How often a reader checks that the topic is still the same one. It also checks at the end of its reading."""

PATIENCE_SECONDS = 30.0
"""How long reading up to an end may make no progress. New leaders are found, and brokers start, in less time."""


class Watch:
    """Watches one pass over the log. The reading thread calls `took`, the event loop `check`, in turn."""

    def __init__(self, identity: UUID, ask: Callable[[], Awaitable[UUID]]) -> None:
        """`ask` returns the log's current identity."""
        self._identity = identity
        self._ask = ask
        self._looked = time.monotonic()
        self._reached: Mapping[int, int] = {}
        self._still = 0.0

    def took(self, reached: Mapping[int, int], seconds: float) -> None:
        """Note how long reading took and how far it got. Only for reads up to an end: otherwise silence is normal."""
        self._still = self._still + seconds if reached == self._reached else 0.0
        self._reached = reached

    async def check(self, *, at_end: bool = False) -> None:
        """Call it after every read, before passing on what was read.

        Raises:
            LogIdentityError: the topic was deleted and created again meanwhile, so the records may be of either log.
            UnavailableError: nothing has come for PATIENCE_SECONDS, or the topic's identity is unknown.
            ConfigurationError: the topic does not exist any more.
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


logger = logging.getLogger(__name__)

_BOUNDS = bounded(4 << 20, 64 << 10)
"""A process is a member of several groups."""

_START_SECONDS = 30.0
"""How long the projection may take to decide where an assignment begins, or to fold what it has read before one
ends."""

_LOST = frozenset(
    {
        KafkaError.ILLEGAL_GENERATION,
        KafkaError.UNKNOWN_MEMBER_ID,
        KafkaError.REBALANCE_IN_PROGRESS,
        KafkaError._ASSIGNMENT_LOST,
        KafkaError._NO_OFFSET,
        KafkaError._STATE,
    }
)

_T = TypeVar("_T")


class KafkaSubscription:
    """See `Subscription`. A dedicated thread makes every call to the consumer, including callbacks."""

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        projection: str,
        start_offsets: StartOffsets,
        settled: Settled | None = None,
    ) -> None:
        """Must be created on the event loop, on which `start_offsets` and `settled` then run."""
        self._kafka = kafka
        self._cluster = cluster
        self._group = kafka.projector_group(projection)
        self._start_offsets = start_offsets
        self._settled = settled
        self._loop = asyncio.get_running_loop()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"log-subscribe-{projection}")
        self._consumer: Consumer | None = None
        self._reached: dict[int, int] = {}
        self._places: dict[int, TopicPartition] = {}
        """Where this member read last, by partition, with the leader epoch of the record before."""
        self._refused: ArtifactStoreError | None = None

    async def open(self) -> Self:
        """Join the group; returns before anything is assigned. Raises ConfigurationError, UnavailableError."""
        await self._run(self._join)
        return self

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        """See `Subscription`."""
        return await self._run(lambda: self._poll(max_records, timeout_seconds))

    @property
    def assigned(self) -> frozenset[int]:
        """See `Subscription`."""
        return frozenset(self._reached)

    async def commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        """See `Subscription`. Ignores revoked partitions: they belong to their new owner. Raises UnavailableError."""
        await self._run(lambda: self._commit(next_offsets, metadata))

    async def close(self) -> None:
        """See `Subscription`."""
        await self._run(self._leave)
        self._thread.shutdown(wait=False)

    async def _run(self, call: Callable[[], _T]) -> _T:
        return await self._loop.run_in_executor(self._thread, call)

    def _join(self) -> None:
        self._consumer = make_consumer(self._kafka.member(self._group, f"{PROJECTOR}{release()}{INTERFACE}", _BOUNDS))
        with explaining("joining the projection's group"):
            self._consumer.subscribe(
                [self._kafka.topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
            )

    def _leave(self) -> None:
        consumer, self._consumer = self._consumer, None
        self._reached = {}
        if consumer is not None:
            consumer.close()

    def _poll(self, max_records: int, timeout: float) -> Batch:
        if self._consumer is None:
            # An assignment could not begin; joining again asks for it once more.
            self._join()
        consumer = self._joined()
        try:
            framing, assigned = self._cluster.framing(), self.assigned
            all_found: list[Record] = []
            with explaining("reading the log"):
                for messages in take_messages(consumer, max_records, timeout):
                    all_found += records(messages, framing)
                    if self._refused is not None or self.assigned != assigned:
                        break  # no partition may go and come back within one batch
            if self._refused is not None:
                refused, self._refused = self._refused, None
                self._leave()
                raise refused
            # A rebalance may have happened between the records of this very batch.
            found = [record for record in all_found if record.partition in self._reached]
        except OutsideError as error:
            raise self._cluster.judged(error, self._reached) from error
        with explaining("reading the log"):
            at = places(consumer, [TopicPartition(self._kafka.topic, p) for p in self._reached])
        self._places.update({place.partition: place for place in at})
        now = {place.partition: place.offset for place in at}
        moved = {p: offset for p, offset in now.items() if offset > self._reached.get(p, offset)}
        self._reached.update(moved)
        return Batch(found, moved)

    def _commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        offsets = [
            TopicPartition(self._kafka.topic, p, offset, metadata)
            for p, offset in next_offsets.items()
            if p in self._reached
        ]
        if not offsets:
            return
        try:
            self._joined().commit(offsets=offsets, asynchronous=False)
        except KafkaException as error:
            found = kafka_error(error)
            if found is not None and found.code() in _LOST:
                raise UnavailableError("the group is between two assignments") from error
            with explaining("committing a projection's offsets"):
                raise

    def _joined(self) -> Consumer:
        if self._consumer is None:
            raise UnavailableError("the subscription is closed")
        return self._consumer

    def _on_assign(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Runs within a poll. An error here must not pass through the client, so the poll raises it later."""
        try:
            starts = self._starts(partitions)
        except ArtifactStoreError as error:
            self._refused = error
            consumer.incremental_assign([])
            return
        # The projection's own failure, a database that is down for instance, ends the poll in the same way.
        except Exception as error:  # noqa: BLE001 - raised by the poll as UnavailableError, with its cause
            self._refused = UnavailableError(f"the projection cannot say where to begin: {type(error).__name__}")
            self._refused.__cause__ = error
            consumer.incremental_assign([])
            return
        consumer.incremental_assign([self._place(p, offset) for p, offset in starts.items()])
        self._reached.update(starts)

    def _place(self, partition: int, offset: int) -> TopicPartition:
        """The place, with the leader epoch if it is known: the client then has the leader confirm that it holds the
        same log."""
        place = self._places.get(partition)
        if place is not None and place.offset == offset:
            return place
        return TopicPartition(self._kafka.topic, partition, offset)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Runs within a poll or while closing. The partitions pass to others when it returns."""
        self._on_lost(consumer, partitions)
        if self._settled is not None and partitions:
            try:
                asyncio.run_coroutine_threadsafe(self._when_settled(self._settled), self._loop).result(_START_SECONDS)
            except TimeoutError:  # the view's guard refuses one of the two
                logger.info("partitions of %s go over while a batch is on its way", self._group)

    def _on_lost(self, _: Consumer, partitions: list[TopicPartition]) -> None:
        for p in partitions:
            self._reached.pop(p.partition, None)

    def _starts(self, partitions: list[TopicPartition]) -> dict[int, int]:
        """Where to begin each partition. Also called without new partitions, to check that the projection can
        continue."""
        numbers = [p.partition for p in partitions]
        asked = asyncio.run_coroutine_threadsafe(self._ask(numbers), self._loop)
        starts = asked.result(_START_SECONDS)
        if not numbers:
            return {}
        earliest, end = self._cluster.earliest(numbers), self._cluster.last_stable(numbers)
        if any(not earliest[p] <= starts[p] <= end[p] for p in numbers):
            for p, (first, last) in self._cluster.outside({p: starts[p] for p in numbers}).items():
                raise CorruptError(
                    f"partition {p} holds offsets {first} to {last}, reading was to begin at {starts[p]}: "
                    "the log was truncated, re-created or restored"
                )
        return {p: starts[p] for p in numbers}

    async def _when_settled(self, settled: Settled) -> None:
        await settled()

    async def _ask(self, partitions: list[int]) -> Mapping[int, int]:
        return await self._start_offsets(partitions)
