"""Clocks: passed in wherever time is needed, so that tests can set them; and what is known of a store's own clock.

`TIMINGS` say how long operations of components took. `services.runtime.metrics` shows them.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from threading import Lock

Clock = Callable[[], int]
"""Gives the time in µs since 1970-01-01T00:00Z."""

FAR_SECONDS = 300.0
"""Clocks that differ by more than this are wrong; those of machines that keep time differ by far less than a second."""

_SLOW_SECONDS = 5.0
"""An answer that took longer says too little about the time at which it was given."""

_MICROS = 1_000_000


def system_clock() -> int:
    """The system's time in µs since 1970, UTC."""
    return time.time_ns() // 1000


def span(seconds: float) -> str:
    """A length of time in words, rounded."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


class StoreClock:
    """The clock of a store, known from the times that its answers name. For any thread.

    Between two answers it goes on by the monotonic clock, so that a step of the system's clock shows at once.
    """

    def __init__(self, own: Clock = system_clock, ticks: Callable[[], float] = time.monotonic) -> None:
        """`ticks` gives seconds and never steps."""
        self._own = own
        self._ticks = ticks
        self._bounds: tuple[int, int] | None = None
        """The store's time minus `ticks` lies between these (µs)."""

    def heard(self, second: int, sent: float) -> None:
        """An answer that came just now names this second (since 1970); it was asked for when `ticks` gave `sent`."""
        came = self._ticks()
        if came - sent <= _SLOW_SECONDS:
            self._bounds = int((second - came) * _MICROS), int((second + 1 - sent) * _MICROS)

    def ahead(self) -> int | None:
        """By how many µs the system's clock is at least ahead of the store's; negative when it is behind.

        0 when they agree as far as is known: answers name whole seconds. None until the store has named its time.
        """
        if self._bounds is None:
            return None
        passed = int(self._ticks() * _MICROS)
        least, most = (passed + bound for bound in self._bounds)
        now = self._own()
        return now - most if now > most else min(0, now - least)

    def trouble(self) -> str | None:
        """What is wrong when the clocks differ by more than FAR_SECONDS, and what mends it."""
        ahead = (self.ahead() or 0) / _MICROS
        if abs(ahead) <= FAR_SECONDS:
            return None
        differs = f"{span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
        return f"this machine's clock is {differs} the blob store's: set the one that is wrong, best by NTP on both"

    def micros(self) -> int:
        """The store's time in µs since 1970, and the system's until the store has named its own."""
        return self._own() - (self.ahead() or 0)

    def now(self) -> datetime:
        """As `micros`, aware."""
        return datetime.fromtimestamp(self.micros() / _MICROS, UTC)


DURATIONS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
"""Upper bounds of the classes that durations are counted in (s)."""


@dataclass(slots=True)
class Durations:
    """How long the operations of one kind took, and how many of them failed."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(DURATIONS) + 1))
    """By class; the last is for what took longer than the last bound."""
    seconds: float = 0.0
    """All of them together."""
    failures: int = 0


class Timings:
    """Durations by component and operation, since the process began. For any thread."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._found: dict[tuple[str, str], Durations] = {}

    @property
    def found(self) -> Mapping[tuple[str, str], Durations]:
        """All so far."""
        return dict(self._found)

    @contextmanager
    def of(self, component: str, operation: str) -> Iterator[None]:
        """Time what is in the block. It has failed if the block raises."""
        began, failed = time.monotonic(), True
        try:
            yield
            failed = False
        finally:
            took = time.monotonic() - began
            with self._lock:
                durations = self._found.setdefault((component, operation), Durations())
                durations.counts[bisect_left(DURATIONS, took)] += 1
                durations.seconds += took
                durations.failures += failed


TIMINGS = Timings()
"""Those of this process."""
