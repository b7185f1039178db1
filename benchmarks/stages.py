"""`python -m benchmarks.stages`: what the stages of a single-file command cost a writer, in µs, without Kafka.

The least of many passes, so that what else the machine does hardly matters; a gateway under load takes a third more,
because its memory is not as warm.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from random import Random
from time import perf_counter

from benchmarks.workload import package_commands
from schemas.headers import CommandHeaders
from services.core.decide import accept, acknowledge, decide
from services.core.evolve import evolve
from services.core.limits import Limits
from services.log.kafka.partitioner import partition_of

_FILES = 64
_PASSES = 500
_NOW = 1_900_000_000_000_000
_PARTITIONS = 6


def stages(passes: int = _PASSES) -> dict[str, float]:
    """µs a command by stage."""
    draw, limits = Random(22), Limits()
    least: dict[str, float] = {}
    for _ in range(passes):
        spent: defaultdict[str, float] = defaultdict(float)
        package = package_commands(draw, _FILES)
        created = decide(None, package.create, _NOW, limits)
        state = evolve(None, created.events[0], created.digests[0])
        for command in package.ingests:
            with _Timed("find the partition", spent):
                partition_of(command.package_id, _PARTITIONS)
            with _Timed("decide, digest, chain", spent):
                decision = decide(state, command, _NOW, limits)
            with _Timed("headers and key", spent):
                CommandHeaders(decision.event_type, decision.package_id, decision.command_id, 1, _NOW).of(
                    0, decision.appended[0].event_id
                )
            with _Timed("fold, with the manifest's items", spent):
                accept(state, command, decision)
            with _Timed("acknowledge", spent):
                acknowledge(state, command)
        for stage, seconds in spent.items():
            least[stage] = min(least.get(stage, seconds), seconds)
    return {stage: seconds / _FILES * 1_000_000 for stage, seconds in least.items()}


class _Timed:
    """Adds the time of the block to a stage."""

    def __init__(self, stage: str, spent: defaultdict[str, float]) -> None:
        self._stage = stage
        self._spent = spent
        self._began = 0.0

    def __enter__(self) -> None:
        self._began = perf_counter()

    def __exit__(self, *_: object) -> None:
        self._spent[self._stage] += perf_counter() - self._began


def main() -> int:
    """Prints a Markdown table."""
    print("| stage | µs |\n| --- | --- |")
    for stage, micros in stages().items():
        print(f"| {stage} | {micros:.1f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
