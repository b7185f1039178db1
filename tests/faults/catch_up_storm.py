"""The stage for catching up while processes are killed, groups rebalance and the database restarts.

A projector of two processes folds a log of many packages with every projection. At random points of the registry's
progress a fault is caused. At the end each view must have the digest of one undisturbed fold; `usage`, which adds up,
would show an event that was applied twice.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import uuid4

import asyncpg
import psutil

from artifact_store.errors import ArtifactStoreError
from artifact_store.position import Position
from benchmarks.kafka_topics import SentRecord, bare_producer, send_transaction
from schemas.codec import encode
from services.config import Settings
from services.log.kafka import KafkaLog
from services.views.database import Views
from services.views.projections import PROJECTIONS
from tests.archives import view_digests
from tests.integration.processes import ProductProcess
from tests.integration.projector_stage import eventually, position_of
from tests.services.postgres import PostgresServer
from tests.services.process import becomes_true
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]
QUICK = {"session.timeout.ms": 1_500, "heartbeat.interval.ms": 300}
"""A process that is gone is noticed soon."""

_PATIENCE_SECONDS = 180.0
"""How long anything may take: on a busy machine a process needs half a minute to start."""

_PER_TRANSACTION = 200
_FILES = 25


@dataclass(frozen=True, slots=True)
class Storm:
    """How much is folded how often, and how many disturbances each catch-up sees."""

    catch_ups: int
    events: int
    disturbances: int


def write_history(log: KafkaLog, events: int) -> int:
    """Fill the log with a history of about this many events, in transactions. Returns their number. Blocks.

    Two of three packages are finalized; transaction markers leave holes in the offsets.
    """
    history = History(5).fill(packages=max(3, events // (2 * _FILES + 2)), files=_FILES).events
    waiting: dict[int, list[SentRecord]] = {}
    for event in history:
        record = SentRecord(str(event.package_id).encode(), encode(event), [], event.created_at // 1000)
        waiting.setdefault(log.partition_of(event.package_id), []).append(record)
    for partition, records in waiting.items():
        producer = bare_producer(log.kafka, partition)
        for start in range(0, len(records), _PER_TRANSACTION):
            send_transaction(producer, log.kafka.topic, partition, records[start : start + _PER_TRANSACTION])
    return len(history)


async def fresh_database(server: PostgresServer) -> str:
    """The URL of an empty database."""
    name = f"storm_{uuid4().hex[:12]}"
    connection = await asyncpg.connect(server.url().replace("+asyncpg", ""))
    await connection.execute(f"create database {name}")
    await connection.close()
    return server.url(name)


async def _shown(log: KafkaLog) -> bool:
    return not any([any((await log.lag(name)).values()) for name in PROJECTIONS])


class CatchUp:
    """One catch-up on an empty database."""

    def __init__(self, settings: Settings, folder: Path, server: PostgresServer, draw: random.Random) -> None:
        """`settings` with a log that is full and views that are empty, on `server`."""
        self.done: list[str] = []
        self._draw = draw
        self._server = server
        self._settings = settings
        self._folder = folder
        self._views = Views(settings.views_url)
        self._projector = self._process("projector", "--processes", "2")
        self._kinds: Sequence[Callable[[], None]] = (
            self._kill_a_child,
            self._kill_a_child,
            self._kill_the_parent,
            self._rebalance,
            self._restart_the_database,
            self._kill_the_database,
        )

    async def run(self, log: KafkaLog, disturbances: int) -> Mapping[str, str]:
        """Catch up through this many disturbances. Returns the digests of the views at the end."""
        await self._views.migrate()
        end = await log.end()
        moments = sorted(self._draw.random() for _ in range(disturbances))
        await asyncio.to_thread(self._projector.start)
        try:
            for moment in moments:
                come_so_far = partial(self._beyond, end, moment)
                await eventually(come_so_far, f"the fold comes to {moment:.0%}", _PATIENCE_SECONDS)
                await asyncio.to_thread(self._disturb)
            for name in PROJECTIONS:
                await eventually(partial(self._covers, name, end), f"{name} ends", _PATIENCE_SECONDS)
            await eventually(lambda: _shown(log), "no lag is left in Kafka's own tools", _PATIENCE_SECONDS)
        finally:
            await asyncio.to_thread(self._projector.stop)
        found = await view_digests(self._views)
        await self._views.close()
        return found

    def _process(self, *arguments: str) -> ProductProcess:
        return ProductProcess(self._settings, self._folder / uuid4().hex[:8], *arguments, listens=False)

    async def _beyond(self, end: Position, part: float) -> bool:
        at = await self._position("registry")
        folded = 0 if at is None else sum(at.offsets.values())
        return folded >= part * sum(end.offsets.values())

    async def _covers(self, name: str, end: Position) -> bool:
        at = await self._position(name)
        return at is not None and at.covers(end)

    async def _position(self, name: str) -> Position | None:
        try:
            return await position_of(self._views, PROJECTIONS[name])
        except ArtifactStoreError:
            return None  # the database is away for a moment

    def _disturb(self) -> None:
        kind = self._draw.choice(self._kinds)
        self.done.append(kind.__name__.strip("_"))
        kind()

    def _kill_a_child(self) -> None:
        children = psutil.Process(self._projector.pid).children()
        if children:  # there is none while the one that died is about to be started again
            self._draw.choice(children).kill()

    def _kill_the_parent(self) -> None:
        """The processes end by themselves then."""
        children = psutil.Process(self._projector.pid).children()
        os.kill(self._projector.pid, signal.SIGKILL)
        assert becomes_true(lambda: not any(child.is_running() for child in children), _PATIENCE_SECONDS), (
            "they outlive it"
        )
        self._projector.kill()
        self._projector.start()

    def _rebalance(self) -> None:
        """One more member comes and goes."""
        with self._process("projector") as another:
            log = another.log
            shared = becomes_true(lambda: "assigned partitions" in log.read_text(encoding="utf-8"), _PATIENCE_SECONDS)
            assert shared, "no share"

    def _restart_the_database(self) -> None:
        self._server.restart()

    def _kill_the_database(self) -> None:
        self._server.kill()
        self._server.start()
