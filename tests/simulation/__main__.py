"""`python -m tests.simulation --seed N --steps M`: one run, or with `--runs` several seeds in a row."""

from __future__ import annotations

import argparse
import sys
import time

from tests.simulation.mutations import MUTATIONS
from tests.simulation.simulation import run


def main() -> int:
    """The exit code: 1 as soon as a run breaks a promise."""
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description=__doc__)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=20_000, help="with faults; the quiet at the end comes on top")
    parser.add_argument("--runs", type=int, default=1, help="how many seeds, one after the other")
    parser.add_argument("--mutation", choices=sorted(MUTATIONS), help="a mistake to put into the product")
    options = parser.parse_args()
    for seed in range(options.seed, options.seed + options.runs):
        began = time.perf_counter()
        result = run(seed, options.steps, options.mutation)
        sys.stdout.write(f"{result} {time.perf_counter() - began:.1f} s\n")
        if result.violation is not None:
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
