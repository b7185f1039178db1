"""A full log from which a registry is rebuilt: what `catch-up` and `rebuild` share, including their baseline.

300,000 files in 1,000 packages lie in six partitions before the clock starts. The baseline (`benchmarks.copy_rows`)
copies the same rows, made beforehand, by one connection into the same indexed tables.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any, Self

import asyncpg

from benchmarks.copy_rows import copy_rate
from benchmarks.file_events import Amount, filled_topic
from benchmarks.harness import Plan
from benchmarks.views_database import connect, durability, fresh_views
from services.config import Settings

AMOUNT = Amount(packages=1_000, files=300)


class FullLog(ABC):
    """The same rows by two ways."""

    def __init__(self, settings: Settings, amount: Amount, database: Mapping[str, str]) -> None:
        """`settings` with a log that holds `amount`; `database` is what PostgreSQL is set to."""
        self._settings = settings
        self._amount = amount
        self._database = database
        self._found: dict[str, Any] = {}

    @classmethod
    @asynccontextmanager
    async def holding(cls, settings: Settings, amount: Amount) -> AsyncIterator[Self]:
        """The benchmark, on a log of this amount."""
        async with filled_topic(settings, amount) as filled:
            yield cls(filled, amount, await durability(filled))

    async def ours(self) -> float:
        """Events a second, into empty views; every row must be there afterwards."""
        async with fresh_views(self._settings) as settings:
            connection = await connect(settings)
            try:
                rate = await self._fold(settings, connection)
                assert await connection.fetchval("select count(*) from artifact_files") == self._amount.file_events
                assert await connection.fetchval("select count(*) from artifact_packages") == self._amount.packages
            finally:
                await connection.close()
        return rate

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

    @abstractmethod
    async def _fold(self, settings: Settings, connection: asyncpg.Connection) -> float:
        """Make the tables by our way; events a second. The connection is one to the views."""


def plan(name: str, target: float, way: type[FullLog]) -> Plan:
    """The benchmark of this way."""
    return Plan(name, "events/s", target, lambda settings: way.holding(settings, AMOUNT))
