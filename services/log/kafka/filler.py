"""Fills a topic that has no writer yet with records of another log: imports, copies.

The filler takes over the partitions as their writers do, with their transactional ids. A later gateway or filler fences
it off, and its next transaction fails.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from functools import partial

from confluent_kafka import KafkaError, Message, Producer

from artifact_store.errors import ConflictError
from services.log.kafka.connection import explaining, make_producer
from services.log.kafka.driver import COMMIT_SECONDS, INIT_SECONDS
from services.log.kafka.log import KafkaLog
from services.log.port import Record

_AGAIN_SECONDS = 0.02


class KafkaFiller:
    """See `LogFiller`."""

    def __init__(self, log: KafkaLog) -> None:
        self._log = log
        self._producers: dict[int, Producer] = {}
        self._last: dict[int, int] = {}
        """By partition, the offset of the last record that was appended. Readers may not see it yet."""

    async def begin(self) -> None:
        """See `LogFiller`."""
        await self._log.check()
        kafka = self._log.kafka
        members = await self._log.blocking(lambda: self._log.cluster.members(kafka.writers_group))
        if members is None or members:
            raise ConflictError(
                f"gateways write to the topic {kafka.topic}: stop all that have {kafka.prefix} in their "
                "ARTIFACT_STORE_LOG_URL, or name another one"
            )
        partitions = range(await self._log.partitions())
        await asyncio.gather(*(self._log.blocking(partial(self._fence, p)) for p in partitions))

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        """See `LogFiller`."""
        await self._log.blocking(lambda: self._append(partition, records))

    async def settle(self) -> None:
        """See `LogFiller`. Brokers write a transaction's end to its partitions only after they answer the commit."""
        with explaining("waiting until what was appended can be read"):
            await asyncio.wait_for(self._settled(), COMMIT_SECONDS)

    async def close(self) -> None:
        """See `LogFiller`. The next writer's fence, or the time-out, aborts an open transaction."""
        self._producers.clear()

    async def _settled(self) -> None:
        while self._last:
            ends = await self._log.blocking(lambda: self._log.cluster.last_stable(self._last))
            self._last = {p: offset for p, offset in self._last.items() if ends[p] <= offset}
            if self._last:
                await asyncio.sleep(_AGAIN_SECONDS)

    def _fence(self, partition: int) -> None:
        producer = make_producer(self._log.kafka.producer(partition))
        with explaining("taking over a partition"):
            producer.init_transactions(INIT_SECONDS)
        self._producers[partition] = producer

    def _append(self, partition: int, records: Sequence[Record]) -> None:
        producer, topic = self._producers[partition], self._log.kafka.topic
        framing = self._log.cluster.framing()

        def delivered(error: KafkaError | None, message: Message) -> None:
            if error is None:
                self._last[partition] = max(message.offset() or 0, self._last.get(partition, 0))

        with explaining("appending records"):
            producer.begin_transaction()
            for record in records:
                producer.produce(
                    topic,
                    record.value if framing is None else framing.sent(record.value),
                    record.key,
                    partition,
                    delivered,
                    timestamp=record.timestamp,
                    headers=list(record.headers),
                )
            producer.commit_transaction(COMMIT_SECONDS)
