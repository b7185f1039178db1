"""The catalogue of metrics in the documents matches the code."""

from __future__ import annotations

from pathlib import Path

from services.runtime.metrics import catalogue

_DOCS = Path(__file__).parents[3] / "docs"


def test_the_catalogue_of_metrics_is_current() -> None:
    assert (_DOCS / "metrics.md").read_text(encoding="utf-8") == catalogue(), "run `make docs`"
