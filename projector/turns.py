"""How long one Python thread may keep the others waiting.

A projector decodes in one thread while another sends rows in hundreds of small steps, each of which waits for its turn.
With Python's own 5 ms a turn the sending took three times as long as the database did (docs/benchmarks.md).
"""

from __future__ import annotations

import sys

TURN_SECONDS = 0.0005


def take_short_turns() -> None:
    """For the start of a process that decodes and writes at the same time."""
    sys.setswitchinterval(TURN_SECONDS)
