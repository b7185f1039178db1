"""Waiting until the registry view has come far enough. One task polls the database for all waiters.

The poll gives the view's position, and the log gives its end at the time when a waiter arrived. Once the view covers
that end, an event that it lacks is not in the log, and waiting for it ends.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from artifact_store.errors import (
    ArtifactStoreError,
    CorruptError,
    PackageNotFoundError,
    PackageParkedError,
    PushBackError,
    SequenceBeyondLogError,
    UnavailableError,
    WaitTimeoutError,
)
from artifact_store.models import Parked
from artifact_store.position import Position
from services.core.access import EVERYWHERE, Scope
from services.log.port import CommandWriter, Log
from services.views.queries import Progress, Queries

LOOK_SECONDS = 0.025
"""The pause between two polls of the database, in one process, while anybody waits (s)."""


@dataclass(eq=False, slots=True)
class _Waiter:
    """Waits for the package's event with this sequence; without one, for what the log held when the wait began."""

    package_id: UUID | None
    sequence: int | None
    done: asyncio.Future[None]
    end: Position | None = None
    scope: Scope = EVERYWHERE
    """A package outside the scope does not exist for this waiter."""


class ViewWaits:
    """All waits for the registry view in this process. Belongs to one event loop."""

    def __init__(self, queries: Queries, log: Log, writer: CommandWriter, wait_seconds: float) -> None:
        """A wait lasts at most `wait_seconds`. `writer` is asked for the log's end."""
        self._queries = queries
        self._log = log
        self._writer = writer
        self._wait_seconds = wait_seconds
        self._waiters: set[_Waiter] = set()
        self._looking: asyncio.Task[None] | None = None

    async def for_sequence(self, package_id: UUID, sequence: int, scope: Scope = EVERYWHERE) -> None:
        """Return when the view has the package's event with this sequence. A package outside the scope does not exist.

        Raises:
            PackageNotFoundError, SequenceBeyondLogError: the log does not have that event.
            PackageParkedError: the view has stopped following the package.
            WaitTimeoutError: the view lags behind. UnavailableError: the database cannot be reached.
        """
        otherwise = f"the registry view did not reach event {sequence} of package {package_id}"
        await self._wait(package_id, sequence, otherwise, scope)

    async def for_end(self, package_id: UUID | None) -> None:
        """Return when the view holds what the log holds now, in the package's partition or in all.

        Raises WaitTimeoutError: the view lags behind. UnavailableError: database or log cannot be reached.
        """
        await self._wait(package_id, None, "the registry view did not reach the end of the log", EVERYWHERE)

    async def _wait(self, package_id: UUID | None, sequence: int | None, otherwise: str, scope: Scope) -> None:
        waiter = _Waiter(package_id, sequence, asyncio.get_running_loop().create_future(), scope=scope)
        self._waiters.add(waiter)
        if self._looking is None:
            self._looking = asyncio.create_task(self._look(), name="view-waits")
        try:
            async with asyncio.timeout(self._wait_seconds):
                await waiter.done
        except TimeoutError:
            raise WaitTimeoutError(f"{otherwise} within {self._wait_seconds:g} s") from None
        finally:
            self._waiters.discard(waiter)
            if waiter.done.done() and not waiter.done.cancelled():
                waiter.done.exception()  # retrieve it: a waiter that was cancelled meanwhile does not

    async def close(self) -> None:
        """Stop polling. There must be no waits any more."""
        if self._looking is not None:
            self._looking.cancel()
            await asyncio.wait([self._looking])

    async def _look(self) -> None:
        """Poll the view for as long as anybody waits, and ask for the log's end concurrently.

        At most one request for a partition's end runs at a time, and one for the ends of all. Its answer counts for
        all waits that began before it.
        """
        asking: dict[int | None, asyncio.Task[None]] = {}
        try:
            while self._waiters:
                waiters = list(self._waiters)
                try:
                    progress = await self._queries.progress({w.package_id for w in waiters if w.package_id is not None})
                except Exception as error:  # noqa: BLE001 - the waiters raise it
                    _fail(waiters, error)
                else:
                    for waiter in waiters:
                        self._tell(waiter, progress)
                    asking = {partition: task for partition, task in asking.items() if not task.done()}
                    for partition, new in self._without_end().items():
                        if partition not in asking:
                            asking[partition] = asyncio.create_task(self._ask_end(partition, new))
                await asyncio.sleep(LOOK_SECONDS)
        finally:
            self._looking = None
            for task in asking.values():
                task.cancel()
            if asking:
                await asyncio.wait(asking.values())

    def _without_end(self) -> dict[int | None, list[_Waiter]]:
        """The waiters for which the log's end was not read yet, by the partition that they wait for (None: all)."""
        found: dict[int | None, list[_Waiter]] = {}
        for waiter in self._waiters:
            if waiter.end is None:
                partition = None if waiter.package_id is None else self._log.partition_of(waiter.package_id)
                found.setdefault(partition, []).append(waiter)
        return found

    async def _ask_end(self, partition: int | None, waiters: Sequence[_Waiter]) -> None:
        try:
            end = await self._writer.end(range(await self._log.partitions()) if partition is None else [partition])
        except (UnavailableError, PushBackError, CorruptError) as error:
            _fail([waiter for waiter in waiters if waiter.sequence is None], error)  # the others need only the view
            return
        except Exception as error:  # noqa: BLE001 - the waiters raise it
            _fail(waiters, error)
            return
        for waiter in waiters:
            waiter.end = end

    def _tell(self, waiter: _Waiter, progress: Progress) -> None:
        if waiter.done.done():
            return
        # The position of a view of another log says nothing about this log.
        end, at = waiter.end, progress.position
        covered = end is not None and at is not None and at.log == end.log and at.covers(end)
        if waiter.package_id is None or waiter.sequence is None:
            if covered:
                waiter.done.set_result(None)
            return
        origin = progress.origins.get(waiter.package_id)
        visible = waiter.scope.everywhere or (
            origin is not None and waiter.scope.includes(origin.producer, origin.subject)
        )
        last = progress.last_sequences.get(waiter.package_id) if visible else None
        if last is not None and last >= waiter.sequence:
            waiter.done.set_result(None)
        elif visible and waiter.package_id in progress.parked:
            waiter.done.set_exception(parked_error(waiter.package_id, progress.parked[waiter.package_id]))
        elif covered:
            waiter.done.set_exception(beyond_log(waiter.package_id, last, waiter.sequence))


def beyond_log(package_id: UUID, last: int | None, sequence: int) -> ArtifactStoreError:
    """The error for a sequence that is not in the log; `last` is the package's last sequence, None without events."""
    if last is None:
        return PackageNotFoundError(f"there is no package {package_id}")
    return SequenceBeyondLogError(
        f"package {package_id} has no event {sequence}: the last one in the log is {last}. Wait for the `sequence` "
        "in the response to a write"
    )


def parked_error(package_id: UUID, parked: Parked) -> PackageParkedError:
    """The error for a package that the view has stopped following and may not show completely."""
    return PackageParkedError(
        f"the registry view stopped following package {package_id} at offset {parked.offset} of partition "
        f"{parked.partition}; {parked.events} of its events are not shown: {parked.cause}"
    )


def _fail(waiters: Sequence[_Waiter], error: Exception) -> None:
    for waiter in waiters:
        if not waiter.done.done():
            waiter.done.set_exception(error)
