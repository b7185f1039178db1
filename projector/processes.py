"""One projector of several processes: each a member of the groups, so that the log's partitions are spread over them.

This process only watches over the others: it holds no client of the log or the database. One that dies is started again
after a pause; one that says that it cannot go on is not, since it would say so again: its partitions are the others' by
then. The processes end when this one does, however that happens: each has a pipe from it as its standard input.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from services.config import Settings

logger = logging.getLogger(__name__)

_FIRST_PAUSE = 0.5
_LONGEST_PAUSE = 30.0
_SOUND_SECONDS = 60.0
"""A process that ran as long as this before it died is started again without delay."""

_STOP_SECONDS = 60.0
"""How long a process may take to end once it was told to."""

_CANNOT_GO_ON = (1, 2)
"""Exit codes of a projector that has said in its log what is wrong: a projection failed, or the settings do."""


async def run_processes(
    settings: Settings, names: Sequence[str], processes: int, stop: asyncio.Event, *, max_parked: int | None = None
) -> int:
    """Run so many projectors of these projections until `stop` is set, then tell them to stop; the exit code.

    Blocks until all have ended. The code is 0 when they were told to end and did so, else that of the first which could
    not go on. Returns early when none is left that can.
    """
    limit = [] if max_parked is None else ["--max-parked", str(max_parked)]
    command = [sys.executable, "-m", "services.cli", "projector", "--until-input-ends", *limit, *names]
    environment = {**os.environ, **settings.environment()}
    codes = await asyncio.gather(*(_keep_up(command, environment, number, stop) for number in range(1, processes + 1)))
    return next((code for code in codes if code), 0)


async def _keep_up(command: Sequence[str], environment: Mapping[str, str], number: int, stop: asyncio.Event) -> int:
    """One process, started again whenever it dies; its exit code when it ends for good."""
    pause = 0.0
    while not stop.is_set():
        began = time.monotonic()
        code = await _run_one(command, environment, number, stop)
        if stop.is_set() and code == -signal.SIGTERM:  # it was told before it could listen
            return 0
        if stop.is_set() or code in _CANNOT_GO_ON:
            return code if code >= 0 else 1
        pause = 0.0 if time.monotonic() - began > _SOUND_SECONDS else min(max(_FIRST_PAUSE, 2 * pause), _LONGEST_PAUSE)
        logger.error("process %d died (exit code %d), starting it again in %.1f s", number, code, pause)
        try:
            await asyncio.wait_for(stop.wait(), pause)
        except TimeoutError:
            continue
    return 0


async def _run_one(command: Sequence[str], environment: Mapping[str, str], number: int, stop: asyncio.Event) -> int:
    """Start the process and wait for its end, or for `stop`, then for its end; its exit code."""
    # In a group of its own: a terminal's Ctrl-C reaches this process, which tells the others, once.
    process = await asyncio.create_subprocess_exec(
        *command, stdin=asyncio.subprocess.PIPE, env=environment, process_group=0
    )
    logger.info("process %d runs (pid %d)", number, process.pid)
    ended = asyncio.create_task(process.wait())
    stopping = asyncio.create_task(stop.wait())
    try:
        await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
        if not ended.done():
            process.terminate()
            await asyncio.wait((ended,), timeout=_STOP_SECONDS)
    finally:
        stopping.cancel()
        if not ended.done():
            logger.warning("process %d does not end, it is killed", number)
            process.kill()
        if process.stdin is not None:
            process.stdin.close()
    return await ended


def when_input_ends(call: Callable[[], object]) -> None:
    """Call, in a thread of its own, once the standard input is at its end: whoever started this process is gone."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        call()

    threading.Thread(target=wait, name="until-input-ends", daemon=True).start()
