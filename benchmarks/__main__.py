"""`python -m benchmarks [NAME…]`: measure, write `var/bench/NAME.json`, print a Markdown table."""

from __future__ import annotations

import argparse
import asyncio
import sys

from benchmarks import append, append_latency, catch_up, fan_out, rebuild, single_gets, single_puts, streams, trees
from benchmarks.harness import measure
from benchmarks.result import table
from services.config import PREFIX, Settings
from tests.services.shared import VAR, read_environment, running_store

_ALL = (
    trees.PULL,  # before and long after those that leave many small files to be removed: see `benchmarks.trees`
    append.SINGLE,
    append.MANY,
    append_latency.PLAN,
    catch_up.PLAN,
    rebuild.PLAN,
    fan_out.PLAN,
    trees.INGEST,
    trees.INGEST_LARGE,
    trees.INGEST_LARGE_DIRECT,
    single_puts.PLAN,
    single_puts.WITH_TOKENS,
    single_puts.ALONE,
    streams.PLAN,
    single_gets.PLAN,
)
PLANS = {plan.name: plan for plan in _ALL}


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 measured, 2 an unknown name or no services. A missed target is shown, not a failure."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(PLANS)}; without one: all")
    names = parser.parse_args(arguments).names or list(PLANS)
    if unknown := [name for name in names if name not in PLANS]:
        parser.error(f"there is no benchmark {', '.join(unknown)}; there are {', '.join(PLANS)}")
    found = read_environment()
    if not found:
        parser.error("the services do not run: `make bench` starts them, or run `make services` first")
    settings = Settings(**{name.removeprefix(PREFIX).lower(): value for name, value in found.items()})
    results = []
    for name in names:
        result = asyncio.run(measure(PLANS[name], settings, _note, running_store()))
        result.write(VAR / "bench")
        results.append(result)
    print(table(results))
    return 0


def _note(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
