"""The benchmarks' harness: both ways in turn, the first round not counted, medians, and the written results."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from benchmarks.harness import Plan, measure
from benchmarks.result import Result, Run, table
from services.config import Settings


class Scripted:
    """Takes a known time each round; the first is the one that must not count."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self._ours = iter([99.0, 3.0, 1.0, 2.0])
        self._baseline = iter([99.0, 6.0, 4.0, 8.0])

    async def ours(self) -> float:
        self.called.append("ours")
        return next(self._ours)

    async def baseline(self) -> float:
        self.called.append("baseline")
        return next(self._baseline)

    def details(self) -> Mapping[str, Any]:
        return {"amount": 7}


async def measured() -> tuple[Result, Scripted, list[str]]:
    """Three rounds."""
    scripted, notes = Scripted(), list[str]()

    @asynccontextmanager
    async def opened(_: Settings) -> AsyncIterator[Scripted]:
        yield scripted

    plan = Plan("scripted", "ms", 0.5, opened, lower_is_better=True, rounds=3)
    return await measure(plan, Settings(), notes.append), scripted, notes


@pytest.mark.slow
async def test_the_ratio_is_that_of_the_medians_of_counted_rounds() -> None:
    result, _, notes = await measured()
    assert (result.ours, result.baseline) == (2.0, 6.0)
    assert result.ratio == pytest.approx(1 / 3)
    assert result.runs == [Run(3.0, 6.0), Run(1.0, 4.0), Run(2.0, 8.0)]
    assert len(notes) == 3


@pytest.mark.slow
async def test_both_ways_run_by_turns_and_each_comes_first() -> None:
    _, scripted, _ = await measured()
    assert scripted.called == ["ours", "baseline"] * 2 + ["baseline", "ours", "ours", "baseline"]


@pytest.mark.slow
async def test_what_is_written_holds_figures_runs_and_environment(tmp_path: Path) -> None:
    result, _, _ = await measured()
    path = result.write(tmp_path / "bench")
    assert path.name == "scripted.json"
    found = json.loads(path.read_text())
    assert {name: found[name] for name in ("name", "ours", "baseline", "unit")} == {
        "name": "scripted",
        "ours": 2.0,
        "baseline": 6.0,
        "unit": "ms",
    }
    assert found["ratio"] == pytest.approx(found["ours"] / found["baseline"])
    assert found["runs"][1] == {"ours": 1.0, "baseline": 4.0}
    assert found["details"] == {"amount": 7}
    assert found["environment"]["cores"] >= 1


@pytest.mark.parametrize(("lower_is_better", "reached"), [(True, True), (False, False)])
def test_a_target_is_reached_from_its_own_side(lower_is_better: bool, reached: bool) -> None:
    result = Result("name", "ms", 0.5, lower_is_better, [Run(1.0, 4.0)], {})
    assert result.reached is reached


def test_a_result_on_another_store_lies_beside_that_on_the_usual_one(tmp_path: Path) -> None:
    usual = Result("name", "ms", 0.5, False, [Run(1.0, 4.0)], {})
    other = Result("name", "ms", 0.5, False, [Run(1.0, 4.0)], {}, store="seaweedfs")
    assert [result.write(tmp_path).name for result in (usual, other)] == ["name.json", "name-seaweedfs.json"]
    assert "| name on seaweedfs |" in table([other])


@pytest.mark.slow
async def test_a_store_may_have_a_target_of_its_own() -> None:
    @asynccontextmanager
    async def opened(_: Settings) -> AsyncIterator[Scripted]:
        yield Scripted()

    plan = Plan("scripted", "ms", 0.5, opened, rounds=1, targets={"seaweedfs": 0.25})
    assert (await measure(plan, Settings(), print)).target == 0.5
    assert (await measure(plan, Settings(), print, "seaweedfs")).target == 0.25


def test_the_table_has_a_row_for_every_result() -> None:
    slow = Result("slow", "ms p50", 3.0, True, [Run(4.25, 2.5), Run(5.0, 2.5)], {})
    fast = Result("fast", "events/s", 0.25, False, [Run(20_000.0, 60_000.0)], {})
    _, _, *rows = table([slow, fast]).splitlines()
    assert rows == [
        "| slow | 4.62 | 2.5 | ms p50 | **1.85** | 1.70 to 2.00 | ≤ 3 | yes |",
        "| fast | 20,000 | 60,000 | events/s | **0.33** | 0.33 to 0.33 | ≥ 0.25 | yes |",
    ]
