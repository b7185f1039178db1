"""`python -m tests.faults.torture [--duration SECONDS] [--seed N]`: a round of torture; exit code 1 if a promise broke.

The last line of the output is for tools; progress goes to standard error.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import TypeVar

from tests.faults.torture.kinds import KINDS, Kind
from tests.faults.torture.load import LoadSettings
from tests.faults.torture.round import Result, Round
from tests.faults.torture.stage import Stage, staged
from tests.services.shared import VAR

_BEGAN = time.monotonic()


def main(arguments: list[str]) -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.torture", description=__doc__)
    parser.add_argument("--duration", type=float, default=60.0, help="how many seconds faults are made")
    parser.add_argument("--seed", type=int, default=None, help="repeats the choices of an earlier round")
    parser.add_argument("--producers", type=int, default=400, help="how many packages are under way at once")
    parser.add_argument("--at-once", type=int, default=120, help="how many commands are under way at once")
    parser.add_argument("--only", action="append", metavar="KIND", help="make faults of this kind alone; repeatable")
    parser.add_argument("--keep", action="store_true", help="keep journals, logs and data even when all was well")
    parser.add_argument("--own-mounts", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if not options.own_mounts and _may_mount():
        command = [sys.executable, "-m", "tests.faults.torture", *arguments, "--own-mounts"]
        # The same process, with its own mounts.
        os.execvp("unshare", ["unshare", "--mount", *command])  # noqa: S606 - no shell is wanted
    kinds = [kind for kind in KINDS if options.only is None or kind.name in options.only]
    if not kinds:
        parser.error(f"kinds are: {', '.join(kind.name for kind in KINDS)}")
    seed = options.seed if options.seed is not None else random.randrange(2**32)
    folder = VAR / "torture" / str(seed)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    say(f"seed {seed}; {options.duration:.0f} s; everything is kept in {folder} if a promise breaks")
    given = {"keep": options.keep, "own_mounts": options.own_mounts}
    under_fire = torture(folder, options.duration, seed, options.producers, options.at_once, kinds, **given)
    result = asyncio.run(until_told(under_fire))
    if result is None:
        return 130
    report(result, seed)
    if result.verdict.clean and not options.keep:
        shutil.rmtree(folder, ignore_errors=True)
    return 0 if result.verdict.clean else 1


def _may_mount() -> bool:
    return (
        shutil.which("unshare") is not None
        and subprocess.run(["unshare", "--mount", "true"], check=False).returncode == 0
    )


_Found = TypeVar("_Found")


async def until_told(under_fire: Coroutine[None, None, _Found]) -> _Found | None:
    """The result, or None when a signal came: then all that was started is ended first."""
    task, loop = asyncio.ensure_future(under_fire), asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, task.cancel)
    try:
        return await task
    except asyncio.CancelledError:
        return None


async def torture(
    folder: Path,
    duration: float,
    seed: int,
    producers: int,
    at_once: int,
    kinds: Sequence[Kind] = KINDS,
    *,
    keep: bool = False,
    own_mounts: bool = False,
) -> Result:
    """A whole round on a separate stage in `folder`. Its data stays if a promise breaks.

    `own_mounts`: what this process mounts ends with it; without, no disk can be filled.
    """
    found: list[Result] = []
    async with staged(
        folder, keep=lambda: keep or not (found and found[0].verdict.clean), own_mounts=own_mounts
    ) as stage:
        say("everything runs")
        made = kinds if own_mounts else [kind for kind in kinds if not kind.small_disk]
        found.append(await Round(stage, seed, say, loads(stage, seed, producers, at_once), made).run(duration))
    return found[0]


def loads(stage: Stage, seed: int, producers: int, at_once: int) -> list[LoadSettings]:
    """Most producers speak plain HTTP, a few use the client library."""
    few = max(1, producers // 20)
    return [
        LoadSettings(stage.urls, str(stage.folder / "plain.journal"), producers - few, at_once, seed),
        LoadSettings(stage.urls, str(stage.folder / "library.journal"), few, 2, seed + 1, library=True),
    ]


def say(text: str) -> None:
    """Progress, with the time since the beginning."""
    print(f"{time.monotonic() - _BEGAN:6.1f} s  {text}", file=sys.stderr, flush=True)  # noqa: T201 - the command's output


def report(result: Result, seed: int) -> None:
    """The findings, the figures, and the last line."""
    for text in result.verdict.said:
        print(f"- {text}")  # noqa: T201 - the command's output
    print(result.delays.table(result.windows))  # noqa: T201 - the command's output
    print(f"seed {seed}")  # noqa: T201 - the command's output
    print(result.last_line, flush=True)  # noqa: T201 - the command's output


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
