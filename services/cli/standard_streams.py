"""Standard input, output and error, and the signals by which a person ends a command."""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from threading import Thread

from artifact_store.byte_streams import CHUNK_BYTES

_INPUT, _OUTPUT, _ERROR = range(3)


def open_missing_streams() -> None:
    """Open /dev/null in place of each standard stream that is closed.

    Otherwise the next file or socket would get its number and receive what is printed, and libuv would abort. Output is
    discarded. Reading fails, because an immediate end would be recorded as an empty file.
    """
    for number in (_INPUT, _OUTPUT, _ERROR):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_WRONLY)  # gets the lowest free number, which is this one
            os.set_inheritable(number, True)
    if sys.stdin is None:
        sys.stdin = os.fdopen(_INPUT, closefd=False, encoding="utf-8")
    if sys.stdout is None:
        sys.stdout = os.fdopen(_OUTPUT, "w", closefd=False, encoding="utf-8")
    if sys.stderr is None:
        sys.stderr = os.fdopen(_ERROR, "w", closefd=False, encoding="utf-8", errors="backslashreplace")


_CHUNKS_AHEAD = 2


def standard_input() -> AsyncIterator[bytes]:
    """Standard input, up to its end. Memory is bounded. Raises OSError if reading fails."""
    return _read(sys.stdin.fileno)


def named_pipe(path: Path) -> AsyncIterator[bytes]:
    """As `standard_input`, for the named pipe at this path."""
    return _read(partial(os.open, path, os.O_RDONLY | os.O_CLOEXEC))  # which waits for a writer


async def _read(opened: Callable[[], int]) -> AsyncIterator[bytes]:
    loop = asyncio.get_running_loop()
    come: asyncio.Queue[bytes | OSError] = asyncio.Queue(_CHUNKS_AHEAD)

    def hand_over(what: bytes | OSError) -> None:
        asyncio.run_coroutine_threadsafe(come.put(what), loop).result()

    def read() -> None:
        # When the reader has stopped, the loop is closed or the waiting is cancelled.
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


def end_as_interrupted() -> None:
    """From now on, treat SIGTERM like Ctrl-C, so that the command removes its temporary files on the way out.

    Also works where Ctrl-C is ignored, as in a command that a script starts with `&` (POSIX, shell command language,
    2.12).
    """
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
