"""One projector of several processes: each a member of the groups, so that the log's partitions are spread over them.

One that dies is started again; one that says that it cannot go on is not, since it would say so again: its partitions
are the others' by then.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence

from services.addresses import ListenAddress
from services.config import Settings
from services.processes import PYTHON, Command, RestartRule
from services.processes import run_processes as run_all

_RULE = RestartRule(final=frozenset({1, 2}), all_or_none=False)
"""The exit codes are those of a projector that has said in its log what is wrong: a projection failed, or the settings
do."""


async def run_processes(
    settings: Settings,
    names: Sequence[str],
    processes: int,
    stop: asyncio.Event,
    *,
    max_parked: int | None = None,
    metrics_at: ListenAddress | None = None,
) -> int:
    """Run so many projectors of these projections until `stop` is set, then tell them to stop; the exit code.

    Blocks until all have ended. The code is 0 when they were told to end and did so, else that of the first which could
    not go on. Returns early when none is left that can. From `metrics_at` on each has its own metrics.
    """
    limit = [] if max_parked is None else ["--max-parked", str(max_parked)]
    arguments = [*PYTHON, "-m", "services.cli", "projector", "--until-input-ends", *limit]
    environment = {**os.environ, **settings.environment()}
    commands = []
    for number in range(processes):
        listen = [] if metrics_at is None else ["--metrics-listen", str(metrics_at.of_process(number))]
        commands.append(Command([*arguments, *listen, *names], environment))
    return await run_all(commands, _RULE, stop)
