"""A member of a projection's consumer group: committed records of the partitions that are assigned to it."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Self, TypeVar

from confluent_kafka import Consumer, KafkaError, KafkaException, TopicPartition

from artifact_store.errors import ArtifactStoreError, CorruptError, UnavailableError
from services.log.kafka.cluster import Cluster
from services.log.kafka.connection import (
    INTERFACE,
    PROJECTOR,
    KafkaSettings,
    OutsideError,
    bounded,
    explaining,
    kafka_error,
    make_consumer,
)
from services.log.kafka.tail import places, records, take_messages
from services.log.port import Batch, Settled, StartOffsets
from services.runtime.metrics import release

logger = logging.getLogger(__name__)

_BOUNDS = bounded(4 << 20, 64 << 10)
"""A process is a member of several groups."""

_START_SECONDS = 30.0
"""How long the projection may take to say where an assignment begins, or to fold what it has read before one ends."""

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
    """See `Subscription`. One thread of its own makes every call to the consumer, callbacks included."""

    def __init__(
        self,
        kafka: KafkaSettings,
        cluster: Cluster,
        projection: str,
        start_offsets: StartOffsets,
        settled: Settled | None = None,
    ) -> None:
        """Must be made on the event loop, which `start_offsets` and `settled` then run on."""
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
        """Where this member read last, by partition, with the leader epoch of what lies before."""
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
        """See `Subscription`. What was taken away meanwhile is left to its new owner. Raises UnavailableError."""
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
            with explaining("reading the log"):
                messages = take_messages(consumer, max_records, timeout)
            if self._refused is not None:
                refused, self._refused = self._refused, None
                self._leave()
                raise refused
            # A rebalance may have happened between the records of this very batch.
            all_found = records(messages, self._cluster.framing())
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
        """Runs within a poll; an error here must not pass through the client, so it is kept for that poll to raise."""
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
        """With the leader epoch, where it is known: the client then has the leader say that it holds the same log."""
        place = self._places.get(partition)
        if place is not None and place.offset == offset:
            return place
        return TopicPartition(self._kafka.topic, partition, offset)

    def _on_revoke(self, consumer: Consumer, partitions: list[TopicPartition]) -> None:
        """Runs within a poll or while closing; the partitions go over to others when it returns."""
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
        """Where to begin each. Nothing new is asked for too: the projection looks then whether it can go on at all."""
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
