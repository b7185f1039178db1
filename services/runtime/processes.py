"""Several processes of one command: started, watched over, started again when they die, and told to stop.

This process only watches: it holds no client of the log or the database. The others end when it does, however that
happens: each has a pipe from it as its standard input, whose end is what `when_input_ends` waits for.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass

logger = logging.getLogger(__name__)

PYTHON = (sys.executable, "-P")
"""What runs a module of ours: -P, since it would import from the folder that the command was called in first."""

_NOT_STARTED = -1

STOP_SECONDS = 90.0
"""How long a process may take to end once it was told to: a gateway gives its requests 30 s, then hands over."""


@dataclass(frozen=True)
class Command:
    """What one of the processes is: command line, whole environment, and the descriptors that it inherits."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class RestartRule:
    """What becomes of a process that ends although nobody told it to.

    It is started again after a pause: none if it had run for `sound_seconds`, else twice as long each time. It is
    given up when its exit code is one of `final`, or when it died `most_deaths` times in a row, none of which came
    after `sound_seconds`. The others then go on, or are told to stop too: `all_or_none`.
    """

    final: frozenset[int]
    all_or_none: bool
    most_deaths: int | None = None
    first_pause: float = 0.5
    longest_pause: float = 30.0
    sound_seconds: float = 60.0


async def wait_for_stop(stop: asyncio.Event, seconds: float) -> None:
    """Wait until `stop` is set, for so many seconds at most."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def run_processes(
    commands: Sequence[Command],
    rule: RestartRule,
    stop: asyncio.Event,
    *,
    when_ending: Callable[[], object] = lambda: None,
) -> int:
    """Run a process of each command until `stop` is set, then tell them to stop; the exit code.

    Blocks until all have ended, which is early when they were given up. `when_ending` is called when they are to end,
    before they have. The code is 0 when they were told to end and
    did so, else that of the first that was given up or did not end well; 1 for one that a signal ended.
    """
    ending = asyncio.Event()  # set by `stop`, or by one of them on behalf of all
    watched = [_Watched(command, number, rule, ending) for number, command in enumerate(commands, 1)]
    keeping = asyncio.gather(*(process.keep_up() for process in watched))
    told = (asyncio.create_task(stop.wait()), asyncio.create_task(ending.wait()))
    try:
        await asyncio.wait((keeping, *told), return_when=asyncio.FIRST_COMPLETED)
        ending.set()
        when_ending()
        codes = await keeping
    finally:
        for task in told:
            task.cancel()
        keeping.cancel()  # nothing is left to cancel, but where this itself was
    return next((code for code in codes if code), 0)


def when_input_ends(call: Callable[[], object]) -> None:
    """Call, in a thread of its own, once the standard input is at its end: whoever started this process is gone."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        call()

    threading.Thread(target=wait, name="until-input-ends", daemon=True).start()


def end_with_parent(stop: asyncio.Event) -> None:
    """Set `stop` once whoever started this process is gone; where it was set already, end this process at once."""
    loop = asyncio.get_running_loop()

    def gone() -> None:
        if stop.is_set():  # told to end twice, as a process is that runs alone
            os.kill(os.getpid(), signal.SIGKILL)
        stop.set()

    when_input_ends(lambda: loop.call_soon_threadsafe(gone))


class _Watched:
    """One of the processes."""

    def __init__(self, command: Command, number: int, rule: RestartRule, stop: asyncio.Event) -> None:
        self._command = command
        self._number = number
        self._rule = rule
        self._stop = stop

    async def keep_up(self) -> int:
        """Run it, again whenever it dies; its exit code when it ends for good."""
        rule = self._rule
        pause, deaths = 0.0, 0
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run()
            if self._stop.is_set():
                # Ended by the signal: it was told before it could listen. Whoever listens goes on to do so to its end.
                return 0 if code == -signal.SIGTERM else code if code >= 0 else 1
            if code in rule.final:
                return self._given_up(code)
            sound = time.monotonic() - began > rule.sound_seconds
            deaths = 1 if sound else deaths + 1
            pause = 0.0 if sound else min(max(rule.first_pause, 2 * pause), rule.longest_pause)
            if deaths == rule.most_deaths:
                logger.error("process %d died (exit code %d) for the %dth time in a row", self._number, code, deaths)
                return self._given_up(max(code, 1))
            logger.error("process %d died (exit code %d), starting it again in %.1f s", self._number, code, pause)
            await wait_for_stop(self._stop, pause)
        return 0

    def _given_up(self, code: int) -> int:
        if self._rule.all_or_none:
            logger.error("process %d cannot go on (exit code %d): the others are told to stop", self._number, code)
            self._stop.set()
        return code

    async def _run(self) -> int:
        """Start the process and wait for its end, or for `stop`, then for its end; its exit code.

        One that the system does not start counts as one that died.
        """
        try:
            # In a group of its own: a terminal's Ctrl-C reaches this process, which tells the others, once.
            process = await asyncio.create_subprocess_exec(
                *self._command.arguments,
                stdin=asyncio.subprocess.PIPE,
                env=self._command.environment,
                pass_fds=self._command.descriptors,
                process_group=0,
            )
        except OSError as error:
            logger.error("process %d cannot be started: %s", self._number, error)
            return _NOT_STARTED
        logger.info("process %d runs (pid %d)", self._number, process.pid)
        ended = asyncio.create_task(process.wait())
        stopping = asyncio.create_task(self._stop.wait())
        try:
            await asyncio.wait((ended, stopping), return_when=asyncio.FIRST_COMPLETED)
            if not ended.done():
                _send(process, signal.SIGTERM)
                await asyncio.wait((ended,), timeout=STOP_SECONDS)
        finally:
            stopping.cancel()
            if not ended.done():
                logger.warning("process %d does not end and is killed", self._number)
                _send(process, signal.SIGKILL)
            if process.stdin is not None:
                process.stdin.close()
        return await ended


def _send(process: asyncio.subprocess.Process, number: signal.Signals) -> None:
    """Send the signal, unless the process has ended.

    Popen's own method would look for its end, and take the exit code from asyncio, which then says 255.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


YOUNG = 50_000
"""So many objects are made, net of those that went by themselves, before the new ones are looked at; the default is
700. A batch of commands makes ten thousand and more that live as long as it does. Garbage in cycles waits longer,
in some MiB."""

OLDER = 20
"""So many times the younger ones are looked at before the older ones are; the default is 10."""


def collect_rarely() -> None:
    """For the start of a process that runs long or makes much: spare what exists by now, look at the rest seldom."""
    gc.freeze()
    gc.set_threshold(YOUNG, OLDER, OLDER)
