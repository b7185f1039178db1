"""SIGTERM for commands that a person ends."""

from __future__ import annotations

import asyncio
import signal


def end_as_interrupted() -> None:
    """From now on SIGTERM is what Ctrl-C is, so that what the command made in passing is removed on the way out.

    Also where Ctrl-C is ignored, as in what a script starts with `&` (POSIX, shell command language, 2.12).
    """
    task = asyncio.current_task()
    if task is not None:
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
