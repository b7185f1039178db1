"""Loading in several processes, each some of the partitions: `python -m projector.loading_process` is one of them.

A process gets its work on its standard input, which stays open: when it closes, whoever asked is gone, and so is the
process. It answers on its standard output, one JSON object a line: what it folded, or the error that ended it.
"""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
import threading
from collections.abc import Mapping
from dataclasses import dataclass

from projector.loading import Told, load
from projector.pace import Pace
from services import errors
from services.collector import collect_rarely
from services.config import Settings
from services.errors import ArtifactStoreError, UnavailableError
from services.log.position import Position
from services.views.checkpoints import Checkpoint, StaleCheckpointError
from services.views.projections import projection_named
from services.wiring import open_log, open_views

_FAILED = 1


@dataclass(frozen=True, slots=True)
class _Job:
    settings: Settings
    projection: str
    since: Checkpoint
    ends: Mapping[int, int]
    max_rate: float | None


async def load_in_processes(
    settings: Settings,
    projection: str,
    since: Checkpoint,
    ends: Mapping[int, int],
    *,
    processes: int,
    max_rate: float | None,
    told: Told,
) -> None:
    """As `load`, by so many processes; blocks until every one of them has ended."""
    shares = _shares(since.position, ends, processes)
    rate = None if max_rate is None else max_rate / max(len(shares), 1)
    jobs = [_Job(settings, projection, since, share, rate) for share in shares]
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


async def _run_process(job: _Job, told: Told) -> None:
    # The settings hold secrets: a pipe shows them to nobody, a command line or environment would.
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "projector.loading_process"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    if process.stdin is None or process.stdout is None:
        raise UnavailableError("a process of the replay has no pipes")
    try:
        process.stdin.write(pickle.dumps(job))
        async for line in process.stdout:
            said = json.loads(line)
            if "error" in said:
                raise _error(said["error"], said["detail"])
            told(said["events"], {int(p): offset for p, offset in said["next_offsets"].items()})
        if await process.wait() != 0:
            raise UnavailableError(f"a process of the replay ended by itself (exit code {process.returncode})")
    finally:
        if process.returncode is None:
            process.kill()
        process.stdin.close()
        await process.wait()


def _error(name: str, detail: str) -> ArtifactStoreError:
    kind = StaleCheckpointError if name == StaleCheckpointError.__name__ else getattr(errors, name, ArtifactStoreError)
    error: ArtifactStoreError = kind(detail)
    return error


def main() -> int:
    """Do the work that the standard input holds; returns the exit code."""
    job: _Job = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    threading.Thread(target=_end_with_parent, daemon=True).start()
    collect_rarely()
    try:
        asyncio.run(_load(job))
    except ArtifactStoreError as error:
        _say({"error": type(error).__name__, "detail": error.detail})
        return _FAILED
    return 0


async def _load(job: _Job) -> None:
    log, views = open_log(job.settings), open_views(job.settings)

    def told(events: int, next_offsets: Mapping[int, int]) -> None:
        _say({"events": events, "next_offsets": next_offsets})

    try:
        projection = projection_named(job.projection)
        await load(views, log, projection, job.since, job.ends, pace=Pace(job.max_rate), told=told)
    finally:
        await views.close()
        await log.close()


def _say(said: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


def _end_with_parent() -> None:
    """Nobody is there to be told any more, and a replay that begins again would meet this one."""
    sys.stdin.buffer.read()
    os._exit(_FAILED)


if __name__ == "__main__":
    sys.exit(main())
