"""The commands that the chart's containers run, which must be exactly the commands that the tests know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from services.views.projections import PROJECTIONS
from tests.chart.helm import DEFAULT, render

# A test that starts the product as several processes takes its commands from here.
GATEWAY = ("artifact-store", "gateway")
MIGRATE = ("artifact-store", "migrate")
PROJECTORS = {name: ("artifact-store", "projector", name, "--metrics-listen", "0.0.0.0:9464") for name in PROJECTIONS}
WEBHOOKS = ("artifact-store", "webhooks")
STARTED = frozenset({GATEWAY, MIGRATE, WEBHOOKS, *PROJECTORS.values()})


def rendered_commands(values: Sequence[Path] = DEFAULT) -> list[tuple[str, ...]]:
    """The whole command line of every container that the chart renders. Blocks while Helm runs."""
    return [
        (*container["command"], *container.get("args", ()))
        for document in render(values)
        for container in containers(document)
    ]


def pod_specs(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The pod spec of an object that has one."""
    template = document.get("spec", {}).get("template")
    if template is not None:
        yield template["spec"]


def containers(document: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The containers of an object, those that start first included."""
    for spec in pod_specs(document):
        yield from spec.get("initContainers", ())
        yield from spec["containers"]
