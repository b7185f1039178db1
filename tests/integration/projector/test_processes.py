"""`projector --processes` when it is told to end, and when nothing can be projected."""

from __future__ import annotations

import os
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from uuid import UUID

import psutil
import pytest

from services.config import Settings
from tests.integration.processes import output_of, run_command, started
from tests.services.process import becomes_true

pytestmark = pytest.mark.processes

SECONDS = 60.0


def test_told_to_end_all_processes_end_and_the_command_succeeds(embedded_settings: Settings, tmp_path: Path) -> None:
    output_of(embedded_settings, "migrate")
    with started(embedded_settings, tmp_path, "projector", "registry", "--processes", "3") as (command, said):
        assert becomes_true(lambda: "assigned partitions" in said.read_text(), SECONDS)
        children = psutil.Process(command.pid).children()
        assert len(children) == 3
        command.send_signal(signal.SIGTERM)
        assert command.wait(SECONDS) == 0
    assert not any(child.is_running() for child in children)
    assert "Traceback" not in said.read_text()


def test_a_process_that_dies_is_started_again(embedded_settings: Settings, tmp_path: Path) -> None:
    output_of(embedded_settings, "migrate")
    with started(embedded_settings, tmp_path, "projector", "registry", "--processes", "2") as (command, _):
        parent = psutil.Process(command.pid)
        assert becomes_true(lambda: len(parent.children()) == 2, SECONDS)
        before = {child.pid for child in parent.children()}
        os.kill(min(before), signal.SIGKILL)
        assert becomes_true(lambda: len({child.pid for child in parent.children()} - before) == 1, SECONDS)
        command.send_signal(signal.SIGINT)
        assert command.wait(SECONDS) == 0


def test_what_no_process_can_do_ends_the_command_with_the_reason(embedded_settings: Settings, tmp_path: Path) -> None:
    output_of(embedded_settings, "migrate")
    with closing(sqlite3.connect(tmp_path / "views.db")) as views:
        views.execute("update projection_generations set log = ?", (UUID(int=7).hex,))
        views.commit()
    done = run_command(embedded_settings, "projector", "registry", "--processes", "2", seconds=SECONDS)
    assert done.returncode == 1
    assert b"artifact-store replay registry" in done.stderr
