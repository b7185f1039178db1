"""Background jobs: their results are used only if they still hold when the writer gets to them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from artifact_store.errors import UnavailableError
from services.core.decide import Command, Limits, acknowledge, decide
from services.log.sequencer import background
from services.log.sequencer.background import BackgroundJobs
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts, Request
from services.log.state import partition_state as state_module
from services.log.state.partition_state import PartitionState
from services.log.state.state_file import LogPartition, StateFile
from tests import commands

PLACE = LogPartition(UUID(int=7), "t.events", 3)
LIMITS = Limits(inline_manifest_bytes=100)
NOW = 1_000


async def no_manifest(manifest: bytes) -> None:
    raise AssertionError(f"a manifest of {len(manifest)} bytes is to be stored")


def record(state: PartitionState, *asked: Command) -> None:
    """Fold in what the commands become, as if it were read from the log."""
    for each in asked:
        for event in decide(state.package(each.package_id), each, NOW, LIMITS):
            state.apply(event)
        state.confirm(state.next_offset, b"record %d" % state.next_offset)


async def test_a_finalization_that_another_writer_recorded_meanwhile_is_answered_as_it_was(tmp_path: Path) -> None:
    """As after a freeze: the command was held, and reading on brought its event before its manifest was begun."""
    state = PartitionState(StateFile.create(tmp_path / "state.db", PLACE))
    made = commands.create(1)
    command = commands.finalize(made.package_id)

    record(state, made, commands.ingest(made.package_id, "a", "b"))
    woken = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wake() -> None:
        loop.call_soon_threadsafe(woken.set)

    jobs = BackgroundJobs(
        state,
        exclusive=True,
        limits=LIMITS,
        clock=lambda: NOW,
        put_manifest=no_manifest,
        loop=loop,
        wake=wake,
    )
    request = Request(command, loop.create_future())
    assert jobs.holds(request)
    record(state, command)
    state.save()  # a finalized package does not stay in memory
    jobs.begin()
    await asyncio.wait_for(woken.wait(), 10)
    assert jobs.settle() == [request]
    assert not jobs.events(command)
    package = state.package(command.package_id, command.command_id)
    assert package is not None
    assert not decide(package, command, NOW, LIMITS)
    assert acknowledge(package, command).sequence == 4
    state.close()


async def test_a_recorded_command_for_which_there_is_no_place_aside_is_in_doubt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three packages lie in the file alone; their commands were recorded by transactions whose ends were not seen."""
    monkeypatch.setattr(state_module, "LARGE", 2)
    monkeypatch.setattr(background, "MAX_JOBS", 2)
    before = PartitionState(StateFile.create(tmp_path / "state.db", PLACE))
    added = []
    for number in range(3):
        made = commands.create(number)
        added.append(commands.ingest(made.package_id, "a", "b", "c", name=f"ingest {number}"))
        record(before, made, added[-1])
    before.close()
    state = PartitionState(StateFile.open(tmp_path / "state.db", PLACE))
    loop = asyncio.get_running_loop()
    jobs = BackgroundJobs(
        state, exclusive=True, limits=LIMITS, clock=lambda: NOW, put_manifest=no_manifest, loop=loop, wake=lambda: None
    )
    context = SimpleNamespace(loop=loop, submit_seconds=30.0, counts=Counts())
    writer = PartitionWriter(PLACE.partition, cast("Any", context))
    requests = [Request(command, loop.create_future()) for command in added]
    for request in requests:
        request.failed("KafkaException", spoiled=False)
    assert writer._without_held(jobs, requests) == []
    async with asyncio.timeout(30):
        with pytest.raises(UnavailableError, match="the outcome is unknown"):
            await requests[2].answer
    assert not requests[0].answer.done()
    assert not requests[1].answer.done()
    state.close()
