"""What `doctor` finds where an address says more than where something is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from services.cli import main


def test_the_views_are_found_whatever_their_url_says_behind_the_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert CliRunner().invoke(main, ["migrate"]).exit_code == 0
    done = CliRunner().invoke(main, ["doctor", "--views-url", "sqlite+aiosqlite:///./var/views.db?timeout=5", "--json"])
    causes = {finding["part"]: finding["cause"] for finding in json.loads(done.stdout)["findings"]}
    assert causes["views"] == "sqlite"
