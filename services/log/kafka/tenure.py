"""One uninterrupted right to append to a partition: a fenced producer, a committed tail, and the state they keep true.

Taking over goes in this order: `init_transactions` cuts off every predecessor, then the partition is read to the high
watermark, then commands are served. Read first, and a predecessor could still append behind what was read.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import TypeVar
from uuid import UUID

from confluent_kafka import KafkaException, Producer

from schemas.events import Event
from schemas.headers import headers
from services.errors import LogIdentityError, UnavailableError
from services.log.kafka.clients import make_producer
from services.log.kafka.cluster import Cluster
from services.log.kafka.decoding import event_of
from services.log.kafka.failures import explaining
from services.log.kafka.partitioner import record_key
from services.log.kafka.reader import Reader
from services.log.kafka.settings import KafkaSettings
from services.log.kafka.state import PartitionState
from services.log.port import PartitionNotOwnedError, Record

INIT_SECONDS = 30.0
COMMIT_SECONDS = 12.0
"""Longer than the transaction time-out, so that the coordinator has decided before we give up."""

PATIENCE_SECONDS = 15.0
"""How long reading may make no progress, as it does below another producer's open transaction."""

_CONNECT_SECONDS = 0.05
"""A client that is asked to begin before it is connected looks for its coordinator again only after 0.5 s."""

_READ = 500
_LOOK_SECONDS = 0.02

_T = TypeVar("_T")


class Tenure:
    """Used by one thread. Every method blocks.

    Any exception from `append` leaves the outcome unknown: close the tenure, begin another, and look at its state.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        partition: int,
        identity: UUID,
        *,
        is_ours: Callable[[], bool],
        stopping: Callable[[], bool],
    ) -> None:
        """Take over, if `is_ours` says at the last moment that the group has the partition assigned to this process.

        Raises:
            UnavailableError: the cluster cannot be reached, or another's open transaction hides the end of the log.
            PartitionNotOwnedError: the partition is another's, or `stopping` came true meanwhile.
            CorruptError: the partition breaks an invariant. LogIdentityError: it is another topic by now.
            ConfigurationError: no right to write, or no such topic.
        """
        self.state = PartitionState()
        self._kafka = kafka
        self._cluster = cluster
        self._partition = partition
        self._stopping = stopping
        self._tail: Reader | None = None
        self._producer: Producer | None = make_producer(kafka.producer(partition))
        try:
            if (now := cluster.topic().identity) != identity:
                raise LogIdentityError(f"the topic was made anew: it was log {identity}, it is log {now}")
            time.sleep(_CONNECT_SECONDS)
            # A process that woke up late must not cut off the rightful owner.
            if not is_ours():
                raise PartitionNotOwnedError("the group has given the partition to another process")
            with explaining("taking over a partition"):
                self._producer.init_transactions(INIT_SECONDS)
            self._tail = Reader(kafka, {partition: 0})
            self._read_to(cluster.high_watermark([partition])[partition])
        except BaseException:
            self.close()
            raise

    def append(self, events: Sequence[tuple[Event, bytes]]) -> None:
        """Append events, already folded into the state, in one transaction; return when the tail has shown them all.

        Raises whatever the client raises; also UnavailableError when something else is read back, or nothing in time.
        """
        producer = _open(self._producer)
        producer.poll(0)  # hands over what the client has to log
        producer.begin_transaction()
        for event, value in events:
            self._produce(producer, event, value)
        producer.commit_transaction(COMMIT_SECONDS)
        self._read_back([value for _, value in events])

    def catch_up(self) -> bool:
        """Read to what is the last stable offset now; whether there was anything new.

        A refusal is given only on a state that was as new as the log when it was asked for: a process that was frozen
        may hold an old one without knowing.
        """
        return self._read_to(self._cluster.last_stable([self._partition])[self._partition]) > 0

    def idle(self) -> None:
        """Serve the clients' housekeeping. Raises UnavailableError when another process has written meanwhile."""
        _open(self._producer).poll(0)
        if _open(self._tail).take(1, 0):
            raise UnavailableError("another process has written to the partition")

    def close(self) -> None:
        """Throw producer and tail away; an open transaction is left to the next `init_transactions`."""
        producer, self._producer = self._producer, None
        if producer is not None:
            # A producer that was fenced refuses even this; it is going away in any case.
            with suppress(KafkaException, SystemError):
                producer.purge()
            del producer
        tail, self._tail = self._tail, None
        if tail is not None:
            tail.close()

    def _produce(self, producer: Producer, event: Event, value: bytes) -> None:
        deadline = time.monotonic() + COMMIT_SECONDS
        attributes: list[tuple[str, str | bytes | None]] = [*headers(event)]
        while True:
            try:
                producer.produce(
                    self._kafka.topic,
                    value,
                    record_key(event.package_id),
                    self._partition,
                    timestamp=event.created_at // 1000,
                    headers=attributes,
                )
                return
            except BufferError:
                # The client's queue is full: it drains while we wait.
                if time.monotonic() > deadline:
                    raise
                producer.poll(_LOOK_SECONDS)

    def _read_back(self, values: Sequence[bytes]) -> None:
        """Wait for exactly these records, in this order, with nothing between; each value holds its event's id."""
        tail = _open(self._tail)
        deadline = time.monotonic() + PATIENCE_SECONDS
        seen = 0
        while seen < len(values):
            left = deadline - time.monotonic()
            if left <= 0:
                raise UnavailableError(self._cause("events that were appended are not readable"))
            for record in tail.take_exactly(len(values) - seen, left):
                if record.value != values[seen]:
                    raise UnavailableError(f"offset {record.offset} of partition {self._partition} holds another event")
                seen += 1

    def _read_to(self, target: int) -> int:
        """Fold what lies before `target` into the state; how many events that were."""
        tail = _open(self._tail)
        deadline = time.monotonic() + PATIENCE_SECONDS
        count = 0
        while tail.reached()[self._partition] < target:
            found = tail.take(_READ, _LOOK_SECONDS)
            for record in found:
                self._fold(record)
            count += len(found)
            if found:
                deadline = time.monotonic() + PATIENCE_SECONDS
            elif time.monotonic() > deadline:
                raise UnavailableError(self._cause("the end of the log cannot be read"))
            if self._stopping():
                raise PartitionNotOwnedError("the partition was handed over while it was being taken over")
        return count

    def _fold(self, record: Record) -> None:
        self.state.apply(event_of(record))

    def _cause(self, what: str) -> str:
        partition, kafka = self._partition, self._kafka
        stable = self._cluster.last_stable([partition])[partition]
        high = self._cluster.high_watermark([partition])[partition]
        if stable >= high:
            return f"partition {partition}: {what}, although no transaction is open"
        return (
            f"partition {partition}: {what}: a transaction that is open since offset {stable} hides all up to {high}. "
            f"It ends by its own time-out; `kafka-transactions.sh --bootstrap-server {kafka.bootstrap} find-hanging "
            f"--topic {kafka.topic} --partition {partition}` shows one that does not, and its `abort` ends it"
        )


def _open(part: _T | None) -> _T:
    if part is None:
        raise UnavailableError("the writer's right to the partition has ended")
    return part
