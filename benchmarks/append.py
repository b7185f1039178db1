"""`append` and `append-many`: full commands in events/s, against bare producers that send the very same records.

Packages of 64 files, in `append` by one command a file, as single uploads bring them, in `append-many` by one command
for all, as an archive of small files brings them. Ours decides, digests, chains, encodes, appends in transactions and
reads back every command, in one process without HTTP; enough packages are under way that no partition's queue is empty.
The baseline sends the records of our last run, 1,000 a transaction, by one producer and thread a partition, and reads
nothing back.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from threading import Barrier, Thread
from typing import Any

from benchmarks.cpu import measuring
from benchmarks.harness import Plan
from benchmarks.kafka_topics import (
    SentRecord,
    bare_producer,
    fresh_topic,
    read_records,
    send_transaction,
    serving_writer,
)
from benchmarks.workload import PackageCommands, package_commands
from services.config import Settings
from services.log.kafka import KafkaWriter
from services.log.kafka.connection import KafkaSettings
from services.runtime.processes import collect_rarely

PACKAGES = 1_200
FILES = 64
UNDER_WAY = 300
"""Packages at a time: six partitions with 3,200 commands each, three transactions' worth."""

PER_TRANSACTION = 1_000


class Append:
    """The same packages' events by two ways; see the module."""

    def __init__(self, settings: Settings, files_a_command: int) -> None:
        self._settings = settings
        self._files_a_command = files_a_command
        self._draw = Random(20)
        self._records: list[list[SentRecord]] = []
        self._cpu: Mapping[str, float] = {}

    async def ours(self) -> float:
        """Events a second, from the first command given to the last acknowledgement."""
        packages = [package_commands(self._draw, FILES, self._files_a_command) for _ in range(PACKAGES)]
        events = sum(package.events for package in packages)
        collect_rarely()
        with fresh_topic(self._settings) as settings:
            async with serving_writer(settings) as writer:
                spent, began = measuring(events), time.perf_counter()
                await _submit_all(writer, packages)
                seconds = time.perf_counter() - began
                self._cpu = spent()
            self._records = await asyncio.to_thread(read_records, KafkaSettings.of(settings))
        assert sum(map(len, self._records)) == events, "the log does not hold what was acknowledged"
        return events / seconds

    async def baseline(self) -> float:
        """Events a second, from the first transaction begun to the last committed."""
        return await asyncio.to_thread(self._baseline)

    def _baseline(self) -> float:
        collect_rarely()
        with fresh_topic(self._settings) as settings:
            seconds = _send_all(KafkaSettings.of(settings), self._records)
        return sum(map(len, self._records)) / seconds

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what each thread of our last run spent on it."""
        sizes = [len(record.value) for records in self._records for record in records]
        return {
            "packages": PACKAGES,
            "files_a_package": FILES,
            "files_a_command": self._files_a_command,
            "partitions": self._settings.kafka_partitions,
            "baseline_events_a_transaction": PER_TRANSACTION,
            "cpu_micros_an_event": self._cpu,
            "mean_value_bytes": round(sum(sizes) / len(sizes)),
        }


async def _submit_all(writer: KafkaWriter, packages: Sequence[PackageCommands]) -> None:
    """Every package as its producer would: create, then all its files, then finalize; UNDER_WAY at a time."""
    waiting = iter(packages)

    async def producer() -> None:
        for package in waiting:
            await writer.submit(package.create)
            # Not by `gather`, which would cost as much as the writer's own part of the event loop.
            for answer in [asyncio.ensure_future(writer.submit(command)) for command in package.ingests]:
                await answer
            await writer.submit(package.finalize)

    await asyncio.gather(*(producer() for _ in range(UNDER_WAY)))


def _send_all(kafka: KafkaSettings, records: Sequence[Sequence[SentRecord]]) -> float:
    """Seconds that the producers take together; each is ready before any begins."""
    ready = Barrier(len(records) + 1)

    def send(partition: int, own: Sequence[SentRecord]) -> None:
        producer = bare_producer(kafka, partition)
        ready.wait()
        for start in range(0, len(own), PER_TRANSACTION):
            send_transaction(producer, kafka.topic, partition, own[start : start + PER_TRANSACTION])

    threads = [Thread(target=send, args=(p, own)) for p, own in enumerate(records)]
    for thread in threads:
        thread.start()
    ready.wait()
    began = time.perf_counter()
    for thread in threads:
        thread.join()
    return time.perf_counter() - began


def _plan(name: str, files_a_command: int) -> Plan:
    @asynccontextmanager
    async def opened(settings: Settings) -> AsyncIterator[Append]:
        yield Append(settings, files_a_command)

    return Plan(name, "events/s", 0.25, opened)


SINGLE = _plan("append", 1)
MANY = _plan("append-many", FILES)
