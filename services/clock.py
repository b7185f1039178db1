"""The clock: passed in wherever time is needed, so that tests can set it."""

from __future__ import annotations

import time
from collections.abc import Callable

Clock = Callable[[], int]
"""Gives the time in µs since 1970-01-01T00:00Z."""


def system_clock() -> int:
    """The system's time in µs since 1970, UTC."""
    return time.time_ns() // 1000
