"""What a replay tells while it runs: the phase, how much of it is done, how fast it goes, how long it will take."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass

_WINDOW_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class ReplayProgress:
    """`events` were folded by this replay so far; `done` and `total` are offsets of the phase, 0 where none count.

    `rate` is in events a second, of late. `outrun`: while the last stretch was folded, as much arrived as it had; that
    has no end as it goes.
    """

    phase: str
    events: int
    done: int = 0
    total: int = 0
    rate: float = 0.0
    seconds_left: float | None = None
    outrun: bool = False


Progress = Callable[[ReplayProgress], None]


class Meter:
    """Counts what is folded and tells about it."""

    def __init__(self, tell: Progress | None) -> None:
        self.events = 0
        self._tell = tell
        self._phase = ""
        self._reached: dict[int, int] = {}
        self._start = 0
        self._total = 0
        self._outrun = False
        self._seen: deque[tuple[float, int, int]] = deque()

    def begin(self, phase: str, starts: Mapping[int, int] | None = None, ends: Mapping[int, int] | None = None) -> None:
        """A phase begins, or the next stretch of the same one; with offsets, those that it goes from and to."""
        before = self._total if phase == self._phase else 0
        self._phase = phase
        self._reached = {p: (starts or {}).get(p, 0) for p in ends or {}}
        self._start = sum(self._reached.values())
        self._total = sum(max(end, self._reached[p]) for p, end in (ends or {}).items()) - self._start
        self._outrun = 0 < before <= self._total
        self._seen.clear()
        self.note(0, {})

    def note(self, events: int, next_offsets: Mapping[int, int]) -> None:
        """So many events more were folded, and these offsets reached."""
        self.events += events
        self._reached.update(next_offsets)
        done = sum(self._reached.values()) - self._start
        now = time.monotonic()
        self._seen.append((now, self.events, done))
        while len(self._seen) > 2 and now - self._seen[0][0] > _WINDOW_SECONDS:
            self._seen.popleft()
        if self._tell is None:
            return
        then, events_then, done_then = self._seen[0]
        passed = max(now - then, 1e-9)
        speed = (done - done_then) / passed
        left = (self._total - done) / speed if speed > 0 else None
        rate = (self.events - events_then) / passed if len(self._seen) > 1 else 0.0
        self._tell(ReplayProgress(self._phase, self.events, done, self._total, rate, left, self._outrun))
