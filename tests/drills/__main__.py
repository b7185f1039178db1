"""`python -m tests.drills [NAME…]`: the drills whose names contain one of these texts, or all.

The exit code is 1 if a drill failed.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.drills.carry_out import Outcome, carry_out
from tests.drills.drills import DRILLS, Drill
from tests.drills.scene import installation
from tests.faults.torture.__main__ import until_told


async def run(drills: Sequence[Drill], folder: Path) -> list[Outcome]:
    """Run these drills one after another on one installation; says how each went."""
    outcomes = []
    async with installation(folder) as stage:
        for number, drill in enumerate(drills):
            outcomes.append(await carry_out(stage, drill, folder / f"prometheus-{number}"))
            say(outcomes[-1].line())
            for wrong in outcomes[-1].wrong:
                say(f"     {wrong}")
    return outcomes


def say(text: str) -> None:
    """Progress."""
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - the command's output


def main(names: Sequence[str]) -> int:
    """Returns the exit code."""
    chosen = [drill for drill in DRILLS if not names or any(name in drill.name for name in names)]
    with tempfile.TemporaryDirectory(prefix="artifact-store-drills-") as folder:
        outcomes = asyncio.run(until_told(run(chosen, Path(folder))))
    return int(not outcomes or any(outcome.wrong for outcome in outcomes))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
