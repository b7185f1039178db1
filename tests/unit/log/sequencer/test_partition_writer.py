"""A partition's writer reports its state to waiting callers and supervisors, whatever its thread waits for."""

from __future__ import annotations

import asyncio
import gc
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast
from uuid import uuid4

import pytest
from confluent_kafka import KafkaError, KafkaException

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    ConflictError,
    CorruptError,
    RejectedError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from services.core.decide import IngestFiles, Limits
from services.log.kafka.connection import spoiled_by_record
from services.log.port import HeldError, NotAppendedError, PartitionNotOwnedError
from services.log.records import AdministrativeHead, SkipRecord
from services.log.sequencer import partition_writer as writer_module
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts, Request, given_up
from services.log.state.state_file import Irregular
from tests.commands import stored
from tests.integration.kafka_stage import create_in


@pytest.fixture
async def writer() -> PartitionWriter:
    """One whose thread does not run, as if it hung in a call."""
    driver = SimpleNamespace(spoiled_by_record=spoiled_by_record, cause=str)
    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts(), driver=driver)
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
    batch = writer._queue.take(1.0)
    assert batch is not None
    jobs = SimpleNamespace(holds=lambda _: False, cancel=list)
    lease = SimpleNamespace(exclusive=True)
    gc.disable()
    try:
        with suppress(UnavailableError):
            writer._serve(cast("Any", lease), cast("Any", jobs), batch)
        assert gone[0]() is None, "only the collector of cycles would free it"
    finally:
        gc.enable()
    assert [(request.failures, request.last_failure) for request in batch] == [(1, "the records were not taken")]


@pytest.mark.parametrize(("files", "kind"), [(1, RejectedError), (2, NotAppendedError)])
def test_a_command_of_several_events_is_not_refused_for_good_for_what_is_sent_at_once(
    files: int, kind: type[Exception]
) -> None:
    command = IngestFiles(uuid4(), uuid4(), "ada", tuple(stored(f"{n}.bin") for n in range(files)))
    request = Request(command, cast("Any", None))
    request.failed("KafkaException", spoiled=True)
    assert type(given_up(request, 0)) is kind


async def test_a_transaction_that_does_not_end_is_told_of(writer: PartitionWriter) -> None:
    writer._trouble = None
    assert writer.status("this process").trouble is None
    writer._serving_since = time.monotonic() - 60
    assert writer.status("this process").trouble == "the log has not confirmed a transaction for 60 s"


def test_what_is_given_up_and_recorded_in_part_is_not_said_to_be_nothing() -> None:
    command = IngestFiles(uuid4(), uuid4(), "ada", (stored("a"), stored("b"), stored("c")))
    request = Request(command, cast("Any", None))
    request.failed("KafkaException", spoiled=False)
    assert "nothing is recorded" in str(given_up(request, 0))
    assert "2 of its events are recorded" in str(given_up(request, 2))


async def taken(writer: PartitionWriter, *failures: int) -> tuple[list[Request], list[asyncio.Future[Any]]]:
    """One command each that waits, with which so many transactions failed; and the answers."""
    answers = [writer.submit(create_in(0)) for _ in failures]
    requests = writer._queue.take(1.0) or []
    for request, failed in zip(requests, failures, strict=True):
        for _ in range(failed):
            request.failed("KafkaException", spoiled=False)
    return requests, answers


def kinds(outcomes: Sequence[object]) -> list[type]:
    return [type(outcome) for outcome in outcomes]


async def heard(*answers: asyncio.Future[Any]) -> list[Any]:
    async with asyncio.timeout(30):
        return await asyncio.gather(*answers, return_exceptions=True)


async def test_a_command_whose_transaction_failed_is_in_doubt_when_the_partition_moves(writer: PartitionWriter) -> None:
    requests, answers = await taken(writer, 0, 1)
    writer._queue.put_back(requests)
    writer.stop()
    told = await heard(*answers)
    assert kinds(told) == [PartitionNotOwnedError, UnavailableError]
    assert "the outcome is unknown" in str(told[1])


@pytest.mark.parametrize("error", [ConfigurationError("no right to write"), CorruptError("an event is torn")])
async def test_a_partition_that_refuses_everything_does_not_say_that_what_it_tried_is_not_recorded(
    writer: PartitionWriter, error: ArtifactStoreError
) -> None:
    requests, answers = await taken(writer, 0, 1)
    writer._queue.put_back(requests)
    refusing = asyncio.ensure_future(asyncio.to_thread(writer._refuse_all, error, 3_600.0))
    told = await heard(*answers)
    assert kinds(told) == [type(error), UnavailableError]
    assert "the outcome is unknown" in str(told[1])
    assert str(error) in str(told[1])
    writer.stop()
    await refusing


SKIP = SkipRecord(0, 5, bytes(32), "ada", "a stray producer", uuid4())


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (ConfigurationError("no right to write"), ConflictError),
        (CorruptError("the log begins at offset 7"), ConflictError),
        (UnavailableError("the topic was created again: restart the gateways"), ConflictError),
        (HeldError("the topic compacts"), ConflictError),
        (HeldError("this machine's clock is wrong", own_clock=True), HeldError),  # another process may have none
    ],
)
async def test_a_partition_that_refuses_everything_tells_an_operator_at_once_what_mends_it(
    writer: PartitionWriter, error: ArtifactStoreError, kind: type[Exception]
) -> None:
    before = writer.confirm(SKIP)
    refusing = asyncio.ensure_future(asyncio.to_thread(writer._refuse_all, error, 3_600.0))
    told = await heard(before)
    told += await heard(writer.confirm(SKIP))
    assert kinds(told) == [kind, kind]
    assert all(error.detail in str(answer) for answer in told)
    writer.stop()
    await refusing


async def test_a_confirmation_is_not_left_with_a_writer_that_has_ended(writer: PartitionWriter) -> None:
    before = writer.confirm(SKIP)
    writer.stop()
    assert kinds(await heard(before, writer.confirm(SKIP))) == [PartitionNotOwnedError] * 2


async def test_a_confirmation_is_not_left_with_a_writer_whose_partition_is_another_s(writer: PartitionWriter) -> None:
    writer.disowned = True
    assert kinds(await heard(writer.confirm(SKIP))) == [PartitionNotOwnedError]


async def test_a_confirmation_whose_operator_has_gone_is_not_recorded_later(writer: PartitionWriter) -> None:
    recorded: list[object] = []
    gone, waits = writer.confirm(SKIP), writer.confirm(replace(SKIP, offset=9))
    gone.cancel()

    def record(confirmation: SkipRecord, *_: object) -> AdministrativeHead:
        recorded.append(confirmation.offset)
        return AdministrativeHead(1, bytes(32))

    writer._context.driver.identity = uuid4()  # type: ignore[misc]  # it is read-only where it is real
    writer._context.clock = lambda: 1  # type: ignore[misc]  # it is frozen where it is real
    await asyncio.to_thread(writer._record, cast("Any", SimpleNamespace(record=record)))
    assert kinds(await heard(waits)) == [Acknowledgement]
    assert recorded == [9]


async def test_a_confirmation_that_may_be_recorded_is_in_doubt(writer: PartitionWriter) -> None:
    answer = writer.confirm(SKIP)

    def record(*_: object) -> AdministrativeHead:
        raise KafkaException(KafkaError(KafkaError._TIMED_OUT))

    writer._context.clock = lambda: 1  # type: ignore[misc]  # it is frozen where it is real
    with pytest.raises(KafkaException):
        await asyncio.to_thread(writer._record, cast("Any", SimpleNamespace(record=record)))
    told = await heard(answer)
    assert kinds(told) == [UnavailableError]
    assert "the outcome is unknown" in str(told[0])


@pytest.mark.parametrize("error", [MemoryError(), BlockingIOError()])
async def test_what_cannot_be_decided_for_want_of_memory_is_not_refused_for_good(
    writer: PartitionWriter, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fails(*_: object) -> None:
        raise error

    monkeypatch.setattr(writer_module, "decide", fails)
    writer._context.limits = Limits()  # type: ignore[misc]  # it is frozen where it is real
    (request,), _ = await taken(writer, 0)
    state = SimpleNamespace(package=lambda *_: None, irregular=Irregular())
    jobs = SimpleNamespace(events=lambda _: ())
    outcome = writer._decide(cast("Any", state), cast("Any", jobs), request, 0, [])
    assert type(outcome) is UnavailableError
