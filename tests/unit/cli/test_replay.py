"""`replay` on the command line: comparing, what is kept after a difference, and how a left-over build is shown."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from services.views.projections import PROJECTIONS
from tests.unit.cli.conftest import Run


@pytest.fixture
def run(run: Run, tmp_path: Path) -> Run:
    """Runs a command on parts of the test's own, which hold a package."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / "a").write_bytes(b"a")
    run("push", "tree", "--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
    return run


@pytest.mark.parametrize("name", PROJECTIONS)
def test_a_comparison_of_equal_views_says_so(run: Run, name: str) -> None:
    before = json.loads(run("digest", name, "--json").stdout)
    done = run("replay", name, "--verify", "--json")
    replayed = json.loads(done.stdout)
    assert replayed["same_as_before"] is True
    assert replayed["digest"] == before["digest"]
    phases = [line.partition(":")[0] for line in done.stderr.splitlines()]
    assert phases == ["load", "index", "compare", "switch", "digest"]
    assert run("replay", name, "--quiet", "--json").stderr == ""


def test_a_difference_is_exit_code_1_and_shown_until_somebody_decides(run: Run, tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "views.db")) as connection, connection:
        connection.execute("UPDATE artifact_packages SET name = 'tampered'")
    wrong = json.loads(run("digest", "registry", "--json").stdout)
    assert "building" not in wrong
    refused = run("replay", "registry", "--verify", "--quiet", "--json", code=1)
    problem = json.loads(refused.stderr)
    assert problem["type"].endswith(":digest-mismatch")
    assert wrong["digest"] in problem["detail"]
    kept = json.loads(run("digest", "registry", "--json").stdout)
    assert (kept["digest"], kept["building"]) == (wrong["digest"], wrong["position"])
    shown = json.loads(run("status", "--json").stdout)["projections"]
    assert [(p["projection"], p["building"] and p["building"]["behind"]) for p in shown] == [
        (name, 0 if name == "registry" else None) for name in PROJECTIONS
    ]
    assert "registry: a replay by process" in run("status").stdout
    assert "ended early" in run("doctor", code=1).stdout
    assert json.loads(run("replay", "registry", "--drop", "--json").stdout) == {
        "projection": "registry",
        "dropped": True,
    }
    assert "there was no build" in run("replay", "registry", "--drop").stdout
    forced = json.loads(run("replay", "registry", "--verify", "--even-if-different", "--json").stdout)
    assert forced["same_as_before"] is False
    assert forced["digest"] != wrong["digest"]
    assert "same_as_before" not in json.loads(run("replay", "registry", "--json").stdout)


@pytest.mark.parametrize(
    "options",
    [
        ["--in-place", "--verify"],
        ["--in-place", "--drop"],
        ["--in-place", "--max-rate", "5"],
        ["--drop", "--restart"],
        ["--drop", "--max-parked", "0"],
        ["--even-if-different"],
        ["--max-rate", "0"],
        ["--processes", "0"],
    ],
)
def test_options_that_do_not_fit_each_other_are_wrong_usage(run: Run, options: list[str]) -> None:
    done = run("replay", "registry", *options, code=2)
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
