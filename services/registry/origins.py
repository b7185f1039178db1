"""Filtering events by the origins of their packages, and ordering them by time."""

from __future__ import annotations

import heapq
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Set
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass, replace
from uuid import UUID

from artifact_store.errors import InvalidRequestError, UnavailableError
from artifact_store.events import AdministrativePayload, PackageCreated, RecordedEvent
from artifact_store.models import EventFilter
from artifact_store.position import Position
from artifact_store.registry import NOW, Since, Start, start_of
from services.core.access import EVERYWHERE, Scope
from services.log.port import Log, PackageExtent
from services.views.queries import Origin, Queries

REMEMBERED = 20_000
"""How many packages' origins are remembered."""

MOST_BY_TIME = 64
"""The most partitions from which events are read in order of time: each one needs a reader."""


@dataclass(frozen=True, slots=True)
class ScopedFilter(EventFilter):
    """A filter for events that also leaves out packages that the client may not read."""

    scope: Scope = EVERYWHERE

    @property
    def needs_origins(self) -> bool:
        """See `EventFilter`."""
        return not self.scope.everywhere or super(ScopedFilter, self).needs_origins

    def includes(self, producer: str, subject: str, retention_class: str) -> bool:
        """See `EventFilter`."""
        asked = super(ScopedFilter, self).includes(producer, subject, retention_class)
        return asked and self.scope.includes(producer, subject)


ExtentOf = Callable[[UUID], Awaitable[PackageExtent | None]]
"""Finds where a package's events lie; None if that is not known."""


async def find_origins(
    package_ids: Set[UUID], queries: Queries | None, log: Log, extent: ExtentOf | None = None
) -> Mapping[UUID, Origin]:
    """The origins of these packages, from the view if it has them, else from the log.

    A package whose creation is not in the log is absent. Raises UnavailableError, CorruptError.
    """
    found: dict[UUID, Origin] = {}
    with suppress(UnavailableError):
        found = {} if queries is None else await queries.origins(package_ids)
    for package_id in package_ids - found.keys():
        known = None if extent is None else await extent(package_id)
        async with aclosing(log.read(package_id=package_id, extent=known)) as events:
            async for event in events:
                if isinstance(event.payload, PackageCreated):
                    found[package_id] = Origin.of(event.payload)
                break
    return found


FindOrigins = Callable[[Set[UUID]], Awaitable[Mapping[UUID, Origin]]]
"""Finds the origins of packages. Packages whose creation is not in the log are absent."""


class Origins:
    """Origins of packages, by which events are filtered. They never change, so they are remembered.

    Belongs to one event loop.
    """

    def __init__(self, find: FindOrigins | None = None) -> None:
        self._find = find
        self._known: dict[UUID, Origin | None] = {}

    def note(self, event: RecordedEvent) -> None:
        """Remember the origin of the event's package, if the event contains it."""
        payload = event.payload
        if isinstance(payload, PackageCreated):
            self._remember({event.package_id: Origin.of(payload)})
        elif isinstance(payload, AdministrativePayload):
            self._remember({event.package_id: None})  # the event of a partition, which belongs to no producer

    async def shows(self, event: RecordedEvent, wanted: EventFilter) -> bool:
        """Whether the filter lets the event through. Also does what `note` does. Raises UnavailableError."""
        self.note(event)
        takes = wanted.takes(event.package_id, event.event_type)
        return takes and not await self.hidden({event.package_id}, wanted)

    async def hidden(self, package_ids: Set[UUID], wanted: EventFilter) -> Set[UUID]:
        """The packages among these that the filter leaves out, or whose origin is unknown. Raises UnavailableError."""
        if not wanted.needs_origins:
            return frozenset()
        origins = await self._of(package_ids)
        return {id_ for id_, origin in origins.items() if origin is None or not wanted.includes(*origin)}

    async def of(self, package_id: UUID) -> Origin | None:
        """The package's origin, or None if it is unknown. Raises UnavailableError."""
        return (await self._of({package_id}))[package_id]

    async def _of(self, package_ids: Set[UUID]) -> Mapping[UUID, Origin | None]:
        asked = package_ids - self._known.keys()
        if asked:
            found: Mapping[UUID, Origin] = {} if self._find is None else await self._find(asked)
            self._remember({package_id: found.get(package_id) for package_id in asked})
        return {package_id: self._known.get(package_id) for package_id in package_ids}

    def _remember(self, origins: Mapping[UUID, Origin | None]) -> None:
        self._known.update(origins)
        while len(self._known) > max(REMEMBERED, len(origins)):
            del self._known[next(iter(self._known))]


async def in_order_of_time(log: Log, since: Position | None, until: Position) -> AsyncGenerator[RecordedEvent]:
    """Events after `since` up to `until`, sorted by `created_at` and then by partition.

    Within a partition they are already in this order. Each partition has a separate reader until the end. Raises as
    `Log.read`; InvalidRequestError if there are too many partitions.
    """
    offsets = {} if since is None else dict(since.offsets)
    if since is not None:
        since.require_within(until)
    behind = [p for p, end in until.offsets.items() if offsets.get(p, 0) < end]
    if len(behind) > MOST_BY_TIME:
        raise InvalidRequestError(
            f"events of at most {MOST_BY_TIME} partitions can be read by time, and these lie in {len(behind)}: "
            "read them in the log's order, and sort them by created_at"
        )
    async with AsyncExitStack() as readers:
        waiting: list[tuple[int, int, RecordedEvent, AsyncGenerator[RecordedEvent]]] = []

        async def wait_for_next(partition: int, events: AsyncGenerator[RecordedEvent]) -> None:
            event = await anext(events, None)
            if event is not None:
                heapq.heappush(waiting, (event.created_at, partition, event, events))

        for p in behind:
            alone = Position(until.log, {**until.offsets, p: offsets.get(p, 0)})
            events = log.read(alone, until=until)
            await wait_for_next(p, await readers.enter_async_context(aclosing(events)))
        while waiting:
            _, partition, event, events = heapq.heappop(waiting)
            offsets[partition] = event.position.offsets[partition]
            yield replace(event, position=Position(until.log, dict(offsets)))
            await wait_for_next(partition, events)


class LogEvents:
    """`Registry.read_events` on a log alone, for a caller that may read all of it. Belongs to one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._origins = Origins(lambda package_ids: find_origins(package_ids, None, log))

    async def read_events(
        self, since: Since = None, *, where: EventFilter | None = None, follow: bool = False
    ) -> AsyncGenerator[RecordedEvent]:
        """See `Registry.read_events`."""
        wanted = where or EventFilter()
        position = await position_of(self._log, start_of(since))
        async with aclosing(self._log.read(position, package_id=wanted.package_id, follow=follow)) as events:
            async for event in events:
                if await self._origins.shows(event, wanted):
                    yield event


async def position_of(log: Log, start: Start) -> Position | None:
    """The position after which reading begins for `start`; None for the log's start. Raises UnavailableError."""
    if start == NOW:
        return await log.end()
    return await log.at_time(start) if isinstance(start, int) else start
