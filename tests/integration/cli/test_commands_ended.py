"""Commands that are told to end, or fail, in the middle: they end at once and leave nothing half done."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from blake3 import blake3

from services.config import Settings
from tests.integration.processes import COMMAND, command_environment, output_of, serving

pytestmark = pytest.mark.processes

SECONDS = 60

_PULL = """
import asyncio, importlib, sys
from services.cli import main

module = importlib.import_module("artifact_store.transfers.pull")

async def stand_still(registry, folder, file, told, *, replace):
    with folder.new_file(file.relative_path) as landing:
        landing.write(b"half")
        print("writing", flush=True)
        await asyncio.Event().wait()

module._together = lambda *given: None
module._fetch = stand_still
main(["pull", *sys.argv[1:]])
"""

_IN_THE_BACKGROUND = ("sh", "-c", 'trap "" INT; exec "$@"', "sh")
"""A command behind this ignores SIGINT, as one does that a script started with `&`."""


def pushed(settings: Settings, folder: Path, *more: str) -> str:
    """The id of a package of one file."""
    folder.mkdir()
    (folder / "a").write_bytes(b"whole")
    about = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch", "--json")
    return str(json.loads(output_of(settings, "push", folder, *about, *more))["package_id"])


@contextmanager
def running(
    settings: Settings, folder: Path, *command: str, stdin: int | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """A command whose outputs are pipes; killed at the end of the block, if need be."""
    environment = command_environment(settings, None, folder)
    with subprocess.Popen(
        command, stdin=stdin, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    ("before", "number"),
    [((), signal.SIGTERM), ((), signal.SIGINT), (_IN_THE_BACKGROUND, signal.SIGTERM)],
    ids=["SIGTERM", "SIGINT", "SIGTERM-in-the-background"],
)
def test_a_pull_removes_what_is_not_whole(
    embedded_settings: Settings, tmp_path: Path, before: tuple[str, ...], number: signal.Signals
) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree")
    out = tmp_path / "out"
    with running(embedded_settings, tmp_path, *before, sys.executable, "-c", _PULL, package_id, str(out)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"writing\n"
        assert [path.name.endswith(".part") for path in out.iterdir()] == [True]
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 1
    assert b"interrupted" in said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_following_says_where_to_go_on(embedded_settings: Settings, tmp_path: Path, number: signal.Signals) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree")
    with running(embedded_settings, tmp_path, *COMMAND, "tail", "--follow") as process:
        assert process.stdout is not None
        events = [process.stdout.readline().decode() for _ in range(3)]
        assert all(package_id in event for event in events)
        process.send_signal(number)
        _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 0
    _, _, position = said.decode().strip().partition("to continue from here: --since ")
    assert output_of(embedded_settings, "tail", "--since", position) == b""


def test_an_addition_that_is_interrupted_waits_for_no_more_input(embedded_settings: Settings, tmp_path: Path) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree", "--no-finalize")
    adding = (*COMMAND, "add", package_id, "-", "--path", "b")
    with running(embedded_settings, tmp_path, *adding, stdin=subprocess.PIPE) as process:
        assert process.stdin is not None
        process.stdin.write(bytes(300_000))  # more than a pipe holds: it is being read
        process.stdin.flush()
        process.send_signal(signal.SIGINT)
        assert process.wait(SECONDS) == 1, "standard input stays open all the time"
        assert process.stderr is not None
        assert b"interrupted" in process.stderr.read()


def test_an_addition_that_is_refused_says_why_and_no_more(embedded_settings: Settings, tmp_path: Path) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree", "--no-finalize")
    adding = (*COMMAND, "add", package_id, "-", "--path", "a", "--json")
    with running(embedded_settings, tmp_path, *adding, stdin=subprocess.PIPE) as process:
        _, said = process.communicate(bytes(8 << 20), timeout=SECONDS)
    assert process.returncode == 1
    assert json.loads(said)["status"] == 409


@pytest.mark.parametrize("server", [False, True], ids=["embedded", "gateway"])
def test_a_pipe_is_added_up_to_its_end(embedded_settings: Settings, tmp_path: Path, server: bool) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree", "--no-finalize")
    pipe, link = tmp_path / "pipe", tmp_path / "link"
    os.mkfifo(pipe)
    link.symlink_to(tmp_path / "tree" / "a")
    with ExitStack() as stack:
        url = stack.enter_context(serving(embedded_settings, tmp_path)).endpoint if server else None
        environment = command_environment(None if server else embedded_settings, url, tmp_path / "home")
        process = stack.enter_context(
            subprocess.Popen(
                (*COMMAND, "add", package_id, str(pipe), "--path", "b", "--json"),
                env=environment,
                stdout=subprocess.PIPE,
            )
        )
        pipe.write_bytes(b"precious bytes")
        said, _ = process.communicate(timeout=SECONDS)
        assert json.loads(said)["size_bytes"] == len(b"precious bytes")
        run = subprocess.run(
            (*COMMAND, "add", package_id, str(link), "--json"), env=environment, capture_output=True, check=True
        )
        assert json.loads(run.stdout)["content_address"] == f"blake3:{blake3(link.read_bytes()).hexdigest()}"


def test_an_addition_takes_what_comes_bit_by_bit(embedded_settings: Settings, tmp_path: Path) -> None:
    package_id = pushed(embedded_settings, tmp_path / "tree", "--no-finalize")
    reading, writing = os.pipe()
    pieces = [bytes([n]) * 70_000 for n in range(20)]
    adding = (*COMMAND, "add", package_id, "-", "--path", "b", "--json")
    with running(embedded_settings, tmp_path, *adding, stdin=reading) as process:
        os.close(reading)
        for piece in pieces:
            os.write(writing, piece)
        os.close(writing)
        said, _ = process.communicate(timeout=SECONDS)
    assert json.loads(said)["size_bytes"] == sum(map(len, pieces))
    assert json.loads(said)["content_address"] == f"blake3:{blake3(b''.join(pieces)).hexdigest()}"
