"""Producers and subjects of packages, by which events are filtered for those who may not see all of them."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Set
from uuid import UUID

from artifact_store.events import AdministrativePayload, PackageCreated, RecordedEvent
from services.core.access import Scope

REMEMBERED = 20_000
"""Packages whose producers and subjects are remembered."""

Origin = tuple[str, str]
FindOrigins = Callable[[Set[UUID]], Awaitable[Mapping[UUID, Origin]]]
"""Finds producers and subjects of packages. Packages of which the log holds no creation are absent."""


class Origins:
    """Producers and subjects of packages, by which events are filtered. They never change, and so are remembered.

    Belongs to one event loop.
    """

    def __init__(self, find: FindOrigins | None = None) -> None:
        self._find = find
        self._known: dict[UUID, Origin | None] = {}

    def note(self, event: RecordedEvent) -> None:
        """Learn what the event tells."""
        payload = event.payload
        if isinstance(payload, PackageCreated):
            self._remember({event.package_id: (payload.producer, payload.subject)})
        elif isinstance(payload, AdministrativePayload):
            self._remember({event.package_id: None})  # a partition's: it belongs to no producer

    async def hidden(self, package_ids: Set[UUID], scope: Scope) -> Set[UUID]:
        """Those of these packages that are outside the scope, or whose origin nobody knows. Raises UnavailableError."""
        if scope.everywhere:
            return frozenset()
        asked = package_ids - self._known.keys()
        if asked:
            found: Mapping[UUID, Origin] = {} if self._find is None else await self._find(asked)
            self._remember({package_id: found.get(package_id) for package_id in asked})
        origins = {package_id: self._known.get(package_id) for package_id in package_ids}
        return {id_ for id_, origin in origins.items() if origin is None or not scope.includes(*origin)}

    def _remember(self, origins: Mapping[UUID, Origin | None]) -> None:
        self._known.update(origins)
        while len(self._known) > max(REMEMBERED, len(origins)):
            del self._known[next(iter(self._known))]
