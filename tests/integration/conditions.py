"""Waiting for a condition instead of for a fixed time."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

_POLL_SECONDS = 0.05


async def until(condition: Callable[[], Awaitable[bool]], seconds: float, otherwise: str) -> None:
    """Return as soon as the condition holds. Raises AssertionError with `otherwise` after this many seconds."""
    deadline = time.monotonic() + seconds
    while not await condition():
        if time.monotonic() > deadline:
            raise AssertionError(f"{otherwise} (waited {seconds:g} s)")
        await asyncio.sleep(_POLL_SECONDS)
