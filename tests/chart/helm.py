"""Helm, built once from the Go module proxy, and run without touching the user's own Helm or any cluster."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from tests.services.install import go_program

HELM_VERSION = "v3.22.0"
CHART = Path(__file__).resolve().parents[2] / "helm" / "artifact-store"
VALUES = Path(__file__).resolve().parent / "values"
# The oldest Kubernetes that Chart.yaml admits, and the newest whose schemas kubernetes-validate brings. A Helm that was
# built without its release flags takes the cluster for a 1.20, so every rendering names one.
OLDEST_KUBERNETES = "1.30"
NEWEST_KUBERNETES = "1.37"
RELEASE = "shelf"
DEFAULT = (VALUES / "default.yaml",)


class ChartError(Exception):
    """Helm refused the chart or its values; the text is Helm's own."""


def helm_binary() -> Path:
    """The path of Helm; the first call builds it (three minutes on two cores) and blocks until then.

    Raises ServiceError: no Go can be had, or the build failed.
    """
    return go_program("helm.sh/helm/v3/cmd/helm", HELM_VERSION)


def lint(values: Sequence[Path] = ()) -> str:
    """What `helm lint --strict` prints. Raises ChartError when it finds fault."""
    return _run("lint", "--strict", str(CHART), values=values)


def render(values: Sequence[Path] = DEFAULT, kubernetes: str = OLDEST_KUBERNETES) -> list[dict[str, Any]]:
    """Every object of the chart, hooks too, as Helm would send it. Raises ChartError when Helm refuses.

    Raises also for a key that stands twice in one map: YAML readers drop one of the two in silence.
    """
    text = template(values, kubernetes)
    return [document for document in yaml.load_all(text, Loader=_UniqueKeys) if document is not None]


def template(values: Sequence[Path], kubernetes: str = OLDEST_KUBERNETES, *, release: str = RELEASE) -> str:
    """The text that `render` reads."""
    return _run("template", release, str(CHART), "--namespace", "store", values=values, kubernetes=kubernetes)


def value_sets() -> dict[str, list[Path]]:
    """The value sets that the chart must accept, by name; `default` gives nothing but what must be given."""
    return {path.stem: [path] for path in sorted(VALUES.glob("*.yaml"))}


def _run(*arguments: str, values: Sequence[Path], kubernetes: str = OLDEST_KUBERNETES) -> str:
    command = [str(helm_binary()), *arguments, "--kube-version", kubernetes]
    for path in values:
        command += ["--values", str(path)]
    with tempfile.TemporaryDirectory() as home:
        own = {f"HELM_{name}_HOME": f"{home}/{name.lower()}" for name in ("CACHE", "CONFIG", "DATA")}
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("HELM_", "KUBE"))}
        environment = {**inherited, **own, "KUBECONFIG": os.devnull}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    if done.returncode != 0:
        raise ChartError(f"{done.stdout}{done.stderr}")
    return done.stdout


class _UniqueKeys(yaml.SafeLoader):
    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if repeated := {key for key in keys if keys.count(key) > 1}:
            raise ChartError(f"repeated keys {sorted(repeated)}{node.start_mark}")
        return super().construct_mapping(node, deep)
