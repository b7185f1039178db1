"""How fast a replay may be: so many events a second at most, so that a database has time for others."""

from __future__ import annotations

import asyncio
import time

BATCH_EVENTS = 10_000
_TURNS_A_SECOND = 10
"""A rate is kept in small steps: a large batch every few seconds would be felt in between."""


class Pace:
    """Shared by all who fold for one replay."""

    def __init__(self, max_rate: float | None = None) -> None:
        """`max_rate` in events a second; None is as fast as it goes."""
        self.max_rate = max_rate
        self._free_at = 0.0

    @property
    def batch_events(self) -> int:
        """How many events to fold at once at most."""
        if self.max_rate is None:
            return BATCH_EVENTS
        return max(1, min(BATCH_EVENTS, int(self.max_rate / _TURNS_A_SECOND)))

    async def wait(self, events: int) -> None:
        """Return when so many more events may be folded."""
        if self.max_rate is None:
            return
        now = time.monotonic()
        turn = max(now, self._free_at)
        self._free_at = turn + events / self.max_rate
        await asyncio.sleep(turn - now)
