"""Registries of metrics, which always include the process's use of the machine and its release; and their listener.

`catalogue` is `docs/metrics.md`, generated from all code that defines metrics (`python -m services.runtime.metrics`).
"""

from __future__ import annotations

import ast
import asyncio
import logging
import math
import os
import platform
import sys
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import asynccontextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Self

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
    start_http_server,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from artifact_store.errors import ConfigurationError
from services.runtime.tls import all_ends

if TYPE_CHECKING:
    from services.runtime.addresses import ListenAddress

_LOG = logging.getLogger(__name__)

OPERATION_SECONDS = Histogram(
    "artifact_store_operation_seconds",
    "How long operations of a component took, whether or not they failed",
    ("component", "operation"),
    registry=None,
    buckets=(0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0),
)
"""Counts for this process since it began; every registry of `new_registry` shows it."""

OPERATION_FAILURES = Counter(
    "artifact_store_operation_failures",
    "Operations of a component that failed",
    ("component", "operation"),
    registry=None,
)
"""See `OPERATION_SECONDS`."""


class _Certificates(Collector):
    """When certificates expire, read from their files (a few KiB) at each scrape."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self._files = files

    def collect(self) -> Iterator[Metric]:
        gauge = GaugeMetricFamily(
            "artifact_store_certificate_end_seconds",
            "When the certificates in a file end, in seconds since 1970; 0 if the file cannot be read",
            labels=["setting"],
        )
        for setting, end in all_ends(self._files).items():
            gauge.add_metric([setting], end)
        yield gauge


def new_registry(certificates: Mapping[str, Path] | None = None) -> CollectorRegistry:
    """A registry with `process_*`, `artifact_store_build_info` and the operations of components.

    It shows when the certificates in these files expire, by setting. Its counters have no `_created` series.
    """
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge(
        "artifact_store_build_info",
        "1; the labels say which release runs, on which Python",
        ("version", "python"),
        registry=registry,
    )
    build.labels(release(), platform.python_version()).set(1)
    if certificates:
        registry.register(_Certificates(certificates))
    registry.register(OPERATION_SECONDS)
    registry.register(OPERATION_FAILURES)
    return registry


@asynccontextmanager
async def served(registry: CollectorRegistry, address: ListenAddress | None) -> AsyncIterator[None]:
    """Within the block, serve the registry's metrics over HTTP, in threads. Without an address, do nothing.

    Raises ConfigurationError: the address cannot be listened on.
    """
    if address is None:
        yield
        return
    from services.runtime.addresses import ListenAddress  # here, so that the command line's help need not load it

    try:
        server, thread = start_http_server(address.port, address.host, registry)
    except OSError as error:
        raise ConfigurationError(f"--metrics-listen: cannot listen on {address}: {error.strerror}") from error
    _LOG.info("metrics at http://%s/metrics", ListenAddress(address.host, server.server_port))
    try:
        yield
    finally:
        await asyncio.to_thread(server.shutdown)
        server.server_close()
        await asyncio.to_thread(thread.join)


def release() -> str:
    """The installed version of the product."""
    try:
        return version("artifact-store")
    except PackageNotFoundError:  # running from sources that are not installed
        return "unknown"


_WRITE_SECONDS = 5.0


class RunMetrics:
    """Metrics of a command that runs to its end, in a file for the textfile collector of Prometheus's node exporter.

    The file is replaced as a whole: at the start of the run, at most every 5 s during it, and at its end. The time of
    the last success is copied from the previous file. Without a file, nothing is written. Methods block for a small
    write.
    """

    def __init__(self, file: Path | None, run: str) -> None:
        """`run` names the command and its subject."""
        self._file = file
        self._registry = CollectorRegistry()
        self._written = -math.inf
        self._wrong = 0
        active = Gauge(
            "artifact_store_run_active",
            "1 while the command runs. A run that was killed leaves it at 1, and its file no longer changes",
            ("run",),
            registry=self._registry,
        )
        begin = Gauge(
            "artifact_store_run_begin_seconds",
            "When the last run began, in seconds since 1970",
            ("run",),
            registry=self._registry,
        )
        progress = Gauge(
            "artifact_store_run_progress_ratio",
            "How much of its longest part the run has finished, from 0 to 1",
            ("run",),
            registry=self._registry,
        )
        problems = Gauge(
            "artifact_store_run_problems",
            "How much the last run found wrong: violations, or 1 if it failed",
            ("run",),
            registry=self._registry,
        )
        success = Gauge(
            "artifact_store_run_last_success_seconds",
            "When a run last ended without a problem, in seconds since 1970; 0 if none has",
            ("run",),
            registry=self._registry,
        )
        self._active, self._begin, self._progress, self._problems, self._success = (
            gauge.labels(run) for gauge in (active, begin, progress, problems, success)
        )

    def __enter__(self) -> Self:
        """Begin the run. Raises OSError: the file cannot be written."""
        if self._file is not None:
            self._success.set(self._last_success())
            self._active.set(1)
            self._begin.set_to_current_time()
            self._write()
        return self

    def progress(self, done: float, total: float) -> None:
        """Note how much of the longest part is done."""
        if total > 0:
            self._progress.set(min(1.0, done / total))
        if time.monotonic() >= self._written + _WRITE_SECONDS:
            self._try_to_write()

    def found(self, problems: int) -> None:
        """Note how many problems were found."""
        self._wrong = problems

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._active.set(0)
        wrong = self._wrong or int(kind is not None)
        self._problems.set(wrong)
        if not wrong:
            self._progress.set(1)
            self._success.set_to_current_time()
        self._try_to_write()

    def _try_to_write(self) -> None:
        try:
            self._write()
        except OSError as error:  # the run is more important than the file
            _LOG.warning("the metrics could not be written to %s: %s", self._file, error.strerror)

    def _write(self) -> None:
        self._written = time.monotonic()
        if self._file is not None:
            fresh = self._file.with_name(f".{self._file.name}.{os.getpid()}")  # a name that the collector ignores
            fresh.write_bytes(generate_latest(self._registry))
            fresh.chmod(0o644)
            fresh.replace(self._file)

    def _last_success(self) -> float:
        try:
            text = "" if self._file is None else self._file.read_text(encoding="utf-8")
            families = {family.name: family for family in text_string_to_metric_families(text)}
            return families["artifact_store_run_last_success_seconds"].samples[0].value
        except (OSError, ValueError, KeyError, IndexError):
            return 0.0


_KINDS = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
_INTRODUCTION = """# Metrics

Generated from the code by `make docs`; do not edit. Every process also has `process_*`: processor time, memory, open
files and start time. Labels have few values, and clients choose none of them. `artifact_store_run_*` are in the file
that `--metrics-file` names, of commands that run to their end.

| metric | type | labels | meaning |
| --- | --- | --- | --- |
"""


class _Defined(NamedTuple):
    """A metric as the code defines it."""

    name: str
    kind: str
    labels: str
    meaning: str


def catalogue() -> str:
    """The text of docs/metrics.md. Reads the source code."""
    root = Path(__file__).parents[2]
    files = sorted(
        path for folder in ("ingest_gateway", "projector", "services") for path in (root / folder).rglob("*.py")
    )
    found: dict[tuple[str, str, str], list[str]] = {}
    for source in (path.read_text(encoding="utf-8") for path in files):
        for node in ast.walk(ast.parse(source)) if '"artifact_store_' in source else ():
            if (metric := _defined(node)) is not None:
                meanings = found.setdefault((metric.name, metric.kind, metric.labels), [])
                if metric.meaning not in meanings:
                    meanings.append(metric.meaning)
    rows = [
        f"| `{name}` | {kind} | {labels} | {'; '.join(said)} |" for (name, kind, labels), said in sorted(found.items())
    ]
    return _INTRODUCTION + "\n".join(rows) + "\n"


def _defined(node: ast.AST) -> _Defined | None:
    """The metric that a call, or a row of a table, defines; None if it defines none."""
    kind, values, further = "gauge", list[ast.expr](), list[str]()
    if isinstance(node, ast.Tuple):
        values, further = node.elts, ["partition"]
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        kind = _KINDS.get(node.func.id.removesuffix("MetricFamily"), "")
        values = [*node.args, *(each.value for each in node.keywords if each.arg == "labels")]
    if not kind or len(values) < 2:
        return None
    name, text = values[0], values[1]
    if not (isinstance(name, ast.Constant) and isinstance(text, ast.Constant)):
        return None
    if not (isinstance(name.value, str) and name.value.startswith("artifact_store_") and isinstance(text.value, str)):
        return None
    if len(values) > 2 and isinstance(values[2], ast.Tuple | ast.List):
        further += [str(each.value) for each in values[2].elts if isinstance(each, ast.Constant)]
    shown = f"{name.value}_total" if kind == "counter" else name.value
    return _Defined(shown, kind, ", ".join(f"`{label}`" for label in further), text.value)


if __name__ == "__main__":
    sys.stdout.write(catalogue())
