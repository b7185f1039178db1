"""Many transfers at the same time, up to a limit. The first failure ends them all."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterable
from typing import Protocol, TypeVar

Item = TypeVar("Item")

DEFAULT_CONCURRENCY = 16


class TransferProgress(Protocol):
    """The progress of a push or pull. Called in the event loop's thread."""

    def expect(self, files: int, size_bytes: int) -> None:
        """Report how much there is to transfer. Called once, before the first transfer."""

    def advance(self, size_bytes: int) -> None:
        """Report how many more bytes were transferred; negative if some must be sent again."""

    def finish_file(self) -> None:
        """Report that another file is done."""


class NoProgress:
    """Reports nothing."""

    def expect(self, files: int, size_bytes: int) -> None:
        """Do nothing."""

    def advance(self, size_bytes: int) -> None:
        """Do nothing."""

    def finish_file(self) -> None:
        """Do nothing."""


async def at_once(items: Iterable[Item], concurrency: int, work: Callable[[Item], Awaitable[None]]) -> None:
    """Do `work` on every item, at most `concurrency` at a time, started in order.

    Returns when all are done. The first exception cancels the others, waits for them to end, and is raised.
    """
    waiting = iter(items)

    async def worker() -> None:
        for item in waiting:
            await work(item)

    tasks = [asyncio.create_task(worker()) for _ in range(concurrency)]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            if not task.cancelling():
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
