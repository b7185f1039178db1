"""Readers and a writer at fixed rates during a rebuild: what each read found, and how long it took."""

from __future__ import annotations

import asyncio
import random
import statistics
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from uuid import UUID

from confluent_kafka import Producer

from artifact_store.errors import ArtifactStoreError
from artifact_store.events import Event
from schemas.codec import encode
from services.log.kafka import KafkaLog
from services.log.kafka.connection import record_key
from services.views.database import Views
from services.views.queries import Queries
from tests.views_history import History

READS_A_SECOND = 100
WRITES_A_SECOND = 50

_FILES = 20
"""In each package that is written; those that are there before have more."""

_PAGE = 50


@dataclass
class Reads:
    """Seconds of each read, and what was wrong."""

    seconds: list[float] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)

    def p99(self, since: int = 0) -> float:
        """The 99th percentile of the reads from number `since` on, in seconds."""
        return statistics.quantiles(self.seconds[since:], n=100)[-1]


class Load:
    """Reads of packages, old and new ones, and of their files, and single events written; used once."""

    def __init__(self, views: Views, log: KafkaLog, packages: Sequence[UUID], seed: int) -> None:
        """`packages` are in the view already."""
        self.reads = Reads()
        self.written = 0
        self._queries = Queries(views)
        self._log = log
        self._packages = list(packages)
        self._seen = dict.fromkeys(packages, 0)
        self._draw = random.Random(seed)
        self._fresh = _events(seed)
        self._producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "linger.ms": 5, "log_level": 3})
        self._under_way: set[asyncio.Task[None]] = set()

    @asynccontextmanager
    async def running(self) -> AsyncIterator[Reads]:
        """Read and write inside the block, at the rates."""
        tasks = [
            asyncio.create_task(_at_rate(READS_A_SECOND, self._start_read)),
            asyncio.create_task(_at_rate(WRITES_A_SECOND, self._write)),
        ]
        try:
            yield self.reads
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await asyncio.gather(*self._under_way)
            await asyncio.to_thread(self._producer.flush, 10)

    def _start_read(self) -> None:
        # Whoever asks does not wait for who asked before.
        task = asyncio.create_task(self._read(self._draw.choice(self._packages)))
        self._under_way.add(task)
        task.add_done_callback(self._under_way.discard)

    async def _read(self, package_id: UUID) -> None:
        seen, began = self._seen[package_id], time.perf_counter()
        try:
            if self._draw.random() < 0.5:
                package = await self._queries.package(package_id)
                found = 0 if package is None else package.last_event_sequence
            else:
                found = 1 + len((await self._queries.files(package_id, limit=_PAGE)).items)
                seen = min(seen, 1 + _FILES)  # a page has no more, and a finalization is no file
        except (ArtifactStoreError, OSError) as error:
            self.reads.wrong.append(f"{package_id} could not be read: {error!r}")
            return
        self.reads.seconds.append(time.perf_counter() - began)
        if found < seen:
            self.reads.wrong.append(f"{package_id} was at event {seen} and is at {found}")
        self._seen[package_id] = max(self._seen[package_id], found)

    def _write(self) -> None:
        event = next(self._fresh)
        if event.package_id not in self._seen:
            self._seen[event.package_id] = 0
            self._packages.append(event.package_id)
        partition = self._log.partition_of(event.package_id)
        self._producer.produce(self._log.kafka.topic, encode(event), record_key(event.package_id), partition)
        self._producer.poll(0)
        self.written += 1


def _events(seed: int) -> Iterator[Event]:
    """Events of ever new packages, a few files each, finalized in the end."""
    history = History(seed)
    while True:
        history.events.clear()
        package_id = history.create()
        for number in range(_FILES):
            history.ingest(package_id, f"file-{number}")
        history.finalize(package_id)
        yield from list(history.events)


async def _at_rate(rate: int, call: Callable[[], None]) -> None:
    """Call so often a second, however long the loop was busy with something else."""
    due = time.perf_counter()
    while True:
        call()
        due += 1 / rate
        await asyncio.sleep(max(0.0, due - time.perf_counter()))
