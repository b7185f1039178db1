"""What one client wrote: the last sequence of each package, so that its reads wait until the view has it."""

from __future__ import annotations

from collections import OrderedDict
from uuid import UUID

REMEMBERED_PACKAGES = 10_000


class Written:
    """The last sequences written, of the packages written to most recently; older ones are forgotten."""

    def __init__(self, remembered: int = REMEMBERED_PACKAGES) -> None:
        self._remembered = remembered
        self._last: OrderedDict[UUID, int] = OrderedDict()
        self._unseen: OrderedDict[UUID, int] = OrderedDict()

    def wrote(self, package_id: UUID, sequence: int) -> None:
        """The package has an event of this number."""
        newest = max(sequence, self._last.pop(package_id, 0))
        self._last[package_id] = newest
        self._unseen[package_id] = newest
        if len(self._last) > self._remembered:
            forgotten, _ = self._last.popitem(last=False)
            self._unseen.pop(forgotten, None)

    def last(self, package_id: UUID) -> int:
        """The number of the last event written to the package, 0 when none is remembered."""
        return self._last.get(package_id, 0)

    def seen(self, package_id: UUID, sequence: int) -> None:
        """A view that holds the package up to `sequence` has answered."""
        if sequence >= self._unseen.get(package_id, 0):
            self._unseen.pop(package_id, None)

    def unseen(self) -> tuple[UUID, ...]:
        """The packages whose last event no view has shown yet."""
        return tuple(self._unseen)
