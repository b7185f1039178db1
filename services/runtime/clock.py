"""Clocks: passed in wherever time is needed, so that tests can set them; and what is known of a store's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime

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
