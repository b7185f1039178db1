"""Keys or places in which other bytes were found than belong there."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

_REMEMBERED = 1_024

Where = TypeVar("Where")


class Mistrusted(Generic[Where]):
    """The latest that were found so, of one store and in one process."""

    def __init__(self) -> None:
        self._found: OrderedDict[Where, None] = OrderedDict()

    def __contains__(self, where: Where) -> bool:
        return where in self._found

    def add(self, where: Where) -> None:
        """What lies there is not to be taken for what belongs there."""
        self._found[where] = None
        if len(self._found) > _REMEMBERED:
            self._found.popitem(last=False)

    def discard(self, where: Where) -> None:
        """The right bytes were stored there."""
        self._found.pop(where, None)
