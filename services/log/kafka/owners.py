"""Who owns which partition, as the group of writers says; remembered for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass

from services.log.kafka.group import WriterGroup
from services.log.kafka.log import KafkaLog

_FRESH_SECONDS = 1.0
_UNSETTLED_SECONDS = 0.1


@dataclass(frozen=True, slots=True)
class Owner:
    """A member of the group. `url` is None when it cannot be reached by others."""

    url: str | None
    is_self: bool


class Owners:
    """Asks the group once for all who want to know at the same time."""

    def __init__(self, log: KafkaLog, group: WriterGroup) -> None:
        self._log = log
        self._group = group
        self._asking = asyncio.Lock()
        self._known: dict[int, Owner] = {}
        self._until = 0.0

    async def all(self) -> Mapping[int, Owner]:
        """Owner by partition, without those that nobody owns. Raises UnavailableError."""
        async with self._asking:
            if time.monotonic() >= self._until:
                members = await self._log.blocking(self._group.members)
                # Between two assignments most partitions stay where they were.
                fresh = _FRESH_SECONDS if members is not None else _UNSETTLED_SECONDS
                if members is not None:
                    self._known = {
                        p: Owner(m.client_id if m.client_id.startswith("http") else None, self._group.is_self(m))
                        for m in members
                        for p in m.partitions
                    }
                self._until = time.monotonic() + fresh
            return self._known

    def forget(self) -> None:
        """What is remembered has proved wrong."""
        self._until = 0.0
