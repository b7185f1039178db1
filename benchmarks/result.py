"""What a benchmark found: its two medians, their ratio, every run, and where it was measured."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from tests.services.shared import STORES, Store


@dataclass(frozen=True, slots=True)
class Run:
    """One round: ours and the baseline, one right after the other, in the benchmark's unit."""

    ours: float
    baseline: float


@dataclass(frozen=True, slots=True)
class Result:
    """`target` is the ratio to reach: at least, or at most when `lower_is_better`."""

    name: str
    unit: str
    target: float
    lower_is_better: bool
    runs: Sequence[Run]
    environment: Mapping[str, Any]
    details: Mapping[str, Any] = field(default_factory=dict)
    store: Store = STORES[0]

    @property
    def ours(self) -> float:
        """The median of our runs."""
        return median(run.ours for run in self.runs)

    @property
    def baseline(self) -> float:
        """The median of the baseline's runs."""
        return median(run.baseline for run in self.runs)

    @property
    def ratio(self) -> float:
        """Ours to the baseline."""
        return self.ours / self.baseline

    @property
    def reached(self) -> bool:
        """Whether the ratio is what it should be."""
        return self.ratio <= self.target if self.lower_is_better else self.ratio >= self.target

    def write(self, folder: Path) -> Path:
        """Write `NAME.json`, or `NAME-STORE.json` on another store than the usual one; makes the folder if need be."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / ("-".join([self.name, *self._other_store]) + ".json")
        found = {**asdict(self), "ours": self.ours, "baseline": self.baseline, "ratio": self.ratio}
        path.write_text(json.dumps({**found, "reached": self.reached}, indent=1) + "\n", encoding="utf-8")
        return path

    @property
    def label(self) -> str:
        """The name for readers."""
        return " on ".join([self.name, *self._other_store])

    @property
    def _other_store(self) -> list[str]:
        return [] if self.store == STORES[0] else [self.store]


def table(results: Sequence[Result]) -> str:
    """The results as a Markdown table."""
    rows = [
        f"| {r.label} | {_figure(r.ours)} | {_figure(r.baseline)} | {r.unit} | **{r.ratio:.2f}** | "
        f"{_spread(r)} | {'≤' if r.lower_is_better else '≥'} {r.target:g} | {'yes' if r.reached else 'no'} |"
        for r in results
    ]
    head = "| benchmark | ours | baseline | unit | ratio | ratios of the runs | target | reached |"
    return "\n".join([head, "| --- | --- | --- | --- | --- | --- | --- | --- |", *rows])


def _spread(result: Result) -> str:
    ratios = [run.ours / run.baseline for run in result.runs]
    return f"{min(ratios):.2f} to {max(ratios):.2f}"


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
