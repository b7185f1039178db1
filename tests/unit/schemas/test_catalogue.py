"""The event catalogue in the documents matches the schemas."""

from __future__ import annotations

from pathlib import Path

from schemas.catalogue import catalogue

ROOT = Path(__file__).parents[3]


def test_the_event_catalogue_is_current() -> None:
    assert (ROOT / "docs" / "events.md").read_text(encoding="utf-8") == catalogue(), "run `make docs`"
