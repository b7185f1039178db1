"""Where a process's metrics are collected: its use of the machine and its release are among them from the beginning."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector, disable_created_metrics


def new_registry() -> CollectorRegistry:
    """A registry with `process_*` and `artifact_store_build_info`; counters in it have no `_created` beside them."""
    disable_created_metrics()  # type: ignore[no-untyped-call]
    registry = CollectorRegistry()
    ProcessCollector(registry=registry)
    build = Gauge(
        "artifact_store_build_info",
        "1; the labels say which release runs, on which Python",
        ("version", "python"),
        registry=registry,
    )
    build.labels(_release(), platform.python_version()).set(1)
    return registry


def _release() -> str:
    try:
        return version("artifact-store")
    except PackageNotFoundError:  # run from a copy of the sources that is not installed
        return "unknown"
