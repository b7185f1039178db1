"""What of the events a client gets, and the producers, subjects and retention classes of packages that decide it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass
from uuid import UUID

from artifact_store.events import AdministrativePayload, PackageCreated, RecordedEvent
from services.core.access import EVERYWHERE, Scope
from services.views.queries import Origin

REMEMBERED = 20_000
"""Packages whose origins are remembered."""


@dataclass(frozen=True, slots=True)
class EventFilter:
    """The events that a client asks for and may see. An empty set of names stands for all of them."""

    package_id: UUID | None = None
    scope: Scope = EVERYWHERE
    """The packages that the client may read."""
    producers: frozenset[str] = frozenset()
    subjects: frozenset[str] = frozenset()
    retention_classes: frozenset[str] = frozenset()
    types: frozenset[str] = frozenset()

    @property
    def needs_origins(self) -> bool:
        """Whether packages are told apart by their origins."""
        return bool(self.producers or self.subjects or self.retention_classes) or not self.scope.everywhere

    def takes(self, package_id: UUID, event_type: str) -> bool:
        """Whether it takes events of this type and package, as far as that can be told without the origin."""
        return self.package_id in (None, package_id) and (not self.types or event_type in self.types)

    def includes(self, origin: Origin) -> bool:
        """Whether it takes events of packages of this origin."""
        return (
            (not self.producers or origin.producer in self.producers)
            and (not self.subjects or origin.subject in self.subjects)
            and (not self.retention_classes or origin.retention_class in self.retention_classes)
            and self.scope.includes(origin.producer, origin.subject)
        )


FindOrigins = Callable[[Set[UUID]], Awaitable[Mapping[UUID, Origin]]]
"""Finds the origins of packages. Packages of which the log holds no creation are absent."""


class Origins:
    """Origins of packages, by which events are filtered. They never change, and so are remembered.

    Belongs to one event loop.
    """

    def __init__(self, find: FindOrigins | None = None) -> None:
        self._find = find
        self._known: dict[UUID, Origin | None] = {}

    def note(self, event: RecordedEvent) -> None:
        """Learn what the event tells."""
        payload = event.payload
        if isinstance(payload, PackageCreated):
            self._remember({event.package_id: Origin.of(payload)})
        elif isinstance(payload, AdministrativePayload):
            self._remember({event.package_id: None})  # a partition's: it belongs to no producer

    async def hidden(self, package_ids: Set[UUID], wanted: EventFilter) -> Set[UUID]:
        """Those of these packages that the filter leaves out, or whose origin nobody knows. Raises UnavailableError."""
        if not wanted.needs_origins:
            return frozenset()
        asked = package_ids - self._known.keys()
        if asked:
            found: Mapping[UUID, Origin] = {} if self._find is None else await self._find(asked)
            self._remember({package_id: found.get(package_id) for package_id in asked})
        origins = {package_id: self._known.get(package_id) for package_id in package_ids}
        return {id_ for id_, origin in origins.items() if origin is None or not wanted.includes(origin)}

    def _remember(self, origins: Mapping[UUID, Origin | None]) -> None:
        self._known.update(origins)
        while len(self._known) > max(REMEMBERED, len(origins)):
            del self._known[next(iter(self._known))]
