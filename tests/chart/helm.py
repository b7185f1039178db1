"""Helm itself: built once from the Go module proxy, and run without touching the user's own Helm or any cluster."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

HELM_VERSION = "v3.22.0"
CHART = Path(__file__).resolve().parents[2] / "helm" / "artifact-store"
VALUES = Path(__file__).resolve().parent / "values"
# The oldest Kubernetes that Chart.yaml admits, and the newest whose schemas kubernetes-validate brings. A Helm that was
# built without its release flags takes the cluster for a 1.20, so every rendering names one.
OLDEST_KUBERNETES = "1.30"
NEWEST_KUBERNETES = "1.37"
RELEASE = "shelf"
DEFAULT = (VALUES / "default.yaml",)
_BUILD_SECONDS = 1800.0


class HelmMissingError(Exception):
    """Helm cannot be had; the text says what to install or how its build failed."""


class ChartError(Exception):
    """Helm refused the chart or its values; the text is Helm's own."""


def helm_binary() -> Path:
    """The path of Helm; the first call builds it (three minutes on two cores) and blocks until then.

    Raises:
        HelmMissingError: Go is missing, or the build failed.
    """
    caches = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    folder = caches / "artifact-store" / f"helm-{HELM_VERSION}"
    binary = folder / "helm"
    if binary.exists():
        return binary
    go = shutil.which("go")
    if go is None:
        raise HelmMissingError(
            "the chart is checked with Helm, which is built by Go: install Go 1.21 or newer so that `go` is on the PATH"
            " (https://go.dev/dl, or the package golang-go of a current Debian)"
        )
    nice = ["nice"] if shutil.which("nice") else []
    command = [*nice, go, "install", f"helm.sh/helm/v3/cmd/helm@{HELM_VERSION}"]
    sys.stderr.write(f"building Helm {HELM_VERSION}, which takes some minutes …\n")
    folder.mkdir(parents=True, exist_ok=True)
    # Built beside its place and moved there whole: two runs at once do no harm, and a broken build leaves nothing.
    with tempfile.TemporaryDirectory(dir=folder) as partial:
        # GOTOOLCHAIN: an older Go fetches the one that Helm asks for.
        environment = {**os.environ, "CGO_ENABLED": "0", "GOTOOLCHAIN": "auto", "GOBIN": partial}
        try:
            done = subprocess.run(
                command, env=environment, capture_output=True, text=True, timeout=_BUILD_SECONDS, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise HelmMissingError(f"building Helm {HELM_VERSION} took longer than {_BUILD_SECONDS:.0f} s") from error
        if done.returncode != 0:
            end = "\n".join(done.stderr.splitlines()[-15:])
            raise HelmMissingError(f"building Helm {HELM_VERSION} failed (exit code {done.returncode}):\n{end}")
        (Path(partial) / "helm").replace(binary)
    return binary


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
