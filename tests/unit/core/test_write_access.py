"""Rights to write: `decide` checks the rights of a command's sender before anything else."""

from __future__ import annotations

from dataclasses import replace

import pytest

from artifact_store.errors import ForbiddenError, PackageNotFoundError
from services.core.access import Grant, Grants, Packages, Right
from services.core.decide import Command, IngestTogether, Limits, decide, require_write
from tests import commands
from tests.unit.core.test_decide import after

CREATE = commands.create()
PACKAGE = CREATE.package_id


def grants(*rights: Right, producer: str = "lab") -> Grants:
    """These rights on packages of the producer; those of `commands` are the lab's."""
    return (Grant(frozenset(rights), Packages((producer,))),)


WRITER, READER = grants(Right.WRITE), grants(Right.READ)
STRANGER = grants(*Right, producer="another lab")
READER_ELSEWHERE_A_WRITER = (*READER, *STRANGER)

COMMANDS: tuple[Command, ...] = (
    commands.ingest(PACKAGE, "a"),
    commands.ingest(PACKAGE, "../no path"),
    commands.ingest(PACKAGE, "kept"),
    commands.ingest(PACKAGE, "kept", name="kept"),
    commands.finalize(PACKAGE),
    commands.finalize(PACKAGE, name="kept"),
)
"""Commands that would be carried out, that would be refused, and the retry of one that was."""

OPEN = CREATE, commands.ingest(PACKAGE, "kept", name="kept")


@pytest.mark.parametrize("states", [OPEN, (*OPEN, commands.finalize(PACKAGE, name="end"))])
@pytest.mark.parametrize("command", COMMANDS)
def test_a_package_that_may_not_be_read_is_none(states: tuple[Command, ...], command: Command) -> None:
    state = after(*states)
    unknown = f"there is no package {PACKAGE}"
    for denied in (STRANGER, ()):
        with pytest.raises(PackageNotFoundError) as error:
            decide(state, replace(command, grants=denied), 0, Limits())
        assert error.value.detail == unknown
    for denied in (READER, READER_ELSEWHERE_A_WRITER):
        with pytest.raises(ForbiddenError):
            decide(state, replace(command, grants=denied), 0, Limits())
    for nobody_s in (STRANGER, READER, WRITER):
        with pytest.raises(PackageNotFoundError) as error:
            require_write(None, replace(command, grants=nobody_s))
        assert error.value.detail == unknown


def test_one_creates_packages_of_ones_own_producers_and_subjects_alone() -> None:
    for denied in (STRANGER, READER, READER_ELSEWHERE_A_WRITER, ()):
        with pytest.raises(ForbiddenError):
            decide(None, replace(CREATE, grants=denied), 0, Limits())
        with pytest.raises(ForbiddenError):  # a retry as well
            decide(after(CREATE), replace(CREATE, grants=denied), 0, Limits())
    decide(None, replace(CREATE, grants=WRITER), 0, Limits())
    decide(None, replace(CREATE, producer="another lab", grants=READER_ELSEWHERE_A_WRITER), 0, Limits())


def test_another_name_needs_the_right_to_delegate_for_the_package() -> None:
    state = after(CREATE)
    elsewhere = (*WRITER, *grants(Right.DELEGATE, Right.READ, producer="another lab"))
    for command, known in ((CREATE, None), (commands.ingest(PACKAGE, "a"), state), (commands.finalize(PACKAGE), state)):
        delegated = replace(command, principal="ci:bot")
        for denied in (WRITER, (*WRITER, *READER), elsewhere):
            with pytest.raises(ForbiddenError, match="the right to delegate does not hold"):
                decide(known, replace(delegated, grants=denied), 0, Limits())
            decide(known, replace(command, grants=denied), 0, Limits())
        for denied in (STRANGER, grants(Right.DELEGATE)):
            with pytest.raises((ForbiddenError, PackageNotFoundError)):
                decide(known, replace(delegated, grants=denied), 0, Limits())
        decide(known, replace(delegated, grants=grants(Right.WRITE, Right.DELEGATE)), 0, Limits())
        decide(known, replace(delegated, grants=(*WRITER, *grants(Right.DELEGATE))), 0, Limits())


def test_who_may_write_need_not_be_able_to_read() -> None:
    state = after(CREATE)
    for command in (commands.ingest(PACKAGE, "a"), commands.finalize(PACKAGE)):
        decide(state, replace(command, grants=WRITER), 0, Limits())


def test_commands_that_are_decided_together_are_each_checked() -> None:
    first, second = (commands.ingest(PACKAGE, name, name=name) for name in ("a", "b"))
    state = after(CREATE)
    decide(state, IngestTogether(PACKAGE, (replace(first, grants=WRITER), second)), 0, Limits())
    with pytest.raises(PackageNotFoundError):
        decide(state, IngestTogether(PACKAGE, (first, replace(second, grants=STRANGER))), 0, Limits())
