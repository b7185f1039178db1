"""Metrics of commands that run to their end, in a file for the textfile collector."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from services.runtime.metrics import RunMetrics


def shown(file: Path) -> dict[str, float]:
    """The values of the file, by the rest of their names."""
    families = text_string_to_metric_families(file.read_text(encoding="utf-8"))
    samples = [sample for family in families for sample in family.samples]
    assert {sample.labels["run"] for sample in samples} == {"verify"}
    return {sample.name.removeprefix("artifact_store_run_"): sample.value for sample in samples}


def test_a_run_shows_that_it_goes_on_and_then_that_it_succeeded(tmp_path: Path) -> None:
    file = tmp_path / "verify.prom"
    with RunMetrics(file, "verify") as metrics:
        assert (shown(file)["active"], shown(file)["last_success_seconds"]) == (1, 0)
        metrics._written = 0  # as if the last write were long ago
        metrics.progress(1, 4)
        assert shown(file)["progress_ratio"] == 0.25
    found = shown(file)
    assert (found["active"], found["progress_ratio"], found["problems"]) == (0, 1, 0)
    assert found["last_success_seconds"] >= found["begin_seconds"] > 0
    assert stat.S_IMODE(file.stat().st_mode) == 0o644  # the node exporter is another user
    assert list(tmp_path.iterdir()) == [file]


def test_a_run_with_problems_keeps_when_the_last_one_succeeded(tmp_path: Path) -> None:
    file = tmp_path / "verify.prom"
    with RunMetrics(file, "verify"):
        pass
    good = shown(file)["last_success_seconds"]
    with RunMetrics(file, "verify") as metrics:
        metrics.found(3)
    assert (shown(file)["problems"], shown(file)["last_success_seconds"]) == (3, good)
    with pytest.raises(ValueError, match="a mistake"), RunMetrics(file, "verify"):
        raise ValueError("a mistake")
    assert (shown(file)["problems"], shown(file)["last_success_seconds"]) == (1, good)


def test_a_file_that_cannot_be_written_ends_the_command_before_it_begins(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), RunMetrics(tmp_path / "nowhere" / "verify.prom", "verify"):
        pytest.fail("it ran")


def test_without_a_file_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with RunMetrics(None, "verify") as metrics:
        metrics.progress(1, 2)
    assert list(tmp_path.iterdir()) == []
