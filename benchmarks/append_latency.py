"""`append-latency`: one command at a time, p50 in ms, against a bare transaction of the same event.

Ours is a single-file ingest, from its submission to its acknowledgement, read-back included. The baseline begins a
transaction, produces the event of our run with the same number and commits, and reads nothing back. Lower is better.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from random import Random
from statistics import median
from typing import Any

from benchmarks.harness import Plan
from benchmarks.kafka_topics import (
    SentRecord,
    bare_producer,
    fresh_topic,
    read_records,
    send_transaction,
    serving_writer,
)
from benchmarks.workload import package_commands
from services.config import Settings
from services.log.kafka.connection import KafkaSettings
from services.runtime.processes import collect_rarely

COMMANDS = 300


class AppendLatency:
    """The same events by two ways; see the module."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._draw = Random(21)
        self._records: Sequence[SentRecord] = ()
        self._partition = 0

    async def ours(self) -> float:
        """The median of the commands' times in ms."""
        package = package_commands(self._draw, COMMANDS)
        times = []
        collect_rarely()
        with fresh_topic(self._settings) as settings:
            async with serving_writer(settings) as writer:
                await writer.submit(package.create)
                for command in package.ingests:
                    began = time.perf_counter()
                    await writer.submit(command)
                    times.append(time.perf_counter() - began)
            found = await asyncio.to_thread(read_records, KafkaSettings.of(settings))
        self._partition, records = max(enumerate(found), key=lambda entry: len(entry[1]))
        self._records = records[1:]
        assert len(self._records) == COMMANDS, "the log does not hold what was acknowledged"
        return median(times) * 1000

    async def baseline(self) -> float:
        """The median of the transactions' times in ms."""
        return await asyncio.to_thread(self._baseline)

    def _baseline(self) -> float:
        times = []
        collect_rarely()
        with fresh_topic(self._settings) as settings:
            kafka = KafkaSettings.of(settings)
            producer = bare_producer(kafka, self._partition)
            for record in self._records:
                began = time.perf_counter()
                send_transaction(producer, kafka.topic, self._partition, [record])
                times.append(time.perf_counter() - began)
        return median(times) * 1000

    def details(self) -> Mapping[str, Any]:
        """How much work it was."""
        return {"commands": COMMANDS, "partitions": self._settings.kafka_partitions}


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[AppendLatency]:
    yield AppendLatency(settings)


PLAN = Plan("append-latency", "ms p50", 3.0, _opened, lower_is_better=True)
