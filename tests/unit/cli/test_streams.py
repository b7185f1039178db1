"""Commands without standard input, output or error, as some schedulers start them, and as `2>&-` does."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.usefixtures("elsewhere"), pytest.mark.processes]

NEW = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")


def run(closed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A command, started by a shell with these redirections; the rest of its standard input is empty."""
    shell = ["sh", "-c", f'exec "$@" {closed}', "sh", sys.executable, "-m", "services.cli", *arguments]
    return subprocess.run(shell, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-"])
def test_a_command_does_its_work_without_a_standard_stream(closed: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("some bytes")
    pushed = run(closed, "push", "file", *NEW, "--json")
    assert (pushed.returncode, pushed.stderr) == (0, "")
    if ">&-" not in closed.split():
        assert json.loads(pushed.stdout)["files"] == 1
    listed = run(closed, "packages")
    assert (listed.returncode, listed.stderr) == (0, "")
    verified = run(closed, "verify", "--json")
    assert (verified.returncode, verified.stderr) == (0, "")
    if ">&-" not in closed.split():
        assert json.loads(verified.stdout)["violations"] == []


def test_standard_input_that_is_closed_is_no_file_without_bytes(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("some bytes")
    package = json.loads(run("", "push", "file", *NEW, "--no-finalize", "--json").stdout)["package_id"]
    added = run("<&-", "add", package, "-", "--path", "empty")
    assert added.returncode == 1
    assert added.stderr.startswith("error: ")
    assert json.loads(run("", "show", package, "--json").stdout)["last_event_sequence"] == 2


def test_without_standard_error_a_command_that_fails_says_so_by_its_exit_code() -> None:
    wrong = run("2>&-", "packages", "--log-url", "ftp://x")
    assert (wrong.returncode, wrong.stdout) == (2, "")
