"""SIGTERM for commands that a person ends."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from contextlib import contextmanager


def end_as_interrupted() -> None:
    """From now on SIGTERM is what Ctrl-C is, so that what the command made in passing is removed on the way out."""
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, signal.raise_signal, signal.SIGINT)


@contextmanager
def cancelled_by_sigterm(*, wanted: bool) -> Iterator[None]:
    """Where it is `wanted`, SIGTERM ends the block as if what runs in it had come to its end."""
    if not wanted:
        yield
        return
    loop = asyncio.get_running_loop()
    task = asyncio.current_task()
    told = False

    def end() -> None:
        nonlocal told
        told = True
        if task is not None:
            task.cancel()

    loop.add_signal_handler(signal.SIGTERM, end)
    try:
        yield
    except asyncio.CancelledError:
        if not told or task is None or task.uncancel() > 0:
            raise
    finally:
        loop.remove_signal_handler(signal.SIGTERM)
