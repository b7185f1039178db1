"""Loading in several processes, each some of the partitions: `projector.loader` is what runs in them.

A process gets its work on its standard input, which stays open: when it closes, whoever asked is gone, and so is the
process. It answers on its standard output, one JSON object a line: what it folded, or the error that ended it.
"""

from __future__ import annotations

import asyncio
import json
import pickle
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from projector.loading import Told
from services.config import Settings
from services.errors import ArtifactStoreError, UnavailableError
from services.log.position import Position
from services.processes import PYTHON
from services.views.checkpoints import Checkpoint


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
