"""`rebuild`: a replay that rebuilds the registry from a full log, in events/s.

`replay` loads the events of `benchmarks.full_log` in a process a core into tables without indexes, builds the indexes,
catches up and switches. The clock runs from its first batch, behind which the events are counted, to the switch; its
digest is not measured, nor is starting Python.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from itertools import pairwise

import asyncpg

from benchmarks.full_log import FullLog, plan
from projector import replay
from projector.rebuild import ReplayProgress
from services.config import Settings


class Rebuild(FullLog):
    """By a replay; see the module."""

    async def _fold(self, settings: Settings, connection: asyncpg.Connection) -> float:
        watch = _Watch()
        done = await replay(settings, "registry", progress=watch.see)
        assert done.events == self._amount.events
        self._found = {"seconds": round(done.seconds, 2), "seconds_by_phase": watch.seconds()}
        return (self._amount.events - watch.first) / watch.measured()


class _Watch:
    """Notes when the phases of a replay begin, and its first batch."""

    def __init__(self) -> None:
        self.first = 0
        self._began: float | None = None
        self._phases: dict[str, float] = {}

    def see(self, seen: ReplayProgress) -> None:
        now = time.perf_counter()
        self._phases.setdefault(seen.phase, now)
        if self._began is None and seen.events:
            self.first, self._began = seen.events, now

    def measured(self) -> float:
        """Seconds from the first batch to the switch, which the digest follows."""
        assert self._began is not None, "nothing was folded"
        return self._phases["digest"] - self._began

    def seconds(self) -> Mapping[str, float]:
        """How long each phase took."""
        return {name: round(end - begin, 2) for (name, begin), (_, end) in pairwise(self._phases.items())}


PLAN = plan("rebuild", 1.1, Rebuild)
