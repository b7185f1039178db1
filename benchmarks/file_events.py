"""A log of packages with many files, for readers: valid events, encoded without a writer, on a separate topic.

As many packages as UNDER_WAY are filled at a time, RUN files of each in turn, as uploads that go on beside each other
bring them. The same arguments give the same events.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from random import Random
from uuid import UUID

from confluent_kafka import KafkaError, KafkaException, Message, Producer

from artifact_store.events import FILE_INGESTED, PACKAGE_CREATED, Event, FileIngested, PackageCreated, StorageReceipt
from artifact_store.manifest import content_key
from benchmarks.kafka_topics import fresh_topic
from schemas import identifiers
from schemas.codec import encode
from schemas.digests import event_digest, payload_digest
from schemas.headers import headers
from services.config import Settings
from services.log.kafka.connection import KafkaSettings, partition_of, record_key

UNDER_WAY = 60
RUN = 10

_CREATED = PackageCreated("run", "lab/spectrometer-3", "sample", "raw-evidence", 3650, "{}")
_ACTOR = "pipeline@lab.example"
_START = 1_700_000_000_000_000
_QUEUE = 100_000


@dataclass(frozen=True, slots=True)
class Amount:
    """How much there is: `files` in each of the packages."""

    packages: int
    files: int

    @property
    def file_events(self) -> int:
        """How many files are ingested."""
        return self.packages * self.files

    @property
    def events(self) -> int:
        """All events, those that create the packages included."""
        return self.packages + self.file_events


def file_events(amount: Amount) -> Iterator[Event]:
    """The events in the order of the log; none is finalized."""
    draw = Random(23)
    for start in range(0, amount.packages, UNDER_WAY):
        opened = [_Package(draw, number) for number in range(start, min(start + UNDER_WAY, amount.packages))]
        for package in opened:
            yield package.create()
        for first in range(0, amount.files, RUN):
            for package in opened:
                for number in range(first, min(first + RUN, amount.files)):
                    yield package.ingest(number)


class _Package:
    """One package while its events are made."""

    def __init__(self, draw: Random, number: int) -> None:
        self._draw = draw
        self._number = number
        self._command_id = UUID(bytes=draw.randbytes(16), version=4)
        self._id = identifiers.package_id(_ACTOR, self._command_id)
        self._sequence = 0
        self._digest = bytes(32)

    def create(self) -> Event:
        """The first event."""
        payload = PackageCreated(
            name=f"run-{self._number:06}",
            producer="lab/spectrometer-3",
            subject=f"sample-{self._number % 1000}",
            retention_class="raw-evidence",
            retention_days=3650,
            metadata='{"operator":"lab 7"}',
        )
        return self._event(PACKAGE_CREATED, payload)

    def ingest(self, number: int) -> Event:
        """One more file."""
        draw = self._draw
        digest, size = draw.randbytes(32), draw.randrange(1, 64 << 20)
        path, key = f"frames/{number // 16:03}/frame-{number:06}.bin", content_key(digest)
        file_id = identifiers.file_id(self._id, path)
        location = identifiers.location_id(file_id, "s3", key, 0, size)
        receipt = StorageReceipt(location, "s3", key, 0, size, _START + draw.randrange(10**9))
        sha256 = draw.randbytes(32)
        payload = FileIngested(file_id, path, "application/octet-stream", size, digest, sha256, receipt)
        if number % RUN == 0:
            self._command_id = UUID(bytes=draw.randbytes(16), version=4)
        return self._event(FILE_INGESTED, payload)

    def _event(self, event_type: str, payload: PackageCreated | FileIngested) -> Event:
        self._sequence += 1
        event = Event(
            event_id=identifiers.event_id(self._id, self._sequence),
            event_type=event_type,
            package_id=self._id,
            sequence=self._sequence,
            created_at=_START + self._number * 1_000_000 + self._sequence,
            actor=_ACTOR,
            command_id=self._command_id,
            command_index=0,
            command_count=1,
            payload_digest=payload_digest(payload),
            previous_digest=self._digest,
            payload=payload,
        )
        self._digest = event_digest(event)
        return event


@asynccontextmanager
async def filled_topic(settings: Settings, amount: Amount) -> AsyncIterator[Settings]:
    """Settings whose log is a topic that holds these events, with the headers that a writer gives them."""
    with fresh_topic(settings) as fresh:
        await asyncio.to_thread(_send, KafkaSettings.of(fresh), amount)
        yield fresh


def _send(kafka: KafkaSettings, amount: Amount) -> None:
    """By one idempotent producer, without transactions. Blocks. Raises KafkaException: a record is refused."""

    def told(error: KafkaError | None, _: Message) -> None:
        if error is not None:
            raise KafkaException(error)

    config = kafka.producer(0)
    del config["transactional.id"], config["transaction.timeout.ms"]
    producer = Producer(config)
    for sent, event in enumerate(file_events(amount)):
        package = event.package_id
        given = headers(event, UUID(int=1), _CREATED)
        partition = partition_of(package, kafka.partitions)
        millis = event.created_at // 1000
        place = (kafka.topic, encode(event), record_key(package), partition)
        producer.produce(*place, on_delivery=told, timestamp=millis, headers=given)
        if sent % 1000 == 0:
            producer.poll(0)
            if len(producer) > _QUEUE:
                producer.flush(10)
    if left := producer.flush(60):
        raise RuntimeError(f"{left} records were not taken")
