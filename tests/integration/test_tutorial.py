"""The tutorial for projections works: its code is a projection, and its commands build the view."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from click.testing import CliRunner

from services.cli import main
from services.config import Settings
from services.views.projections import PROJECTIONS
from services.views.tables import metadata
from tests.documents import blocks

BLOCKS = blocks("docs/write-a-projection.md")


@pytest.fixture
def tutorial(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """The page's Python, run as a module of its own; the projection is known for as long as the test runs."""
    module = ModuleType("sizes")
    monkeypatch.setitem(sys.modules, "sizes", module)
    before = dict(PROJECTIONS)
    names: dict[str, Any] = module.__dict__
    names["PROJECTIONS"] = PROJECTIONS
    for block in ("projection", "register", "try"):
        exec(compile(BLOCKS[block], f"write-a-projection.md: {block}", "exec"), names)  # noqa: S102 - it is our own page
    yield names
    metadata.remove(names["package_sizes"])
    del PROJECTIONS["sizes"]  # type: ignore[attr-defined]  # a mapping for everybody else
    assert dict(PROJECTIONS) == before


def test_the_projection_gives_the_same_digest_for_any_batches(tutorial: dict[str, Any], tmp_path: Path) -> None:
    asyncio.run(tutorial["sizes_do_not_depend_on_batches"](tmp_path))


def test_the_commands_build_the_view(
    tutorial: dict[str, Any], embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("log_url", "blobs_url", "views_url", "state_dir"):
        monkeypatch.setenv(f"ARTIFACT_STORE_{name.upper()}", str(getattr(embedded_settings, name)))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state home"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tree").mkdir()
    for name, size in (("a", 3), ("b", 5)):
        (tmp_path / "tree" / name).write_bytes(bytes(size))

    def run(line: str) -> Any:
        done = CliRunner().invoke(main, [*line.split()[1:], "--json"])
        assert done.exit_code == 0, done.output
        return [json.loads(text) for text in done.stdout.splitlines()][-1]

    run("artifact-store push tree --name n --producer p --subject s --retention-class report")
    lines = [line.partition("#")[0] for line in BLOCKS["commands"].splitlines()]
    migrated, replayed, digest, status, verified = (run(line) for line in lines)
    assert "sizes" in migrated["projections"]
    assert (replayed["events"], replayed["rows"], replayed["digest"]) == (4, 1, digest["digest"])
    assert {"sizes": 0}.items() <= {p["projection"]: p["behind"] for p in status["projections"]}.items()
    assert verified["violation_count"] == 0
    assert verified["views"]["sizes"] == digest["digest"]
