"""Work on files in threads, waited for even when the waiting is cancelled.

A thread cannot be stopped: to close its file under it could make it write to another one that got the same number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


async def to_its_end(work: Callable[[], Result]) -> Result:
    """Do `work` in a thread and return its result; when cancelled, only once the thread is done."""
    doing = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        await asyncio.wait([doing])
        raise
