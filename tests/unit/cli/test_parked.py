"""`artifact-store parked` on the embedded parts: listing, showing, and bringing a package back."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from services.config import Settings
from tests.unit.cli.conftest import Run


@contextmanager
def third_event_is_nonsense(log_url: str) -> Iterator[None]:
    with closing(sqlite3.connect(log_url.removeprefix("sqlite:///"))) as file:
        (value,) = file.execute("SELECT value FROM events WHERE sequence = 3").fetchone()
        with file:
            file.execute("UPDATE events SET value = x'00' WHERE sequence = 3")
        try:
            yield
        finally:
            with file:
                file.execute("UPDATE events SET value = ? WHERE sequence = 3", (value,))


def lines(done: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_a_parked_package_is_listed_shown_and_brought_back(
    run: Run, tmp_path: Path, embedded_settings: Settings
) -> None:
    (tmp_path / "tree").mkdir()
    for name in "abc":
        (tmp_path / "tree" / name).write_text(name)
    about = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
    package_id = json.loads(run("push", tmp_path / "tree", *about, "--json").stdout)["package_id"]
    digest = json.loads(run("digest", "registry", "--json").stdout)["digest"]
    with third_event_is_nonsense(embedded_settings.log_url):
        run("replay", "registry", "--in-place")
        (mark,) = lines(run("parked", "--json"))
        assert (mark["package"], mark["offset"], mark["events"], mark["projection"]) == (package_id, 2, 3, "registry")
        assert lines(run("parked", "list", "registry", "--json")) == [mark]
        assert lines(run("parked", "list", "usage", "--json")) == []
        assert package_id in run("parked").stdout
        status = json.loads(run("status", "--json").stdout)["projections"]
        assert {p["projection"]: p["parked"] for p in status} == {"registry": 1, "retention": 0, "usage": 0}
        shown = json.loads(run("parked", "show", package_id, "--json").stdout)
        assert shown["record"] == {"key": package_id[:32], "bytes": 1, "begins": "00", "type": None, "sequence": None}
        assert json.loads(run("parked", "retry", "--json", code=1).stdout)["parked"] == mark
        kinds = {v["kind"] for v in json.loads(run("verify", "--json", code=1).stdout)["violations"]}
        assert kinds >= {"undecodable", "parked"}
    (done,) = lines(run("parked", "retry", package_id, "--json"))
    assert (done["events"], done["parked"]) == (3, None)
    assert lines(run("parked", "--json")) == []
    assert json.loads(run("digest", "registry", "--json").stdout)["digest"] == digest


@pytest.mark.parametrize("way", [(), ("--in-place",)])
def test_a_replay_parks_no_more_packages_than_it_is_told(
    run: Run, tmp_path: Path, embedded_settings: Settings, way: tuple[str, ...]
) -> None:
    (tmp_path / "tree").mkdir()
    for name in "ab":
        (tmp_path / "tree" / name).write_text(name)
    run("push", tmp_path / "tree", "--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
    with third_event_is_nonsense(embedded_settings.log_url):
        refused = run("replay", "registry", *way, "--max-parked", "0", "--quiet", "--json", code=1)
        assert json.loads(refused.stderr)["type"].endswith(":too-many-parked")
        run("replay", "registry", *way, "--max-parked", "1")
        assert len(lines(run("parked", "list", "registry", "--json"))) == 1


def test_several_processes_that_serve_do_not_take_a_limit(run: Run) -> None:
    assert "projector --max-parked" in run("serve", "--processes", "2", "--max-parked", "0", code=2).stderr


def test_what_is_not_parked_is_not_found(run: Run) -> None:
    run("migrate")
    assert run("parked", "retry").stdout == ""
    assert "is not parked" in run("parked", "show", "x", code=1).stderr
    assert "is not parked" in run("parked", "retry", "x", code=1).stderr
    assert "no projection" in run("parked", "list", "search", code=2).stderr
