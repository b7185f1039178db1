"""`catch-up`: a projector of two processes that brings an empty registry up to a full log, in events/s.

300,000 files in 1,000 packages lie in six partitions before the clock starts. `artifact-store projector registry
--processes 2` reads, decodes, checks and writes them with its checkpoints. The clock runs from the first checkpoint
that is seen, behind which the events are counted, to the last: starting Python and joining the group are not measured.
The baseline (`benchmarks.copy_rows`) copies the same rows by one connection.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import asyncpg
import psutil
from confluent_kafka.admin import AdminClient

from benchmarks.copy_rows import copy_rate
from benchmarks.file_events import Amount, filled_topic
from benchmarks.harness import Plan
from benchmarks.views_database import connect, durability, fresh_views
from services.config import Settings
from services.log.kafka.settings import KafkaSettings

AMOUNT = Amount(packages=1_000, files=300)
PROCESSES = 2

_LOOK_SECONDS = 0.02
_STUCK_SECONDS = 120.0
_MIB = 1 << 20


class CatchUp:
    """The same rows by two ways; see the module."""

    def __init__(self, settings: Settings, amount: Amount, database: Mapping[str, str]) -> None:
        """`settings` with a log that holds `amount`; `database` is what PostgreSQL is set to."""
        self._settings = settings
        self._amount = amount
        self._database = database
        self._found: dict[str, Any] = {}

    async def ours(self) -> float:
        """Events a second while the projector catches up."""
        async with fresh_views(self._settings) as settings:
            connection = await connect(settings)
            try:
                with _projector(settings) as process:
                    rate = await self._watch(connection, process)
                assert await connection.fetchval("select count(*) from artifact_files") == self._amount.file_events
                assert await connection.fetchval("select count(*) from artifact_packages") == self._amount.packages
            finally:
                await connection.close()
        await asyncio.to_thread(_forget_group, KafkaSettings.of(settings))
        return rate

    async def _watch(self, connection: asyncpg.Connection, process: psutil.Process) -> float:
        start = time.perf_counter()
        at = await _folded(connection)
        while at == 0:
            await self._wait(process, start)
            at = await _folded(connection)
        assert at < self._amount.events, "there are too few events to measure"
        first, began, spent = at, time.perf_counter(), _cpu_seconds(process)
        resident: dict[int, int] = {}
        while at < self._amount.events:
            await self._wait(process, began)
            at = await _folded(connection)
            for child in process.children():
                resident[child.pid] = max(resident.get(child.pid, 0), child.memory_info().rss)
        ended = time.perf_counter()
        measured = self._amount.events - first
        self._found = {
            "seconds_from_start": round(ended - start, 2),
            "events_measured": measured,
            "python_cpu_micros_an_event": round((_cpu_seconds(process) - spent) / measured * 1e6, 1),
            "most_resident_mib": round(max(resident.values(), default=0) / _MIB),
        }
        return measured / (ended - began)

    async def _wait(self, process: psutil.Process, since: float) -> None:
        assert process.is_running(), "the projector ended"
        assert time.perf_counter() - since < _STUCK_SECONDS + self._amount.events / 1_000, "the projector is stuck"
        await asyncio.sleep(_LOOK_SECONDS)

    async def baseline(self) -> float:
        """Events a second of copying ready-made rows."""
        return await copy_rate(self._settings, self._amount)

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {
            "packages": self._amount.packages,
            "files_a_package": self._amount.files,
            "partitions": self._settings.kafka_partitions,
            "processes": PROCESSES,
            "postgresql": self._database,
            **self._found,
        }


@contextmanager
def _projector(settings: Settings) -> Iterator[psutil.Process]:
    """The projector, as people start it, for the length of the block."""
    command = [sys.executable, "-m", "services.cli", "projector", "registry", "--processes", str(PROCESSES)]
    with subprocess.Popen(command, env={**os.environ, **settings.environment()}) as process:
        try:
            yield psutil.Process(process.pid)
        finally:
            process.terminate()
    assert process.returncode == 0, f"the projector ended with {process.returncode}"


def _cpu_seconds(process: psutil.Process) -> float:
    return sum(sum(child.cpu_times()[:2]) for child in [process, *process.children()])


async def _folded(connection: asyncpg.Connection) -> int:
    """How many events the view holds: without transactions every offset is an event."""
    return int(await connection.fetchval("select coalesce(sum(next_offset), 0) from projection_checkpoints"))


def _forget_group(kafka: KafkaSettings) -> None:
    """Blocks."""
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap, "log_level": 3})
    for deleted in admin.delete_consumer_groups([kafka.projector_group("registry")]).values():
        deleted.result(30)


@asynccontextmanager
async def catching_up(settings: Settings, amount: Amount) -> AsyncIterator[CatchUp]:
    """The benchmark, on a log of this amount."""
    async with filled_topic(settings, amount) as filled:
        yield CatchUp(filled, amount, await durability(filled))


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[CatchUp]:
    async with catching_up(settings, AMOUNT) as benchmark:
        yield benchmark


PLAN = Plan("catch-up", "events/s", 0.6, _opened)
