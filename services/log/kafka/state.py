"""The state of one partition, as its writer holds it: every package, folded from the log up to an offset.

Kept in memory and never trusted beyond one take-over: when a transaction's outcome is in doubt it is thrown away and
folded again. The writer asks for one package at a time, so that packages that are finalized may lie elsewhere.
"""

from __future__ import annotations

from uuid import UUID

from schemas.events import Event
from services.core.evolve import evolve
from services.core.state import PackageState


class PartitionState:
    """Packages by id, and the time of the partition's last event (µs since 1970)."""

    def __init__(self) -> None:
        self._packages: dict[UUID, PackageState] = {}
        self.last_created_at = 0

    def package(self, package_id: UUID) -> PackageState | None:
        """The package, None when the partition has no event of it."""
        return self._packages.get(package_id)

    def apply(self, event: Event) -> None:
        """Fold one more event in. Raises CorruptError when it cannot follow."""
        self._packages[event.package_id] = evolve(self._packages.get(event.package_id), event)
        self.last_created_at = max(self.last_created_at, event.created_at)
