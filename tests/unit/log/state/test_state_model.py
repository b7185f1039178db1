"""A writer's state gives the same answers from memory and from its file, whatever happens in between.

The model is a dictionary of package states that were folded from the whole log; the state under test saves, forgets,
crashes and opens its file again at random.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, rule

from artifact_store.errors import ArtifactStoreError
from artifact_store.events import Event
from artifact_store.models import Acknowledgement
from services.core.decide import (
    ANSWERS_KEPT_MICROS,
    MAX_IDLE_MICROS,
    Command,
    Limits,
    acknowledge,
    check_ingest,
    decide,
)
from services.core.state import FINALIZED, PackageState, evolve
from services.log.state import state_file as state_file_module
from services.log.state.partition_state import PartitionState, value_digest
from services.log.state.state_file import LogPartition, StateFile
from tests import commands

LIMITS = Limits(max_files_per_package=6)
PLACE = LogPartition(UUID(int=7), "t.events", 3)
NAMES = st.integers(0, 3)
COMMAND_NAMES = st.integers(0, 5)
SENDERS = st.sampled_from([None, None, "ci:bot", "ci:other"])
PATHS = st.sampled_from(["a", "A", "b", "a/b", "é", "É", "z" * 40, "dir/file.txt"])
TICKS = st.sampled_from([0, 1, 1, 5, ANSWERS_KEPT_MICROS // 2, ANSWERS_KEPT_MICROS, MAX_IDLE_MICROS])


class StateMachine(RuleBasedStateMachine):
    """Random commands over four packages; two entries fit into memory."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.path = Path(self.folder.name) / "state.db"
        self.state = PartitionState(StateFile.create(self.path, PLACE), max_entries=2)
        self.at_once, state_file_module.AT_ONCE = state_file_module.AT_ONCE, 3  # so that packages are large here
        self.log: list[tuple[Event, bytes]] = []
        self.model: dict[UUID, PackageState] = {}
        self.now = 1_000

    def teardown(self) -> None:
        self.state.close()
        self.folder.cleanup()
        state_file_module.AT_ONCE = self.at_once

    @rule(name=NAMES, subject=st.sampled_from(["s", "t"]), tick=TICKS)
    def create(self, name: int, subject: str, tick: int) -> None:
        self.now += tick
        self.run(commands.create(name, subject=subject))

    @rule(
        package=NAMES,
        name=COMMAND_NAMES,
        paths=st.lists(PATHS, min_size=1, max_size=3),
        torn=st.sampled_from([0, 0, 1]),
        sender=SENDERS,
    )
    def ingest(self, package: int, name: int, paths: list[str], torn: int, sender: str | None = None) -> None:
        command = commands.ingest(commands.create(package).package_id, *paths, name=name)
        self.run(replace(command, principal=sender), torn)

    @rule(package=NAMES, name=COMMAND_NAMES, tick=TICKS, sender=SENDERS)
    def finalize(self, package: int, name: int, tick: int, sender: str | None = None) -> None:
        self.now += tick
        command = commands.finalize(commands.create(package).package_id, name=name)
        self.run(replace(command, principal=sender))

    @rule(package=NAMES, name=COMMAND_NAMES, paths=st.lists(PATHS, max_size=3))
    def check(self, package: int, name: int, paths: list[str]) -> None:
        package_id, command_id = commands.create(package).package_id, commands.command_id(name)
        found = self.state.package(package_id, command_id)
        assert refused(found, package_id, paths, command_id) == refused(
            self.expected(package_id), package_id, paths, command_id
        )

    @rule()
    def save(self) -> None:
        self.state.save()

    @rule()
    def tidy(self) -> None:
        self.state.tidy()

    @rule()
    def put_away(self) -> None:
        for _ in range(2):  # from somewhere in the file to its end, and from its beginning
            self.state._put_away_at = 0.0
            self.state.put_away()

    @rule(package=NAMES)
    def load_beside(self, package: int) -> None:
        package_id = commands.create(package).package_id
        apart = self.state.beside()
        found = apart.load(package_id, None, 0)
        apart.close()
        if found is not None:
            self.state.adopt(found)

    @rule()
    def end_and_begin_again(self) -> None:
        self.state.close()
        self.begin()
        assert self.state.next_offset == len(self.log)

    @rule()
    def crash(self) -> None:
        self.state._file.close()
        self.begin()

    @rule(command=st.sampled_from(["finalize", "create"]), package=NAMES)
    def a_transaction_fails(self, command: str, package: int) -> None:
        made = (
            commands.create(package) if command == "create" else commands.finalize(commands.create(package).package_id)
        )
        found = self.state.package(made.package_id, made.command_id)
        try:
            events = decide(found, made, self.now, LIMITS)
        except ArtifactStoreError:
            return
        self.state.fold(found, events)
        self.state.close()
        self.begin()

    def begin(self) -> None:
        """Open the file and read on from where it stands."""
        file = StateFile.open(self.path, PLACE)
        self.state = PartitionState(file, max_entries=2)
        position = self.state.next_offset
        assert position <= len(self.log)
        if position:
            assert value_digest(self.log[position - 1][1]) == self.state.digest
        for offset in range(position, len(self.log)):
            event, value = self.log[offset]
            self.state.apply(event)
            self.state.confirm(offset, value)

    def run(self, command: Command, torn: int = 0) -> None:
        found = self.state.package(command.package_id, command.command_id)
        decided, refused = self.decided(found, command)
        assert (decided, refused) == self.decided(self.expected(command.package_id), command)
        if refused is not None:
            return
        events = [*decided][: len(decided) - torn]
        if torn:
            for event in events:
                self.state.apply(event)
        elif events:
            self.state.fold(found, decided)
        for event in events:
            value = str(event).encode()
            self.model[event.package_id] = evolve(self.model.get(event.package_id), event)
            self.log.append((event, value))
            self.state.confirm(len(self.log) - 1, value)
        if not torn:
            assert self.answer(self.state.package(command.package_id, command.command_id), command) == self.answer(
                self.model[command.package_id], command
            )

    def decided(self, state: PackageState | None, command: Command) -> tuple[Sequence[Event], tuple[type, str] | None]:
        try:
            return decide(state, command, max(self.now, self.state.last_created_at), LIMITS), None
        except ArtifactStoreError as error:
            return (), (type(error), error.detail)

    def answer(self, state: PackageState | None, command: Command) -> Acknowledgement:
        assert state is not None
        return acknowledge(state, command)

    def expected(self, package_id: UUID) -> PackageState | None:
        """The package folded from the whole log; what remains of it once its commands are not answered any more."""
        state = self.model.get(package_id)
        newest = max((event.created_at for event, _ in self.log), default=0)
        if state is None:
            return None
        age = newest - state.last_event_at
        over = age >= ANSWERS_KEPT_MICROS if state.status == FINALIZED else age > MAX_IDLE_MICROS
        return state.remains() if over else state


def refused(
    state: PackageState | None, package_id: UUID, paths: list[str], command_id: UUID
) -> tuple[type, str] | None:
    """Why files of these paths cannot be ingested, None if they can."""
    try:
        check_ingest(state, package_id, paths, command_id, 1_000, LIMITS)
    except ArtifactStoreError as error:
        return type(error), error.detail
    return None


TestState = pytest.mark.slow(StateMachine.TestCase)
TestState.settings = settings(
    max_examples=80, stateful_step_count=25, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)


def test_a_package_that_is_read_from_the_file_and_forgotten_at_once_takes_events_of_the_log() -> None:
    state = StateMachine()
    state.create(name=0, subject="s", tick=0)
    state.ingest(name=1, package=0, paths=["a"], torn=0)
    state.end_and_begin_again()
    state.create(name=1, subject="s", tick=0)
    state.finalize(name=2, package=0, tick=0)
    state.crash()
    state.check(name=3, package=0, paths=[])
    state.finalize(name=2, package=0, tick=0)
    state.teardown()


def test_answers_of_one_checkpoint_go_by_the_time_of_their_finalization_whatever_their_packages_ids() -> None:
    for one, other in ((1, 2), (2, 1)):
        state = StateMachine()
        state.create(name=one, subject="s", tick=0)
        state.create(name=other, subject="s", tick=0)
        state.finalize(name=0, package=other, tick=0)
        state.finalize(name=0, package=one, tick=86_400_000_000)
        state.end_and_begin_again()
        state.create(name=one, subject="s", tick=0)
        state.teardown()
