"""A partition's writer tells what waits for it, and who looks after it, how it is, whatever its thread waits for."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from contextlib import suppress
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest

from services.core.commands import IngestFiles
from services.errors import RejectedError, UnavailableError
from services.log.kafka.context import Counts
from services.log.kafka.requests import Request
from services.log.kafka.writer import PartitionWriter, _given_up
from services.log.port import PartitionNotOwnedError
from tests.integration.kafka_stage import create_in
from tests.unit.commands import stored


@pytest.fixture
async def writer() -> PartitionWriter:
    """One whose thread does not run, as if it hung in a call."""
    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts())
    return PartitionWriter(0, cast("Any", context))


async def test_what_waits_learns_at_once_that_the_partition_moves(writer: PartitionWriter) -> None:
    answers = [writer.submit(create_in(0)) for _ in range(3)]
    writer.stop()
    async with asyncio.timeout(10):
        outcomes = await asyncio.gather(*answers, return_exceptions=True)
    assert {type(outcome) for outcome in outcomes} == {PartitionNotOwnedError}
    with pytest.raises(PartitionNotOwnedError):
        writer.submit(create_in(0))


async def test_what_a_failed_transaction_held_is_let_go(writer: PartitionWriter) -> None:
    class Held:
        """As large as a batch's records."""

    gone: list[weakref.ref[Held]] = []

    def fails(*_: object) -> None:
        held = Held()
        gone.append(weakref.ref(held))
        raise UnavailableError("the records were not taken")

    writer._answers = fails  # type: ignore[method-assign,assignment]  # the log is not reached
    writer.submit(create_in(0))
    batch = writer._waiting.take(1.0)
    assert batch is not None
    asides = SimpleNamespace(holds=lambda _: False, cancel=list)
    gc.disable()
    try:
        with suppress(UnavailableError):
            writer._serve(cast("Any", None), cast("Any", asides), batch)
        assert gone[0]() is None, "only the collector of cycles would free it"
    finally:
        gc.enable()
    assert [(request.failures, request.last_failure) for request in batch] == [(1, "UnavailableError")]


@pytest.mark.parametrize(("files", "kind"), [(1, RejectedError), (2, UnavailableError)])
def test_a_command_of_several_events_is_not_refused_for_good_for_what_is_sent_at_once(
    files: int, kind: type[Exception]
) -> None:
    command = IngestFiles(uuid4(), uuid4(), "ada", tuple(stored(f"{n}.bin") for n in range(files)))
    request = Request(command, cast("Any", None))
    request.failed("KafkaException", spoiled=True)
    assert type(_given_up(request)) is kind


async def test_a_transaction_that_does_not_end_is_told_of(writer: PartitionWriter) -> None:
    writer._trouble = None
    assert writer.status("this process").trouble is None
    writer._serving_since = time.monotonic() - 60
    assert writer.status("this process").trouble == "a transaction has not come to its end for 60 s"
