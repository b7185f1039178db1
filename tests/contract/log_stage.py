"""Shared by the tests of logs: the parts on one log, a caller that retries correctly, a projection that reads."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, TypeVar
from uuid import UUID

from artifact_store.errors import PushBackError, UnavailableError
from artifact_store.events import Event, RecordedEvent
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core.decide import Command, IngestCheck
from services.log.port import CommandWriter, Log, PutManifest, Record, Settled, Subscription
from services.runtime.clock import Clock, system_clock
from services.wiring import open_log, open_writer
from tests.commands import create, finalize, ingest

_T = TypeVar("_T")

Done = list[tuple[Command, Acknowledgement]]
"""Commands and their answers."""

PATIENCE_SECONDS = 60.0
"""How long anything may take before a test takes it for lost."""


async def no_manifest(manifest: bytes) -> None:
    """For tests whose manifests are small."""
    raise AssertionError(f"a manifest of {len(manifest):,} bytes travels as a claim check")


@dataclass
class Stage:
    """One log, made by `migrate`, and the way to open writers on it."""

    settings: Settings
    log: Log

    def writer(
        self, *, put_manifest: PutManifest = no_manifest, clock: Clock = system_clock, **settings: Any
    ) -> AbstractAsyncContextManager[CommandWriter]:
        """A separate writer, started and closed by the context; `settings` are changed for it alone."""
        changed = replace(self.settings, **settings)
        return open_writer(changed, self.log, put_manifest, clock=clock)

    @asynccontextmanager
    async def reopened(self) -> AsyncIterator[Log]:
        """The same log, read through a separate reader."""
        log = open_log(self.settings)
        try:
            yield log
        finally:
            await log.close()


@asynccontextmanager
async def staged(settings: Settings) -> AsyncIterator[Stage]:
    """A new log of these settings."""
    log = open_log(settings)
    try:
        await log.migrate()
        yield Stage(settings, log)
    finally:
        await log.close()


async def settled(writer: CommandWriter, command: Command) -> Acknowledgement:
    """Submit as a good client does: when the outcome is unknown, again with the same command id."""
    return await _retried(lambda: writer.submit(command))


async def checked(writer: CommandWriter, package_id: UUID, *paths: str, command_id: UUID | None = None) -> str | None:
    """Ask whether the paths could be ingested, as a good client does; the package's retention class."""
    return await _retried(lambda: writer.check_ingest(IngestCheck(package_id, paths, command_id)))


async def ready(writer: CommandWriter) -> None:
    """Wait until the writer can write to every partition."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while await writer.ready() is not None:  # noqa: ASYNC110 - the port gives the state, not an event
            await asyncio.sleep(0.05)


async def _retried(ask: Callable[[], Awaitable[_T]]) -> _T:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await ask()
            except (PushBackError, UnavailableError) as error:
                await asyncio.sleep(error.retry_after / 10)


async def first(events: AsyncIterator[RecordedEvent], count: int) -> list[RecordedEvent]:
    """The first events of an iterator that never ends, which is closed then."""
    found: list[RecordedEvent] = []
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            while len(found) < count:
                found.append(await anext(events))
    finally:
        await events.aclose()  # type: ignore[attr-defined] # both adapters' iterators are generators
    return found


def by_package(events: Sequence[Event]) -> dict[UUID, list[int]]:
    """The sequences of every package in the order in which they were read: what the log promises an order for."""
    found: dict[UUID, list[int]] = {}
    for event in events:
        found.setdefault(event.package_id, []).append(event.sequence)
    return found


@dataclass
class Projection:
    """A projection that keeps its offsets in memory, as a real one keeps them in its view."""

    log: Log
    name: str = "registry"
    offsets: dict[int, int] = field(default_factory=dict)
    records: list[Record] = field(default_factory=list)
    asked: list[Sequence[int]] = field(default_factory=list)

    async def subscribe(self, settled: Settled | None = None) -> Subscription:
        """Join, to go on from what this projection has."""
        return await self.log.subscribe(self.name, self._start, settled)

    async def catch_up(self, subscription: Subscription) -> None:
        """Poll until the end, as it is now, is reached."""
        end = (await self.log.end()).offsets
        await self.poll_until(subscription, lambda: all(self.offsets.get(p, 0) >= offset for p, offset in end.items()))

    async def poll_until(self, subscription: Subscription, reached: Callable[[], bool]) -> None:
        """Poll until something is so; TimeoutError when it takes too long."""
        async with asyncio.timeout(PATIENCE_SECONDS):
            while not reached():
                await self.poll(subscription)

    async def poll(self, subscription: Subscription) -> None:
        """Take one batch."""
        batch = await subscription.poll(7, 0.2)
        self.records += batch.records
        self.offsets.update(batch.next_offsets)

    async def _start(self, partitions: Sequence[int]) -> Mapping[int, int]:
        self.asked.append(partitions)
        return {partition: self.offsets.get(partition, 0) for partition in partitions}


async def fill(stage: Stage, packages: int = 3, files: int = 3) -> Done:
    """Some packages of five events each: created, a file, the other files together, finalized."""

    async def one(number: int) -> Done:
        made = create(f"p{number}")
        others = [f"{n}.txt" for n in range(1, files)]
        commands: list[Command] = [
            made,
            ingest(made.package_id, "0.txt", name="one"),
            ingest(made.package_id, *others, name="others"),
            finalize(made.package_id),
        ]
        return [(command, await settled(writer, command)) for command in commands]

    async with stage.writer() as writer:
        return list(chain.from_iterable(await asyncio.gather(*(one(number) for number in range(packages)))))
