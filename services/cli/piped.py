"""Standard input, or a pipe that has a name, as it comes, read by a thread that nobody waits for.

A read from a pipe or a terminal cannot be ended from outside, and the event loop waits for its own threads when it
closes: a command that failed, or was told to end, would go on until whoever writes into the pipe writes again.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

from services.streams import CHUNK_BYTES

_CHUNKS_AHEAD = 2


def standard_input() -> AsyncIterator[bytes]:
    """What comes, up to its end. Memory is bounded. Raises OSError when reading fails."""
    return _read(sys.stdin.fileno)


def named_pipe(path: Path) -> AsyncIterator[bytes]:
    """As `standard_input`, of what is to be found by that name."""
    return _read(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))  # which waits for a writer


async def _read(opened: Callable[[], int]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    come: asyncio.Queue[bytes | OSError] = asyncio.Queue(_CHUNKS_AHEAD)

    def hand_over(what: bytes | OSError) -> None:
        asyncio.run_coroutine_threadsafe(come.put(what), loop).result()

    def read() -> None:
        # Once nobody wants more, the loop is closed or the waiting cancelled.
        with suppress(RuntimeError, concurrent.futures.CancelledError, TimeoutError):
            try:
                descriptor = opened()
                while chunk := os.read(descriptor, CHUNK_BYTES):  # not the buffered file: its lock outlives the thread
                    hand_over(chunk)
                hand_over(b"")
            except OSError as error:
                hand_over(error)

    Thread(target=read, name="standard-input", daemon=True).start()
    while chunk := await come.get():
        if isinstance(chunk, OSError):
            raise chunk
        yield chunk
