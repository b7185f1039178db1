"""Loading: folding a long stretch of the log into one generation, faster than a member of a group could.

`load` reads given partitions with plain consumers. While one batch is written, the next one is read and decoded in a
thread. Every batch passes the checkpoint's guard, so a crash, or somebody else who loads the same, does no harm.

`load_in_processes` gives each of several processes (`projector.loader`) some of the partitions. A process reads its
job from its standard input, which stays open: the process ends when it closes. It answers on its standard output, one
JSON object a line: what it folded, or the error that ended it.
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
"""Called behind each batch with how many events it had, and with the offsets behind it by partition."""


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
    """Fold what lies between the generation's checkpoint and `ends`, exactly that.

    Raises:
        StaleCheckpointError: another has moved the generation, or it is not there any more.
        CorruptError: too many packages would be parked; the generation holds what came before that.
        UnavailableError: the log or the database cannot be reached.
    """
    overlaps = views.dialect != "sqlite"
    source = read_range(log, since, ends, batch_events=pace.batch_events)
    async with aclosing(read_ahead(source) if overlaps else source) as batches:
        async for batch in batches:
            await pace.wait(len(batch))
            await apply(views, projection, batch)
            told(len(batch), batch.ends)
            if not overlaps:  # SQLite has one writer: if this one never paused, nobody else would get in
                await asyncio.sleep(0)


@dataclass(frozen=True, slots=True)
class Job:
    """What one process is to load."""

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
    """As `load`, by so many processes; blocks until every one of them has ended."""
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
    """The partitions, so spread that every share is about as long: the longest first, each to the shortest share."""
    lengths = {p: end - since.offsets.get(p, 0) for p, end in ends.items()}
    shares: list[dict[int, int]] = [{} for _ in range(processes)]
    for partition in sorted(lengths, key=lambda p: -lengths[p]):
        if lengths[partition] > 0:
            shortest = min(shares, key=lambda share: sum(lengths[p] for p in share))
            shortest[partition] = ends[partition]
    return [share for share in shares if share]


async def _run_process(job: Job, told: Told) -> None:
    # The settings hold secrets: a pipe shows them to nobody, a command line or environment would.
    try:
        process = await asyncio.create_subprocess_exec(
            *(*PYTHON, "-m", "projector.loader"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            process_group=0,  # a terminal's Ctrl-C is for the one who started it
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
            if "done" in said:  # all is committed: nobody has to wait until it has cleared up
                return
            told(said["events"], {int(p): offset for p, offset in said["next_offsets"].items()})
        raise UnavailableError(f"a process of the replay ended by itself (exit code {await process.wait()})")
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


def _error(name: str, detail: str) -> ArtifactStoreError:
    """The error of this name, wherever it is defined: what can be done about it goes by its class."""
    kinds = {kind.__name__: kind for kind in _within(ArtifactStoreError)}
    return kinds.get(name, ArtifactStoreError)(detail)


def _within(kind: type[ArtifactStoreError]) -> Iterator[type[ArtifactStoreError]]:
    """The class and all below it that are imported; those that a load raises are, as this imports what it does."""
    yield kind
    for narrower in kind.__subclasses__():
        yield from _within(narrower)


BATCH_EVENTS = 10_000
_TURNS_A_SECOND = 10
"""A rate is kept in small steps: a large batch every few seconds would be felt in between."""


class Pace:
    """Shared by all who fold for one replay."""

    def __init__(self, max_rate: float | None = None) -> None:
        """`max_rate` in events a second; None is as fast as it goes."""
        self.max_rate = max_rate
        self._free_at = 0.0

    @property
    def batch_events(self) -> int:
        """How many events to fold at once at most."""
        if self.max_rate is None:
            return BATCH_EVENTS
        return max(1, min(BATCH_EVENTS, int(self.max_rate / _TURNS_A_SECOND)))

    async def wait(self, events: int) -> None:
        """Return when so many more events may be folded."""
        if self.max_rate is None:
            return
        now = time.monotonic()
        turn = max(now, self._free_at)
        self._free_at = turn + events / self.max_rate
        await asyncio.sleep(turn - now)


TURN_SECONDS = 0.0005


def take_short_turns() -> None:
    """For the start of a process that decodes and writes at the same time."""
    sys.setswitchinterval(TURN_SECONDS)
