"""Processes that are watched over: told to end, started again when they die, and given up by the rule."""

from __future__ import annotations

import asyncio
import os
import sys
from pathlib import Path

import pytest

from services.processes import Command, RestartRule, run_processes
from tests.integration.conditions import until

WAIT = "import sys; sys.stdin.read()"
"""Runs until it is told to end, or whoever started it is gone."""

SECONDS = 30.0


def command(code: str, *descriptors: int) -> Command:
    return Command([sys.executable, "-c", code], dict(os.environ), descriptors)


def noting(path: Path, then: str) -> Command:
    """Adds a line to the file when it starts; `then` knows how many there are by `n`."""
    return command(f"import sys; f = open({str(path)!r}, 'a+'); f.write('x'); f.seek(0); n = len(f.read()); {then}")


def rule(**changes: object) -> RestartRule:
    values: dict[str, object] = {"final": frozenset({2}), "all_or_none": True, "first_pause": 0.01, **changes}
    return RestartRule(**values)  # type: ignore[arg-type]  # what a test changes, it changes by name


async def until_started(path: Path, times: int) -> None:
    async def started() -> bool:
        return path.exists() and len(path.read_text()) >= times

    await until(started, SECONDS, "the process did not start")


async def test_told_to_end_all_end_and_the_code_is_0(tmp_path: Path) -> None:
    stop, ending = asyncio.Event(), []
    commands = [noting(tmp_path / name, "f.close(); sys.stdin.read()") for name in ("a", "b")]
    running = asyncio.create_task(run_processes(commands, rule(), stop, when_ending=lambda: ending.append(1)))
    await until_started(tmp_path / "a", 1)
    await until_started(tmp_path / "b", 1)
    assert not ending
    stop.set()
    assert await asyncio.wait_for(running, SECONDS) == 0
    assert ending == [1]


@pytest.mark.parametrize("code", [0, 1, 3])
async def test_one_that_ends_unasked_is_started_again(tmp_path: Path, code: int) -> None:
    stop, starts = asyncio.Event(), tmp_path / "starts"
    dying = noting(starts, f"f.close(); sys.exit({code}) if n < 3 else sys.stdin.read()")
    running = asyncio.create_task(run_processes([dying], rule(most_deaths=3), stop))
    await until_started(starts, 3)
    stop.set()
    assert await asyncio.wait_for(running, SECONDS) == 0


async def test_one_that_dies_again_and_again_ends_all(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    commands = [command(WAIT), noting(starts, "sys.exit(0)")]
    code = await asyncio.wait_for(run_processes(commands, rule(most_deaths=3), asyncio.Event()), SECONDS)
    assert (code, starts.read_text()) == (1, "xxx")


async def test_a_final_exit_code_is_that_of_all_and_nothing_is_tried_again(tmp_path: Path) -> None:
    starts = tmp_path / "starts"
    commands = [command(WAIT), noting(starts, "sys.exit(2)")]
    code = await asyncio.wait_for(run_processes(commands, rule(), asyncio.Event()), SECONDS)
    assert (code, starts.read_text()) == (2, "x")


async def test_where_each_stands_for_itself_the_others_go_on(tmp_path: Path) -> None:
    stop, starts = asyncio.Event(), tmp_path / "starts"
    commands = [
        command("import sys; sys.exit(2)"),
        noting(starts, "f.close(); sys.exit(3) if n < 4 else sys.stdin.read()"),
    ]
    running = asyncio.create_task(run_processes(commands, rule(all_or_none=False), stop))
    await until_started(starts, 4)
    assert not running.done()
    stop.set()
    assert await asyncio.wait_for(running, SECONDS) == 2


async def test_descriptors_are_inherited() -> None:
    reading, writing = os.pipe()
    try:
        told = command(f"import os; os.write({writing}, b'here'); raise SystemExit(2)", writing)
        assert await asyncio.wait_for(run_processes([told], rule(), asyncio.Event()), SECONDS) == 2
        assert os.read(reading, 10) == b"here"
    finally:
        os.close(reading)
        os.close(writing)
