"""Appends batches to the embedded log as its sequencer does, without its thread."""

from __future__ import annotations

from collections.abc import Sequence

from artifact_store.models import Acknowledgement
from schemas.runs import encode_all
from services.core.decide import Command, Limits, acknowledge, decide
from services.log.sequencer.driver import Staged
from services.log.sqlite.driver import SqliteDriver
from services.runtime.clock import system_clock


def run(driver: SqliteDriver, commands: Sequence[Command]) -> list[Acknowledgement]:
    """Append a batch of which nothing is refused."""
    driver.begin_batch({command.package_id for command in commands}, appends=True)
    staged, answers, state = list[Staged](), list[Acknowledgement](), driver.state
    now = max(system_clock(), state.last_created_at)
    for command in commands:
        before = state.package(command.package_id, command.command_id)
        events = decide(before, command, now, Limits())
        after = state.fold(before, events)
        answers.append(acknowledge(after, command))
        staged.append(Staged(events, encode_all(events), [None], after.created))
    driver.commit(driver.hand_over(staged))
    driver.end_batch()
    return answers
