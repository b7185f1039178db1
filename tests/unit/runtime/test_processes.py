"""Watched processes: told to end, restarted when they die, and given up by the rule."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from uuid import uuid4

import psutil
import pytest

from artifact_store.errors import ConfigurationError
from artifact_store.position import Position
from ingest_gateway import siblings as gateway_processes
from projector import runner as projector_processes
from projector.loading import load_in_processes
from services.config import Settings
from services.runtime.processes import Command, RestartRule, run_processes
from services.views.engine.checkpoints import Checkpoint
from tests.integration.conditions import until

pytestmark = pytest.mark.processes

WAIT = "import sys; sys.stdin.read()"
"""Runs until it is told to end, or whoever started it is gone."""

SECONDS = 30.0

TOLD_AGAIN = """
import asyncio, os, signal, sys
from ingest_gateway.server import stopped_by_signals

def tell():
    for number in (signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)

async def told(watched):
    with stopped_by_signals(watched=watched) as stop:
        tell()
        await stop.wait()
        tell()
        await asyncio.sleep(0)
        print("drained", flush=True)
    tell()

asyncio.Runner(loop_factory={factory}).run(told(watched={watched}))
tell()
print("ended")
"""


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


def runs(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


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


@pytest.mark.parametrize("final", [{2}, {1, 2}])
async def test_one_that_cannot_be_started_now_is_one_that_died(tmp_path: Path, final: set[int]) -> None:
    """As when the system has no more processes or memory."""
    stop, starts, program = asyncio.Event(), tmp_path / "starts", tmp_path / "program"
    program.symlink_to(sys.executable)
    dying = noting(starts, f"f.close(); os.remove({str(program)!r}) if n < 2 else sys.stdin.read()")
    begun = Command([str(program), "-c", "import os; " + dying.arguments[2]], dying.environment)
    running = asyncio.create_task(run_processes([begun], rule(final=frozenset(final), longest_pause=0.05), stop))
    await until_started(starts, 1)

    async def gone() -> bool:
        return not program.exists()

    await until(gone, SECONDS, "the program did not go")
    program.symlink_to(sys.executable)
    await until_started(starts, 2)
    stop.set()
    assert await asyncio.wait_for(running, SECONDS) == 0


async def test_one_that_can_never_be_started_ends_all(tmp_path: Path) -> None:
    commands = [command(WAIT), Command([str(tmp_path / "nothing")], dict(os.environ))]
    assert await asyncio.wait_for(run_processes(commands, rule(most_deaths=3), asyncio.Event()), SECONDS) == 1


async def test_descriptors_are_inherited() -> None:
    reading, writing = os.pipe()
    try:
        told = command(f"import os; os.write({writing}, b'here'); raise SystemExit(2)", writing)
        assert await asyncio.wait_for(run_processes([told], rule(), asyncio.Event()), SECONDS) == 2
        assert os.read(reading, 10) == b"here"
    finally:
        os.close(reading)
        os.close(writing)


async def test_one_that_ends_while_it_is_told_to_has_ended_well() -> None:
    reading, writing = os.pipe()
    stop, count, others = asyncio.Event(), 8, set(psutil.Process().children())
    leaving = [command(f"import os; os.read({reading}, 1)", reading) for _ in range(count)]

    def all_leave() -> None:
        """Nothing of this process runs meanwhile, so that it tells them before it notices."""
        children = set(psutil.Process().children()) - others
        assert len(children) == count
        os.close(writing)
        ends = time.monotonic() + SECONDS
        while any(map(runs, children)):
            assert time.monotonic() < ends

    running = asyncio.create_task(run_processes(leaving, rule(), stop, when_ending=all_leave))
    try:

        async def started() -> bool:
            return len(set(psutil.Process().children()) - others) == count

        await until(started, SECONDS, "the processes did not start")
        stop.set()
        assert await asyncio.wait_for(running, SECONDS) == 0
    finally:
        os.close(reading)
        running.cancel()
        await asyncio.wait([running])


@pytest.mark.parametrize("factory", ["None", "__import__('uvloop').new_event_loop"])
def test_one_that_is_watched_over_may_be_told_any_number_of_times(factory: str) -> None:
    def run(watched: bool) -> tuple[int, bytes]:
        code = TOLD_AGAIN.format(factory=factory, watched=watched)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=SECONDS, check=False)
        return done.returncode, done.stdout

    assert run(watched=True) == (0, b"drained\nended\n")
    assert run(watched=False) == (-signal.SIGTERM, b"")


async def test_one_whose_parent_is_gone_ends_and_at_once_where_it_was_told_already() -> None:
    code = """
import asyncio, os
from services.runtime.processes import end_with_parent

async def until_told(told):
    stop = asyncio.Event()
    if told:
        stop.set()
    end_with_parent(stop)
    await (asyncio.Event() if told else stop).wait()

asyncio.run(until_told({told}))
"""
    for told, expected in ((False, 0), (True, -signal.SIGKILL)):
        arguments = [sys.executable, "-c", code.format(told=told)]
        done = await asyncio.to_thread(
            subprocess.run, arguments, stdin=subprocess.DEVNULL, timeout=SECONDS, check=False
        )
        assert done.returncode == expected


@pytest.fixture
def foreign_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The current folder holds modules of names that processes of ours import."""
    for name in ("asyncio", "click"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit(3)")
    monkeypatch.chdir(tmp_path)


WRONG = Settings(log_url="ftp://nowhere", listen="0.0.0.0:1", views_url="nowhere")
"""What a process of ours refuses as soon as it runs."""


@pytest.mark.usefixtures("foreign_folder")
async def test_processes_of_a_gateway_run_no_code_of_the_current_folder() -> None:
    with socket.socket() as listener:
        ending = gateway_processes.run_processes(WRONG, "gateway", 2, listener, asyncio.Event())
        assert await asyncio.wait_for(ending, SECONDS) == 2


@pytest.mark.usefixtures("foreign_folder")
async def test_processes_of_a_projector_run_no_code_of_the_current_folder() -> None:
    ending = projector_processes.run_processes(WRONG, ["registry"], 2, asyncio.Event())
    assert await asyncio.wait_for(ending, SECONDS) == 2


@pytest.mark.usefixtures("foreign_folder")
async def test_processes_of_a_replay_run_no_code_of_the_current_folder() -> None:
    since = Checkpoint(uuid4(), Position(uuid4(), {}))
    loading = load_in_processes(
        *(WRONG, "registry", since, {0: 1}), processes=1, max_rate=None, max_parked=0, told=lambda *_: None
    )
    with pytest.raises(ConfigurationError):
        await asyncio.wait_for(loading, SECONDS)
