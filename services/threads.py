"""Work on files in threads, waited for even when the waiting is cancelled.

A thread cannot be stopped: to close its file under it could make it write to another one that got the same number.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from threading import Event
from typing import TypeVar

Result = TypeVar("Result")


async def to_its_end(work: Callable[[], Result], given_up: Event | None = None) -> Result:
    """Do `work` in a thread and return its result; when cancelled, however often, only once the thread is done.

    `given_up` is set when it is cancelled, for long work that looks at it.
    """
    return await ended(asyncio.ensure_future(asyncio.to_thread(work)), given_up)


async def ended(doing: asyncio.Future[Result], given_up: Event | None = None) -> Result:
    """As `to_its_end`, of work that a thread does already."""
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        if given_up is not None:
            given_up.set()
        while not doing.done():
            with suppress(asyncio.CancelledError):  # once more: no reason to leave the thread alone
                await asyncio.wait([doing])
        if not doing.cancelled():
            doing.exception()  # seen; the cancellation is what the caller hears of
        raise
