"""Attempts at what others hold up: for a bounded time, with pauses in which those who wait behind get through."""

from __future__ import annotations

import asyncio
import random
import time

_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


class Attempts:
    """The time that there is for one undertaking, and the pauses within."""

    def __init__(self, seconds: float) -> None:
        """The time begins now."""
        self._until = time.monotonic() + seconds
        self._pause = _FIRST_PAUSE

    async def another(self) -> bool:
        """Pause, longer each time, and return True; False at once when the time is over."""
        if time.monotonic() > self._until:
            return False
        await asyncio.sleep(random.uniform(0, self._pause))
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return True
