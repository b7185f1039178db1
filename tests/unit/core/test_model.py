"""decide and evolve against a model that is simple enough to be obviously right: thousands of random sequences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from artifact_store.errors import (
    CommandReusedError,
    DuplicateRelativePathError,
    IllegalPackageStateError,
    PackageNotFoundError,
    PathConflictError,
    RejectedError,
    TooLargeError,
)
from artifact_store.events import NO_DIGEST, Event
from artifact_store.models import Acknowledgement
from schemas.codec import decode, encode
from schemas.digests import event_digest, payload_digest_holds
from services import manifest
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles, Limits, acknowledge, decide
from services.core.state import PackageState, evolve, evolve_all
from tests import commands

LIMITS = Limits(max_files_per_package=6)
NAMES = st.integers(0, 2)
COMMAND_NAMES = st.integers(0, 5)
SENDERS = st.sampled_from([None, None, None, "ci:bot", "ci:other"])
PATHS = st.sampled_from(["a", "A", "b", "a/b", "a/b/c", "é", "z" * 40, "dir/file.txt"])


@dataclass
class ModelPackage:
    """A package as a person would note it down."""

    paths: list[str] = field(default_factory=list)
    finalized: bool = False
    answers: dict[UUID, tuple[Command, Acknowledgement]] = field(default_factory=dict)


class RegistryMachine(RuleBasedStateMachine):
    """Random commands over three packages, with repeated command ids and a clock that may stand still."""

    def __init__(self) -> None:
        super().__init__()
        self.states: dict[UUID, PackageState] = {}
        self.model: dict[UUID, ModelPackage] = {}
        self.log: dict[UUID, list[Event]] = {}
        self.now = 1_000

    @rule(name=NAMES, subject=st.sampled_from(["s", "t"]), tick=st.integers(0, 5))
    def create(self, name: int, subject: str, tick: int) -> None:
        self.now += tick
        self.run(commands.create(name, subject=subject))

    @rule(package=NAMES, name=COMMAND_NAMES, paths=st.lists(PATHS, min_size=1, max_size=3), sender=SENDERS)
    def ingest(self, package: int, name: int, paths: list[str], sender: str | None) -> None:
        command = commands.ingest(commands.create(package).package_id, *paths, name=name)
        self.run(replace(command, principal=sender))

    @rule(package=NAMES, name=COMMAND_NAMES, sender=SENDERS)
    def finalize(self, package: int, name: int, sender: str | None) -> None:
        command = commands.finalize(commands.create(package).package_id, name=name)
        self.run(replace(command, principal=sender))

    def run(self, command: Command) -> None:
        expected = self.expected_error(command)
        before = len(self.log.get(command.package_id, []))
        state = self.states.get(command.package_id)
        events, error = self.decide(state, command)
        assert (type(error) if error else None) is expected, f"{command}: {error}"
        if error is not None:
            assert len(self.log.get(command.package_id, [])) == before
            return
        self.log.setdefault(command.package_id, []).extend(events)
        self.states[command.package_id] = state = evolve_all(state, events)
        answer = acknowledge(state, command)
        self.note(command, answer, len(events))

    def decide(self, state: PackageState | None, command: Command) -> tuple[Sequence[Event], RejectedError | None]:
        try:
            return decide(state, command, self.now, LIMITS), None
        except RejectedError as error:
            return (), error

    def expected_error(self, command: Command) -> type[RejectedError] | None:
        package = self.model.get(command.package_id)
        if package is not None and command.command_id in package.answers:
            return None if package.answers[command.command_id][0] == command else CommandReusedError
        if isinstance(command, CreatePackage):
            return CommandReusedError if package is not None else None
        if package is None:
            return PackageNotFoundError
        if package.finalized:
            return IllegalPackageStateError
        if isinstance(command, FinalizePackage):
            return None
        paths = [file.relative_path for file in command.files]
        if len(set(paths)) < len(paths) or set(paths) & set(package.paths):
            return DuplicateRelativePathError
        if len(paths) + len(package.paths) > LIMITS.max_files_per_package:
            return TooLargeError
        every = [*package.paths, *paths]
        return PathConflictError if any(a.startswith(f"{b}/") for a in every for b in every) else None

    def note(self, command: Command, answer: Acknowledgement, appended: int) -> None:
        package = self.model.setdefault(command.package_id, ModelPackage())
        if command.command_id in package.answers:
            assert appended == 0
            assert answer == package.answers[command.command_id][1]
            return
        package.answers[command.command_id] = (command, answer)
        assert answer.sequence == len(self.log[command.package_id])
        assert answer.event_digest == event_digest(self.log[command.package_id][-1])
        if isinstance(command, IngestFiles):
            assert appended == len(command.files)
            package.paths += [file.relative_path for file in command.files]
            assert [file.relative_path for file in answer.files] == [file.relative_path for file in command.files]
        else:
            assert appended == 1
        if isinstance(command, FinalizePackage):
            package.finalized = True
            assert answer.unportable_count == ("A" in package.paths and any(p[0] == "a" for p in package.paths))
            self.check_manifest(command.package_id, package, answer)

    def check_manifest(self, package_id: UUID, package: ModelPackage, answer: Acknowledgement) -> None:
        event = self.log[package_id][-1]
        document = manifest.decode(event.payload.manifest)  # type: ignore[union-attr,arg-type] # small: always inline
        assert event.payload_digest == answer.manifest_digest
        assert [file.relative_path for file in document.files] == sorted(package.paths, key=str.encode)
        assert [r.file_id for r in document.storage_receipts] == [f.file_id for f in document.files]
        assert document.package.finalized_at == event.created_at

    @invariant()
    def every_log_is_whole(self) -> None:
        for package_id, events in self.log.items():
            assert [event.sequence for event in events] == list(range(1, len(events) + 1))
            previous = NO_DIGEST
            for event in events:
                assert event.package_id == package_id
                assert event.previous_digest == previous
                assert payload_digest_holds(event)
                assert decode(encode(event)) == event
                previous = event_digest(event)

    @invariant()
    def a_fresh_fold_gives_the_same_state(self) -> None:
        for package_id, events in self.log.items():
            state: PackageState | None = None
            for event in events:
                state = evolve(state, event)
            assert state == self.states[package_id]


TestRegistry = pytest.mark.slow(RegistryMachine.TestCase)
TestRegistry.settings = settings(
    max_examples=2_000, stateful_step_count=12, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
