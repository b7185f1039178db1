"""The harness: runs ours and the baseline by turns, several times in one run, and notes where that was.

By turns, because the speed of a machine that others use as well drifts: what is compared lies close together in time.
"""

from __future__ import annotations

import gc
import os
import platform
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

from benchmarks.result import Result, Run
from services.config import Settings
from tests.services.shared import STORES, Store

_LIBRARIES = ("aiohttp", "asyncpg", "blake3", "cbor2", "confluent-kafka", "fastavro")


class Benchmark(Protocol):
    """Two ways to do the same work. Each call does it once on fresh ground and returns what it took or reached."""

    async def ours(self) -> float:
        """Our way, in the plan's unit."""

    async def baseline(self) -> float:
        """The way that it is measured against, in the plan's unit."""

    def details(self) -> Mapping[str, Any]:
        """What else is worth keeping, such as the amount of work; for the result's file."""


@dataclass(frozen=True, slots=True)
class Plan:
    """One benchmark of `python -m benchmarks`. `target` is the ratio to reach, at most when `lower_is_better`.

    `targets` has another one for stores on which the baseline is another.
    """

    name: str
    unit: str
    target: float
    opened: Callable[[Settings], AbstractAsyncContextManager[Benchmark]]
    lower_is_better: bool = False
    rounds: int = 5
    targets: Mapping[Store, float] = field(default_factory=dict)


async def measure(plan: Plan, settings: Settings, note: Callable[[str], None], store: Store = STORES[0]) -> Result:
    """Run the benchmark on this store: both ways once uncounted, then by turns, each first as often as second.

    `note` is told of every run as it ends.
    """
    environment = environment_facts()
    async with plan.opened(settings) as benchmark:
        await _round(benchmark, ours_first=True)
        runs = []
        for number in range(plan.rounds):
            run = await _round(benchmark, ours_first=number % 2 == 0)
            note(f"{plan.name} {number + 1}/{plan.rounds}: {run.ours:,.2f} to {run.baseline:,.2f} {plan.unit}")
            runs.append(run)
        target = plan.targets.get(store, plan.target)
        found = dict(benchmark.details())
        return Result(plan.name, plan.unit, target, plan.lower_is_better, runs, environment, found, store)


async def _round(benchmark: Benchmark, *, ours_first: bool) -> Run:
    if ours_first:
        ours = await _alone(benchmark.ours)
        return Run(ours, await _alone(benchmark.baseline))
    baseline = await _alone(benchmark.baseline)
    return Run(await _alone(benchmark.ours), baseline)


async def _alone(way: Callable[[], Awaitable[float]]) -> float:
    """What another way has left behind is not for this one to clear up."""
    gc.unfreeze()
    gc.collect()
    return await way()


def environment_facts() -> dict[str, Any]:
    """What the figures depend on. `load_before` tells whether the machine was quiet: runnable processes, 1 minute."""
    return {
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "machine": platform.machine(),
        "system": platform.system(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
        **{name: version(name) for name in _LIBRARIES},
    }


def _memory_gib() -> float | None:
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None  # not a Linux
    return round(int(lines[0].split()[1]) / (1 << 20), 1)
