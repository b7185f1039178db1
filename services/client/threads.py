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
    doing = asyncio.ensure_future(asyncio.to_thread(work))
    try:
        return await asyncio.shield(doing)
    except asyncio.CancelledError:
        if given_up is not None:
            given_up.set()
        while not doing.done():
            with suppress(asyncio.CancelledError):
                await asyncio.wait([doing])
        raise
