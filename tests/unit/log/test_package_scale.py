"""A command costs the same whether its package holds a thousand files or tens of thousands."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from uuid import UUID, uuid4

import pytest

from schemas.runs import encode_all
from services.core.decide import Command, IngestFiles, IngestTogether, Limits, acknowledge, check_ingest, decide
from services.core.state import PackageState, evolve_all
from services.log.sqlite.driver import SqliteDriver
from services.log.sqlite.file import create_file, open_file
from services.log.state.partition_state import PartitionState
from services.log.state.state_file import LogPartition, StateFile
from tests import commands
from tests.unit.log.sqlite import batches

FILES = 30_000
TOGETHER = 500
MEASURED = 800
RATIO = 1.2
LIMITS = Limits()
CREATE = commands.create()

Run = Callable[[Command], None]
"""Carries out one command, as a writer does."""


class Unwalkable(dict):  # type: ignore[type-arg] # stands in for dicts of several types
    """A dict that may be asked for its keys one by one and cannot be walked, whatever it holds."""

    def __iter__(self) -> Iterator[object]:
        raise AssertionError("a command walks through all that the package holds")


class InMemory:
    """Decided on one state, without a log."""

    def __init__(self, folder: Path) -> None:
        self._states: dict[UUID, PackageState] = {}

    def __call__(self, command: Command) -> None:
        before = self._states.get(command.package_id)
        if isinstance(command, IngestFiles):
            check_ingest(
                before, command.package_id, [file.relative_path for file in command.files], uuid4(), 1_000, LIMITS
            )
        after = evolve_all(before, decide(before, command, 1_000, LIMITS))
        acknowledge(after, command)
        self._states[command.package_id] = after


class Partition:
    """As the writer of a Kafka partition, which saves its state from time to time."""

    def __init__(self, folder: Path) -> None:
        place = LogPartition(UUID(int=7), "t.events", 3)
        self._state = PartitionState(StateFile.create(folder / "state.db", place))

    def __call__(self, command: Command) -> None:
        state = self._state
        package = state.package(command.package_id, command.command_id)
        events = decide(package, command, 1_000, LIMITS)
        acknowledge(state.fold(package, events), command)
        state.confirm(state.next_offset, encode_all(events)[-1])
        if state.next_offset % 10 == 0:
            state.save()


class Embedded:
    """As the writer of the embedded log, a transaction for each command."""

    def __init__(self, folder: Path) -> None:
        create_file(folder / "log.db")
        file = open_file(folder / "log.db")
        file.close()
        self._driver = SqliteDriver(folder / "log.db", file.identity)

    def __call__(self, command: Command) -> None:
        batches.run(self._driver, [command])


@pytest.mark.parametrize("writer", [InMemory, Partition, Embedded])
def test_a_command_costs_no_more_in_a_large_package_than_in_a_small_one(
    writer: Callable[[Path], Run], tmp_path: Path
) -> None:
    run, large, small = writer(tmp_path), commands.create("large"), commands.create("small")
    run(large)
    run(small)
    for start in range(0, FILES, TOGETHER):
        paths = [path_of(number) for number in range(start, start + TOGETHER)]
        run(commands.ingest(large.package_id, *paths, name=f"many-{start}"))
    costs: dict[UUID, list[int]] = {large.package_id: [], small.package_id: []}
    for number in range(FILES, FILES + MEASURED):
        for package_id, spent in costs.items():
            command = commands.ingest(package_id, path_of(number), name=f"{package_id}-{number}")
            began = time.thread_time_ns()
            run(command)
            spent.append(time.thread_time_ns() - began)
    assert median(costs[large.package_id]) <= RATIO * median(costs[small.package_id])


def test_commands_that_are_decided_together_do_not_walk_through_their_package() -> None:
    state = evolve_all(None, decide(None, CREATE, 1_000, LIMITS))
    state.files, state.commands = Unwalkable(state.files), Unwalkable(state.commands)
    together = tuple(commands.ingest(CREATE.package_id, path_of(number), name=number) for number in range(3))
    state = evolve_all(state, decide(state, IngestTogether(CREATE.package_id, together), 1_000, LIMITS))
    assert [acknowledge(state, command).files[0].relative_path for command in together] == list(map(path_of, range(3)))


def path_of(number: int) -> str:
    """A hundred files to a folder."""
    return f"{number // 100}/file-{number}"
