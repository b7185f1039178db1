"""Foreign names cannot control a terminal: control and bidirectional characters are shown by their codes."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

from services.cli.command import visible
from tests.unit.cli.conftest import Run

HOSTILE = "\u202egpj.exe\u2066\u009b31m"
SHOWN = "\\u202egpj.exe\\u2066\\u009b31m"
ABOUT = ("--producer", "p", "--subject", "s", "--retention-class", "scratch")


@pytest.fixture
def package(run: Run, tmp_path: Path) -> str:
    """A package whose metadata and path hold what would turn a line round, and a sequence that a terminal obeys."""
    folder = tmp_path / "tree"
    folder.mkdir()
    (folder / "a\u202egpj.exe").write_bytes(b"x")
    pushed = run("push", folder, "--name", "n\u202en", *ABOUT, "--metadata", f"k={HOSTILE}", "--json")
    found: str = json.loads(pushed.stdout)["package_id"]
    return found


def test_results_show_what_a_terminal_would_obey(run: Run, package: str) -> None:
    for command in (("packages",), ("show", package), ("tail",)):
        shown = run(*command).output
        assert not {*shown} & {*HOSTILE} - {*"gpj.exe31m"}, command
        assert "\\u202e" in shown
    assert SHOWN in run("show", package).stdout


def test_json_has_the_same_values_by_their_escapes(run: Run, package: str) -> None:
    for command in (("packages", "--json"), ("show", package, "--json"), ("tail", "--json")):
        shown = run(*command).stdout
        assert shown.isascii()
        assert "n\u202en" in {json.loads(line).get("name", "n\u202en") for line in shown.splitlines()}
    assert json.loads(run("show", package, "--json").stdout)["metadata"] == {"k": HOSTILE}


def test_errors_show_it_too(run: Run) -> None:
    for more in ((), ("--json",)):
        refused = run("push", f"no-{HOSTILE}", "--name", "n", *ABOUT, *more, code=1)
        assert "\\u202e" in refused.stderr
        assert refused.stderr.isascii()


def test_log_lines_show_it_too() -> None:
    line = f"1\n2{HOSTILE}"
    code = (
        "from services.cli.run import begin_to_run; from services.config import Settings; import logging; "
        f"begin_to_run(Settings()); logging.warning({line!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert f"1\\n2{SHOWN}\n" in done.stderr


@pytest.mark.parametrize("level", ["info", "error"])
def test_log_lines_are_json_in_utc_from_the_level_on_that_is_set(level: str) -> None:
    code = (
        "from services.cli.run import begin_to_run; from services.config import Settings; import logging; "
        f"begin_to_run(Settings(log_format='json', log_level={level!r})); logging.info('fine'); "
        f"logging.getLogger('a.b').error({f'bad{HOSTILE}'!r})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "TZ": "Asia/Tokyo"},
    )
    before = datetime.now(UTC)
    lines = [json.loads(line) for line in done.stderr.splitlines()]
    assert [line["message"] for line in lines] == [*(["fine"] if level == "info" else []), f"bad{HOSTILE}"]
    assert (lines[-1]["level"], lines[-1]["logger"]) == ("ERROR", "a.b")
    assert abs(datetime.fromisoformat(lines[-1]["time"]) - before) < timedelta(minutes=5)


def test_lines_and_tabs_stay() -> None:
    assert visible("a\tb\nc é 漢\x1b[2J\x7f") == "a\tb\nc é 漢\\u001b[2J\\u007f"


def test_a_manifest_is_exact_in_a_file_and_never_raw_on_a_terminal(run: Run, package: str) -> None:
    assert "a\u202egpj.exe" in run("manifest", package, "--format", "json").stdout
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", "services.cli", "manifest", package, "--format"]
    with os.fdopen(ours, "rb", buffering=0) as terminal:
        subprocess.run([*command, "json"], stdout=theirs, check=True)
        shown = terminal.read(1 << 16)
        refused = subprocess.run([*command, "cbor"], stdout=theirs, stderr=subprocess.PIPE, text=True, check=False)
    assert b"\\u202e" in shown
    assert "\u202e".encode() not in shown
    assert (refused.returncode, "--format json" in refused.stderr) == (2, True)
