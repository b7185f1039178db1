"""`rebuild`: a replay that builds the registry anew from a full log, in events/s.

The log is that of `catch-up`: 300,000 files in 1,000 packages, in six partitions. `replay` loads them in a process a
core into tables without indexes, builds the indexes, catches up and switches. The clock runs from its first batch,
behind which the events are counted, to the switch; its digest is not measured, nor is starting Python. The baseline
(`benchmarks.copy_rows`) copies the same rows by one connection into the indexed tables.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from itertools import pairwise
from typing import Any

from benchmarks.catch_up import AMOUNT
from benchmarks.copy_rows import copy_rate
from benchmarks.file_events import Amount, filled_topic
from benchmarks.harness import Plan
from benchmarks.views_database import connect, durability, fresh_views
from projector import replay
from projector.progress import ReplayProgress
from services.config import Settings


class Rebuild:
    """The same rows by two ways; see the module."""

    def __init__(self, settings: Settings, amount: Amount, database: Mapping[str, str]) -> None:
        """`settings` with a log that holds `amount`; `database` is what PostgreSQL is set to."""
        self._settings = settings
        self._amount = amount
        self._database = database
        self._found: dict[str, Any] = {}

    async def ours(self) -> float:
        """Events a second of a rebuild."""
        watch = _Watch()
        async with fresh_views(self._settings) as settings:
            done = await replay(settings, "registry", progress=watch.see)
            assert done.events == self._amount.events
            connection = await connect(settings)
            try:
                assert await connection.fetchval("select count(*) from artifact_files") == self._amount.file_events
                assert await connection.fetchval("select count(*) from artifact_packages") == self._amount.packages
            finally:
                await connection.close()
        self._found = {"seconds": round(done.seconds, 2), "seconds_by_phase": watch.seconds()}
        return (self._amount.events - watch.first) / watch.measured()

    async def baseline(self) -> float:
        """Events a second of copying ready-made rows."""
        return await copy_rate(self._settings, self._amount)

    def details(self) -> Mapping[str, Any]:
        """How much work it was, and what our last run took."""
        return {
            "packages": self._amount.packages,
            "files_a_package": self._amount.files,
            "partitions": self._settings.kafka_partitions,
            "postgresql": self._database,
            **self._found,
        }


class _Watch:
    """Notes when the phases of a replay begin, and its first batch."""

    def __init__(self) -> None:
        self.first = 0
        self._began: float | None = None
        self._phases: dict[str, float] = {}

    def see(self, seen: ReplayProgress) -> None:
        now = time.perf_counter()
        self._phases.setdefault(seen.phase, now)
        if self._began is None and seen.events:
            self.first, self._began = seen.events, now

    def measured(self) -> float:
        """Seconds from the first batch to the switch, which the digest follows."""
        assert self._began is not None, "nothing was folded"
        return self._phases["digest"] - self._began

    def seconds(self) -> Mapping[str, float]:
        """How long each phase took."""
        return {name: round(end - begin, 2) for (name, begin), (_, end) in pairwise(self._phases.items())}


@asynccontextmanager
async def rebuilding(settings: Settings, amount: Amount) -> AsyncIterator[Rebuild]:
    """The benchmark, on a log of this amount."""
    async with filled_topic(settings, amount) as filled:
        yield Rebuild(filled, amount, await durability(filled))


@asynccontextmanager
async def _opened(settings: Settings) -> AsyncIterator[Rebuild]:
    async with rebuilding(settings, AMOUNT) as benchmark:
        yield benchmark


PLAN = Plan("rebuild", "events/s", 0.9, _opened)
