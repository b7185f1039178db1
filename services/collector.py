"""How often a long-running process looks for reference cycles (Python's cyclic garbage collector).

A writer holds the states of many packages, and makes a hundred small objects an event, hardly one of them in a cycle.
With Python's defaults the collector walked all of it again and again, which took half of a busy gateway's time
(docs/benchmarks.md).
"""

from __future__ import annotations

import gc

YOUNG = 50_000
"""So many objects are made, net of those that went by themselves, before the new ones are looked at; the default is
700. A batch of commands makes ten thousand and more that live as long as it does. Garbage in cycles waits longer,
in some MiB."""

OLDER = 20
"""So many times the younger ones are looked at before the older ones are; the default is 10."""


def collect_rarely() -> None:
    """For the start of a process that runs long: spare what exists by now, and look at the rest seldom."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG, OLDER, OLDER)
