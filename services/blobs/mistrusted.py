"""Keys under which other bytes were found than belong there, until they are stored anew."""

from __future__ import annotations

from collections import OrderedDict

_REMEMBERED = 1_024


class Mistrusted:
    """The latest such keys of one store, in one process."""

    def __init__(self) -> None:
        self._keys: OrderedDict[str, None] = OrderedDict()

    def __contains__(self, key: object) -> bool:
        return key in self._keys

    def add(self, key: str) -> None:
        """What lies there is not to be taken for what belongs there."""
        self._keys[key] = None
        if len(self._keys) > _REMEMBERED:
            self._keys.popitem(last=False)

    def discard(self, key: str) -> None:
        """The right bytes were stored there."""
        self._keys.pop(key, None)
