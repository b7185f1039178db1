"""Several processes of one command: they are started, watched, restarted when they die, and told to stop.

The watching process does nothing else, and has no client of the log or the database. The others end when it ends, for
whatever reason: the standard input of each is a pipe from it, and `when_input_ends` notices when the pipe closes.
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
"""The command that runs our modules. -P keeps Python from importing from the current folder first."""

_NOT_STARTED = -1

STOP_SECONDS = 90.0
"""How long a process may take to stop: a gateway gives its requests 30 s, then hands its partitions over."""


@dataclass(frozen=True)
class Command:
    """One of the processes: its command line, whole environment, and the descriptors that it inherits."""

    arguments: Sequence[str]
    environment: Mapping[str, str]
    descriptors: tuple[int, ...] = ()


@dataclass(frozen=True)
class RestartRule:
    """What to do with a process that ends although nobody told it to.

    It is started again: at once if it had run for longer than `sound_seconds`, else after a pause that doubles each
    time. It is given up if its exit code is one of `final`, or after it died `most_deaths` times in a row within
    `sound_seconds` each. With `all_or_none` the others are then told to stop too; otherwise they continue.
    """

    final: frozenset[int]
    all_or_none: bool
    most_deaths: int | None = None
    first_pause: float = 0.5
    longest_pause: float = 30.0
    sound_seconds: float = 60.0


async def wait_for_stop(stop: asyncio.Event, seconds: float) -> None:
    """Wait until `stop` is set, for at most this many seconds."""
    with suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), seconds)


async def run_processes(
    commands: Sequence[Command],
    rule: RestartRule,
    stop: asyncio.Event,
    *,
    when_ending: Callable[[], object] = lambda: None,
) -> int:
    """Run a process for each command until `stop` is set, then tell them to stop. Returns the exit code.

    Blocks until all have ended, which is earlier if they were given up. `when_ending` is called when they are told to
    end. The code is 0 if all ended as they were told to. Otherwise it is that of the first process that was given up or
    failed; a process that a signal ended counts as 1.
    """
    ending = asyncio.Event()  # set after `stop`, or by a process that ends all of them
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
        keeping.cancel()  # only has an effect if this function was cancelled
    return next((code for code in codes if code), 0)


def when_input_ends(call: Callable[[], object]) -> None:
    """Call `call`, in a separate thread, when the standard input ends, because the parent process is gone."""

    def wait() -> None:
        while os.read(sys.stdin.fileno(), 1024):
            pass
        call()

    threading.Thread(target=wait, name="until-input-ends", daemon=True).start()


def end_with_parent(stop: asyncio.Event) -> None:
    """Set `stop` when the parent process is gone. If it is set already, kill this process at once."""
    loop = asyncio.get_running_loop()

    def gone() -> None:
        if stop.is_set():  # told to end a second time: a process that runs alone would end at once too
            os.kill(os.getpid(), signal.SIGKILL)
        stop.set()

    when_input_ends(lambda: loop.call_soon_threadsafe(gone))


class _Watched:
    """One of the watched processes."""

    def __init__(self, command: Command, number: int, rule: RestartRule, stop: asyncio.Event) -> None:
        self._command = command
        self._number = number
        self._rule = rule
        self._stop = stop

    async def keep_up(self) -> int:
        """Run the process, and restart it whenever it dies. Returns its exit code when it ends for good."""
        rule = self._rule
        pause, deaths = 0.0, 0
        while not self._stop.is_set():
            began = time.monotonic()
            code = await self._run()
            if self._stop.is_set():
                # A process that SIGTERM ended was told to stop before it had installed its handler: that is no failure.
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
        """Start the process, and wait until it ends, by itself or after `stop`. Returns its exit code.

        A process that the system cannot start counts as one that died.
        """
        try:
            # In a separate process group, so that a terminal's Ctrl-C reaches only this process. It tells the others.
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

    Popen's own method would reap an ended process, so that asyncio would miss its exit code and report 255.
    """
    if process.returncode is None:
        with suppress(ProcessLookupError):
            os.kill(process.pid, number)


YOUNG = 50_000
"""The net number of new objects after which the youngest generation is collected; the default is 700. A batch of
commands makes ten thousand and more that live as long as the batch. Garbage in cycles lives longer, and takes some
MiB."""

OLDER = 20
"""How many collections of a younger generation come before one of the next older; the default is 10."""


def collect_rarely() -> None:
    """Exempt all present objects from garbage collection, and collect rarely.

    For the start of a process that is long-lived or creates many objects.
    """
    gc.freeze()
    gc.set_threshold(YOUNG, OLDER, OLDER)
