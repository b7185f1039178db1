"""The chart's README is the output of `make docs`, and describes each value."""

from __future__ import annotations

import yaml

from tests.chart.helm import CHART
from tests.chart.readme import README, render, sections


def test_the_readme_is_current() -> None:
    assert README.read_text(encoding="utf-8") == render(), "run `make docs`"


def test_every_value_is_in_the_readme_and_explained() -> None:
    defaults = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    wanted = {name for key, value in defaults.items() for name in _names(key, value)}
    found = {value.name: value.text for section in sections() for value in section.values}
    assert found.keys() == wanted
    assert [name for name, text in found.items() if not text] == []


def _names(key: str, value: object) -> list[str]:
    return [f"{key}.{inner}" for inner in value] if isinstance(value, dict) and value else [key]
