"""Loading: folding a long range of the log into one generation, faster than a member of a group could.

`load` reads given partitions with plain consumers. While one batch is written, the next one is read and decoded in a
thread. Every batch passes the checkpoint's guard, so a crash does no harm, nor does another process that loads the same
partitions.

`load_in_processes` gives each of several processes (`projector.loader`) some of the partitions. A process reads its
job from its standard input, and ends when that is closed. It answers on its standard output with one JSON object per
line: the progress, or the error that ended it.
"""

from __future__ import annotations

import asyncio
import json
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass

from artifact_store.errors import ArtifactStoreError, UnavailableError
from artifact_store.position import Position
from services.config import Settings
from services.log.port import Log
from services.runtime.processes import PYTHON
from services.views.database import Views
from services.views.engine.apply import apply
from services.views.engine.checkpoints import Checkpoint
from services.views.engine.source import read_ahead, read_range
from services.views.projections import Projection

Told = Callable[[int, Mapping[int, int]], None]
"""Called after each batch with its number of events, and with the offsets after it by partition."""


async def load(
    views: Views,
    log: Log,
    projection: Projection,
    since: Checkpoint,
    ends: Mapping[int, int],
    *,
    pace: Pace,
    told: Told,
) -> None:
    """Fold exactly the events between `since`, the generation's checkpoint, and `ends`.

    Raises:
        StaleCheckpointError: another process has moved the generation's checkpoint, or the generation is gone.
        CorruptError: too many packages would be parked; the generation holds the events before that.
        UnavailableError: the log or the database cannot be reached.
    """
    overlaps = views.dialect != "sqlite"
    source = read_range(log, since, ends, batch_events=pace.batch_events)
    async with aclosing(read_ahead(source) if overlaps else source) as batches:
        async for batch in batches:
            await pace.wait(len(batch))
            await apply(views, projection, batch)
            told(len(batch), batch.ends)
            if not overlaps:  # SQLite has one writer at a time: without a pause, others would never get their turn
                await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Job:
    """The work for one process."""

    settings: Settings
    projection: str
    since: Checkpoint
    ends: Mapping[int, int]
    max_rate: float | None
    max_parked: int


async def load_in_processes(
    settings: Settings,
    projection: str,
    since: Checkpoint,
    ends: Mapping[int, int],
    *,
    processes: int,
    max_rate: float | None,
    max_parked: int,
    told: Told,
) -> None:
    """As `load`, but in this many processes. Blocks until all of them have ended."""
    shares = _shares(since.position, ends, processes)
    rate = None if max_rate is None else max_rate / max(len(shares), 1)
    jobs = [Job(settings, projection, since, share, rate, max_parked) for share in shares]
    tasks = [asyncio.create_task(_run_process(job, told)) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def _shares(since: Position, ends: Mapping[int, int], processes: int) -> list[dict[int, int]]:
    """Divide the partitions into shares of about equal length: the longest first, each into the shortest share."""
    lengths = {p: end - since.offsets.get(p, 0) for p, end in ends.items()}
    shares: list[dict[int, int]] = [{} for _ in range(processes)]
    for partition in sorted(lengths, key=lambda p: -lengths[p]):
        if lengths[partition] > 0:
            shortest = min(shares, key=lambda share: sum(lengths[p] for p in share))
            shortest[partition] = ends[partition]
    return [share for share in shares if share]


async def _run_process(job: Job, told: Told) -> None:
    # The job goes through a pipe, because its settings hold secrets, which a command line or environment would show.
    try:
        process = await asyncio.create_subprocess_exec(
            *(*PYTHON, "-m", "projector.loader"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C must only reach this process
        )
    except OSError as error:
        raise UnavailableError(f"a process of the replay cannot be started: {error.strerror}") from error
    if process.stdin is None or process.stdout is None:
        raise UnavailableError("a process of the replay has no pipes")
    try:
        process.stdin.write(pickle.dumps(job))
        async for line in process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise _error(said["error"], said["detail"])
            if "done" in said:  # everything is committed: there is no need to wait until it has cleaned up
                return
            told(said["events"], {int(p): offset for p, offset in said["next_offsets"].items()})
        raise UnavailableError(f"a process of the replay ended by itself (exit code {await process.wait()})")
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


def _error(name: str, detail: str) -> ArtifactStoreError:
    """The error whose class has this name, wherever it is defined: callers decide by its class what to do."""
    kinds = {kind.__name__: kind for kind in _within(ArtifactStoreError)}
    return kinds.get(name, ArtifactStoreError)(detail)


def _within(kind: type[ArtifactStoreError]) -> Iterator[type[ArtifactStoreError]]:
    """The class and all its imported subclasses. Those that `load` raises are imported, because this module uses it."""
    yield kind
    for narrower in kind.__subclasses__():
        yield from _within(narrower)


BATCH_EVENTS = 10_000
_TURNS_A_SECOND = 10
"""A rate is kept in small steps, because a large batch every few seconds would slow down others noticeably."""


class Pace:
    """Limits the rate of a replay. Shared by everything in this process that folds for it."""

    def __init__(self, max_rate: float | None = None) -> None:
        """`max_rate` is in events per second; None means no limit."""
        self.max_rate = max_rate
        self._free_at = 0.0

    @property
    def batch_events(self) -> int:
        """The most events in one batch."""
        if self.max_rate is None:
            return BATCH_EVENTS
        return max(1, min(BATCH_EVENTS, int(self.max_rate / _TURNS_A_SECOND)))

    async def wait(self, events: int) -> None:
        """Return when this many more events may be folded."""
        if self.max_rate is None:
            return
        now = time.monotonic()
        turn = max(now, self._free_at)
        self._free_at = turn + events / self.max_rate
        await asyncio.sleep(turn - now)


TURN_SECONDS = 0.0005


def take_short_turns() -> None:
    """Make threads switch more often. For the start of a process that decodes and writes at the same time."""
    sys.setswitchinterval(TURN_SECONDS)
