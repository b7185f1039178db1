"""Cleaning up after an upload that failed or was cancelled, without being cut off by the cancellation itself."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine

from services.errors import UnavailableError

_log = logging.getLogger(__name__)


class Cleanups:
    """Runs clean-up work to its end or its time limit, whatever happens to the task that asked for it."""

    def __init__(self, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._running: set[asyncio.Task[None]] = set()

    async def run(self, work: Coroutine[None, None, None]) -> None:
        """Wait for `work`. Cancelled meanwhile, the caller leaves and the work goes on.

        A store that cannot be reached, or not in time, is logged only: the error that led here matters more, and
        `sweep` finds what is left.
        """
        task = asyncio.create_task(self._bounded(work))
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        await asyncio.wait({task})
        task.result()

    async def drain(self) -> None:
        """Wait for all work that is still running."""
        if self._running:
            await asyncio.wait(set(self._running))

    async def _bounded(self, work: Coroutine[None, None, None]) -> None:
        try:
            async with asyncio.timeout(self._seconds):
                await work
        except (UnavailableError, TimeoutError) as error:
            _log.warning("an upload could not be cleaned up and is left to the sweep: %s", str(error) or "out of time")
