"""Clocks, which are passed in wherever time is needed, so that tests can set them; and the clock of a blob store."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

Clock = Callable[[], int]
"""Gives the time in µs since 1970-01-01T00:00Z."""

FAR_SECONDS = 300.0
"""If two clocks differ by more than this, one is wrong: synchronized clocks differ by far less than a second."""

_SLOW_SECONDS = 5.0
"""An answer that took longer than this says too little about the time at which it was given."""

_MICROS = 1_000_000


def system_clock() -> int:
    """The system's time in µs since 1970, UTC."""
    return time.time_ns() // 1000


def span(seconds: float) -> str:
    """A duration in words, rounded."""
    for unit, name in ((3600, "h"), (60, "min")):
        if seconds >= 2 * unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{seconds:.0f} s"


class StoreClock:
    """The clock of a store, known from the times in its answers. For any thread.

    Between two answers it advances by the monotonic clock, so that a step of the system's clock shows at once.
    """

    def __init__(self, own: Clock = system_clock, ticks: Callable[[], float] = time.monotonic) -> None:
        """`ticks` is a monotonic clock in seconds, which never steps."""
        self._own = own
        self._ticks = ticks
        self._bounds: tuple[int, int] | None = None
        """The bounds of the difference between the store's time and `ticks` (µs)."""

    def heard(self, second: int, sent: float) -> None:
        """Note an answer that just came with this time (s since 1970); its request was sent at `sent`, by `ticks`."""
        came = self._ticks()
        if came - sent <= _SLOW_SECONDS:
            self._bounds = int((second - came) * _MICROS), int((second + 1 - sent) * _MICROS)

    def ahead(self) -> int | None:
        """The least by which the system's clock is ahead of the store's, in µs; negative if it is behind.

        0 if they agree as far as can be known, since answers have whole seconds. None until the store has answered.
        """
        if self._bounds is None:
            return None
        passed = int(self._ticks() * _MICROS)
        least, most = (passed + bound for bound in self._bounds)
        now = self._own()
        return now - most if now > most else min(0, now - least)

    def trouble(self) -> str | None:
        """What is wrong, and what mends it, if the clocks differ by more than FAR_SECONDS; else None."""
        ahead = (self.ahead() or 0) / _MICROS
        if abs(ahead) <= FAR_SECONDS:
            return None
        differs = f"{span(abs(ahead))} {'ahead of' if ahead > 0 else 'behind'}"
        return f"this machine's clock is {differs} the blob store's: set the one that is wrong, best by NTP on both"

    def micros(self) -> int:
        """The store's time in µs since 1970; the system's time until the store has answered."""
        return self._own() - (self.ahead() or 0)

    def now(self) -> datetime:
        """As `micros`, as an aware datetime."""
        return datetime.fromtimestamp(self.micros() / _MICROS, UTC)
