"""Which requests of a batch are decided together, and that none of a package overtakes another."""

from __future__ import annotations

import asyncio

from services.core.decide import Command, IngestCheck
from services.log.sequencer.queue import Request, runs_of
from tests.commands import create, finalize, ingest

ONE, TWO = create(1), create(2)


def request(asked: Command | IngestCheck) -> Request:
    """Somebody waits for it."""
    return Request(asked, asyncio.get_running_loop().create_future())


async def test_commands_that_add_files_to_a_package_stand_together_whatever_lies_between_them() -> None:
    first, second = ([request(ingest(made.package_id, f"{n}", name=n)) for n in range(3)] for made in (ONE, TWO))
    batch = [request_ for pair in zip(first, second, strict=True) for request_ in pair]
    assert runs_of([request(create(3)), *batch])[1:] == [first, second]


async def test_nothing_of_a_package_overtakes_what_came_before_it() -> None:
    package = TWO.package_id
    made, question = request(TWO), request(IngestCheck(package, ("c",), None))
    a, b, c, d = (request(ingest(package, path, name=path)) for path in "abcd")
    ended = request(finalize(package))
    assert runs_of([made, a, b, question, c, ended, d]) == [[made], [a, b], [question], [c], [ended], [d]]


async def test_a_command_that_failed_before_is_decided_by_itself() -> None:
    a, b, c = (request(ingest(ONE.package_id, path, name=path)) for path in "abc")
    b.failures = 1
    assert runs_of([a, b, c]) == [[a], [b], [c]]
