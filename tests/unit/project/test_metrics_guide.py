"""Every metric stands in the operating guide, under the name that Prometheus shows."""

from __future__ import annotations

import re
from pathlib import Path

_PROJECT = Path(__file__).parents[3]


def test_the_guide_names_every_metric() -> None:
    folders = [_PROJECT / name for name in ("ingest_gateway", "projector", "services")]
    source = "\n".join(path.read_text(encoding="utf-8") for folder in folders for path in folder.rglob("*.py"))
    names = set(re.findall(r'"(artifact_store_\w+)"', source))
    counters = set(re.findall(r'Counter(?:MetricFamily)?\(\s*"(artifact_store_\w+)"', source))
    assert counters < names
    shown = {f"{name}_total" if name in counters else name for name in names}
    guide = (_PROJECT / "docs" / "operating.md").read_text(encoding="utf-8")
    assert sorted(name for name in shown if f"`{name}`" not in guide) == []
