"""`python -m tests.chart.readme`: the chart's README, made from Chart.yaml and the comments of values.yaml."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import yaml

from tests.chart.helm import CHART

README = CHART / "README.md"

_HEAD = """# {name}

{description}. [The guide](../../docs/operating.md#kubernetes) tells how to build the image, which
Secrets must be there first, and how to install, upgrade and scale.

```sh
helm --namespace store install artifact-store helm/artifact-store --values values.yaml
```

Version {version} of the chart installs release {appVersion}. Kubernetes must be {kubeVersion}. This page is made from
[values.yaml](values.yaml) by `make docs`.

{preface}
"""


@dataclass(frozen=True, slots=True)
class Value:
    """One value of the chart: its dotted name, its default as JSON, and what the comments beside it say."""

    name: str
    default: str
    text: str


@dataclass(frozen=True, slots=True)
class Section:
    """A top-level value and those within it. One that holds no map has itself as its only value."""

    name: str
    text: str
    values: tuple[Value, ...]


def sections() -> Iterator[Section]:
    """The chart's values as values.yaml has them, in its order."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    lines, defaults = text.splitlines(), yaml.safe_load(text)
    whole = yaml.compose(text, Loader=yaml.SafeLoader)
    assert whole is not None
    for key, node in whole.value:
        name, default = key.value, defaults[key.value]
        if isinstance(node, yaml.MappingNode) and not node.flow_style and default:
            inner = [_value(f"{name}.{k.value}", k, v, default[k.value], lines) for k, v in node.value]
            yield Section(name, _comment(key, key, lines), tuple(inner))
        else:
            own = _value(name, key, node, default, lines)
            yield Section(name, "", (own,))


def render() -> str:
    """The whole README."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    values = (CHART / "values.yaml").read_text(encoding="utf-8")
    parts = [_HEAD.format(**chart, preface=values.partition("\n\n")[0].removeprefix("# "))]
    for section in sections():
        heading = f"## {section.name}\n\n" + (f"{section.text}\n\n" if section.text else "")
        rows = "".join(f"| `{v.name}` | `{_cell(v.default)}` | {_cell(v.text)} |\n" for v in section.values)
        parts.append(f"{heading}| value | default | what it is |\n| --- | --- | --- |\n{rows}")
    return "\n".join(parts)


def _value(name: str, key: yaml.Node, node: yaml.Node, default: Any, lines: list[str]) -> Value:
    return Value(name, json.dumps(default), _comment(key, node, lines))


def _comment(key: yaml.Node, node: yaml.Node, lines: list[str]) -> str:
    """The comment lines that stand before a key, and the comment on the line on which its value begins."""
    first = key.start_mark.line
    found: list[str] = []
    while lines[first - 1].lstrip().startswith("#"):
        first -= 1
        found.insert(0, lines[first].lstrip(" #"))
    if beside := re.search(r"\s# (.*)$", lines[node.start_mark.line][key.start_mark.column :]):
        found.append(beside[1])
    return " ".join(found)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(render())
