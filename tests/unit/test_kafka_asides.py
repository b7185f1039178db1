"""Asides: what was found beside the partition is used only if it still holds when the writer comes to it."""

from __future__ import annotations

import asyncio
from pathlib import Path
from uuid import UUID

from services.core.commands import Command
from services.core.decide import acknowledge, decide
from services.core.limits import Limits
from services.log.kafka.aside import Asides
from services.log.kafka.requests import Request
from services.log.kafka.state import PartitionState
from services.log.kafka.state_file import Place, StateFile
from tests.unit import commands

PLACE = Place(UUID(int=7), "t.events", 3)
LIMITS = Limits(inline_manifest_bytes=100)
NOW = 1_000


async def no_manifest(manifest: bytes) -> None:
    raise AssertionError(f"a manifest of {len(manifest)} bytes is to be stored")


async def test_a_finalization_that_another_writer_recorded_meanwhile_is_answered_as_it_was(tmp_path: Path) -> None:
    """As after a freeze: the command was held, and reading on brought its event before its manifest was begun."""
    state = PartitionState(StateFile.create(tmp_path / "state.db", PLACE))
    made = commands.create(1)
    command = commands.finalize(made.package_id)

    def recorded(*asked: Command) -> None:
        for each in asked:
            for event in decide(state.package(each.package_id), each, NOW, LIMITS).events:
                state.apply(event)
            state.confirm(state.position, b"record %d" % state.position)

    recorded(made, commands.ingest(made.package_id, "a", "b"))
    woken = asyncio.Event()
    loop = asyncio.get_running_loop()

    def wake() -> None:
        loop.call_soon_threadsafe(woken.set)

    asides = Asides(
        state,
        limits=LIMITS,
        clock=lambda: NOW,
        put_manifest=no_manifest,
        loop=loop,
        wake=wake,
    )
    request = Request(command, loop.create_future())
    assert asides.holds(request)
    recorded(command)
    state.save()  # a finalized package does not stay in memory
    asides.begin()
    await asyncio.wait_for(woken.wait(), 10)
    back, failed = asides.settle()
    assert (back, failed) == ([request], [])
    assert asides.decision(command) is None
    package = state.package(command.package_id, command.command_id)
    assert package is not None
    assert decide(package, command, NOW, LIMITS).appended is None
    assert acknowledge(package, command).sequence == 4
    state.close()
