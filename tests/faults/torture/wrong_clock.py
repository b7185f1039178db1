"""A process of the product whose clock can be changed while it runs, without changing other processes' clocks.

`python -m tests.faults.torture.wrong_clock FILE ARGUMENT…` runs `artifact-store ARGUMENT…`. FILE has the number of
seconds that its clock is ahead (negative: behind). It is read at the start, and again after each SIGUSR1. With
SAID_RELEASE in its environment, the process claims to be of that release.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import time
from datetime import datetime, tzinfo
from pathlib import Path

from services.blobs.s3 import requests
from services.runtime import metrics


def main(file: Path) -> None:
    """Change every clock that the product looks at; monotonic ones stay right, as they do on any machine."""
    ahead = 0
    right, right_ns = time.time, time.time_ns

    def read(*_: object) -> None:
        nonlocal ahead
        ahead = int(file.read_text(encoding="ascii"))

    class WrongDatetime(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> datetime:  # type: ignore[override]  # no subclass leaves here
            return datetime.fromtimestamp(time.time(), tz)

    if (said := os.environ.get("SAID_RELEASE")) is not None:
        metrics.version = lambda distribution_name: said  # type: ignore[attr-defined]  # imported there
    signal.signal(signal.SIGUSR1, read)
    read()
    time.time = lambda: right() + ahead
    time.time_ns = lambda: right_ns() + ahead * 1_000_000_000
    requests.datetime = WrongDatetime  # type: ignore[attr-defined]  # requests are signed with the time


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    sys.argv[1:] = sys.argv[2:]
    runpy.run_module("services.cli", run_name="__main__", alter_sys=True)
