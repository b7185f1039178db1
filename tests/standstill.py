"""How long the machine stood still while a test measured a bound of the product: nothing could answer meanwhile."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Self

from tests.services.process import wait_until

_TICK_SECONDS = 0.05
_PROGRAM = """
import sys, time
while True:
    sys.stdout.write(f"{time.monotonic()}\\n")
    sys.stdout.flush()
    time.sleep(float(sys.argv[1]))
"""


class Standstill:
    """Watches the machine within its block, by a process that only ticks: when a tick comes late, nothing ran.

    A process of its own, since what holds up the interpreter or the event loop of a test may be the product itself.
    """

    def __enter__(self) -> Self:
        self._folder = tempfile.TemporaryDirectory(prefix="artifact-store-ticks-")
        self._file = Path(self._folder.name) / "ticks"
        with self._file.open("wb") as into:
            self.process = subprocess.Popen([sys.executable, "-I", "-c", _PROGRAM, str(_TICK_SECONDS)], stdout=into)
        wait_until(lambda: self._file.stat().st_size > 0, 30, "nothing ticks")
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        whole = self._file.read_text(encoding="ascii").rpartition("\n")[0]
        self._ticks = [float(line) for line in whole.splitlines()]
        self._folder.cleanup()

    def longest(self, since: float) -> float:
        """Once the block has ended: the longest standstill, in seconds, that ended after that moment of `monotonic`."""
        return max((b - a - _TICK_SECONDS for a, b in pairwise(self._ticks) if b > since), default=0.0)
