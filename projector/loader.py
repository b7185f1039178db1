"""`python -m projector.loader`: one of the processes of a replay. It does the job on its standard input, and ends."""

from __future__ import annotations

import asyncio
import json
import os
import pickle
import sys
from collections.abc import Mapping

from artifact_store.errors import ArtifactStoreError
from projector.loading import Job, Pace, load, take_short_turns
from services.runtime.processes import collect_rarely, when_input_ends
from services.views.projections import projection_named
from services.wiring import open_log, open_views

_FAILED = 1


def main() -> int:
    """Do the job that the standard input has. Returns the exit code."""
    job: Job = pickle.load(sys.stdin.buffer)  # noqa: S301 - from the process that started this one
    # When the replay is gone, nobody reads this process's answers, and it would get in the way of the next replay.
    when_input_ends(lambda: os._exit(_FAILED))
    collect_rarely()
    take_short_turns()
    try:
        asyncio.run(_load(job))
    except ArtifactStoreError as error:
        _say({"error": type(error).__name__, "detail": error.detail})
        return _FAILED
    return 0


async def _load(job: Job) -> None:
    log, views = open_log(job.settings), open_views(job.settings)
    views.max_parked = job.max_parked

    def told(events: int, next_offsets: Mapping[int, int]) -> None:
        _say({"events": events, "next_offsets": next_offsets})

    try:
        projection = projection_named(job.projection)
        await load(views, log, projection, job.since, job.ends, pace=Pace(job.max_rate), told=told)
        _say({"done": True})
    finally:
        await views.close()
        await log.close()


def _say(said: Mapping[str, object]) -> None:
    sys.stdout.write(json.dumps(said) + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
