"""`catch-up`: a projector of two processes that brings an empty registry up to a full log, in events/s.

`artifact-store projector registry --processes 2` reads, decodes, checks and writes the events of `benchmarks.full_log`
with its checkpoints. The clock runs from the first checkpoint that is seen, behind which the events are counted, to the
last: starting Python and joining the group are not measured.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import asyncpg
import psutil
from confluent_kafka.admin import AdminClient

from benchmarks.full_log import FullLog, plan
from services.config import Settings
from services.log.kafka.connection import KafkaSettings

PROCESSES = 2

_LOOK_SECONDS = 0.02
_STUCK_SECONDS = 120.0
_MIB = 1 << 20


class CatchUp(FullLog):
    """By a projector; see the module."""

    async def ours(self) -> float:
        """As the base, with a separate group that is deleted at the end."""
        rate = await super().ours()
        await asyncio.to_thread(_forget_group, KafkaSettings.of(self._settings))
        return rate

    def details(self) -> Mapping[str, Any]:
        """With the number of processes."""
        return {**super().details(), "processes": PROCESSES}

    async def _fold(self, settings: Settings, connection: asyncpg.Connection) -> float:
        with _projector(settings) as process:
            return await self._watch(connection, process)

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


PLAN = plan("catch-up", 0.8, CatchUp)
