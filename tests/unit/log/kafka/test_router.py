"""Routing: a command that a writer may have recorded is never answered as not recorded."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID

import pytest

from artifact_store.errors import (
    ConfigurationError,
    CorruptError,
    DuplicateRelativePathError,
    PushBackError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from services.core.decide import Command, IngestCheck
from services.log.kafka import writer
from services.log.kafka.ownership import Owner
from services.log.kafka.writer import Router
from services.log.port import NotAppendedError, PackageExtent, PartitionNotOwnedError
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts, Request
from tests.commands import create

MADE = create()
RECORDED = Acknowledgement(MADE.package_id, 1, bytes(32))
QUESTION = IngestCheck(MADE.package_id, ("a",), None)
FULL = PushBackError("too many commands wait for the package's partition", 2.0)
GONE = UnavailableError("the owner of the partition cannot be reached; the outcome is unknown")
MOVED = PartitionNotOwnedError("this process no longer writes to the package's partition")

Answer = Acknowledgement | Exception


class Known:
    """Owners as the group names them, or an error of the group's."""

    def __init__(self) -> None:
        self.failures: list[Exception] = []

    async def all(self) -> Mapping[int, Owner]:
        if self.failures:
            raise self.failures.pop(0)
        return {0: Owner("http://there", is_self=False)}

    async def while_owned(self, _partition: int, _owner: Owner, answer: Awaitable[Any]) -> Any:
        return await answer

    def forget(self) -> None:
        pass


class There:
    """Other processes: each attempt meets the next of these answers, and the last one from then on."""

    def __init__(self, *answers: Answer) -> None:
        self.answers = list(answers)
        self.asked = 0

    async def submit(self, _url: str, _command: Command) -> Acknowledgement:
        self.asked += 1
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    async def check_ingest(self, url: str, _asked: IngestCheck) -> str | None:
        await self.submit(url, MADE)
        return None

    async def end(self, _url: str, _partition: int) -> int | None:
        return None

    async def extent(self, _url: str, _package_id: UUID) -> PackageExtent | None:
        return None


class Here:
    """This process's writer, as `There`."""

    ended = True

    def __init__(self, *answers: Answer) -> None:
        self._there = There(*answers)

    def submit(self, _asked: object, _deadline: float) -> asyncio.Future[Acknowledgement]:
        return asyncio.ensure_future(self._there.submit("", MADE))


@pytest.fixture(autouse=True)
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "_FIRST_PAUSE", 0.001)
    monkeypatch.setattr(writer, "_LONGEST_PAUSE", 0.001)


def router_of(there: There, *, known: Known | None = None, here: object = None, seconds: float = 30.0) -> Router:
    made = Router(cast("Any", known or Known()), there, Counts(), seconds)
    if here is not None:
        made.writers[0] = cast("PartitionWriter", here)
    return made


async def sought(there: There, **parts: Any) -> object:
    return await router_of(there, **parts).answer(0, MADE)


@pytest.mark.parametrize("error", [FULL, ConfigurationError("no right to write"), CorruptError("an event is torn")])
async def test_a_command_that_nobody_tried_hears_what_keeps_it_from_being_written(error: Exception) -> None:
    for before in ([], [MOVED]):
        with pytest.raises(type(error)) as heard:
            await sought(There(*before, error))
        assert heard.value is error


@pytest.mark.parametrize("error", [FULL, ConfigurationError("no right to write"), CorruptError("an event is torn")])
@pytest.mark.parametrize("lost", [GONE, UnavailableError("the partition went to another process")])
async def test_a_command_that_may_be_recorded_is_sought_until_its_writer_has_room(
    lost: Exception, error: Exception
) -> None:
    assert await sought(There(lost, error, MOVED, error, RECORDED)) == RECORDED
    assert await sought(There(error, MOVED, error, RECORDED), here=Here(lost, MOVED)) == RECORDED
    with pytest.raises(UnavailableError, match="the outcome is unknown") as heard:
        await sought(There(lost, error), seconds=0.2)
    assert type(heard.value) is UnavailableError


async def test_what_this_process_s_own_writer_leaves_in_doubt_is_sought_elsewhere() -> None:
    here = Here(UnavailableError("it stopped; the outcome is unknown"), MOVED)
    assert await sought(There(FULL, RECORDED), here=here) == RECORDED
    with pytest.raises(PushBackError):
        await sought(There(FULL), here=Here(MOVED))


async def test_what_this_process_s_own_writer_says_of_a_partition_that_it_keeps_is_the_answer() -> None:
    refused = UnavailableError("Kafka refuses the time of an event; the outcome is unknown")
    here = Here(refused)
    here.ended = False
    with pytest.raises(UnavailableError) as heard:
        await sought(There(RECORDED), here=here)
    assert heard.value is refused


async def test_an_answer_that_does_not_come_leaves_the_outcome_unknown() -> None:
    class Silent(There):
        async def submit(self, _url: str, _command: Command) -> Acknowledgement:
            await asyncio.Event().wait()
            raise AssertionError("never reached")

    with pytest.raises(UnavailableError, match="gave no answer in time; the outcome is unknown"):
        await sought(Silent(RECORDED), seconds=0.05)


async def test_who_the_owner_is_may_be_hidden_for_a_while() -> None:
    known = Known()
    known.failures = [UnavailableError("no answer")]
    with pytest.raises(PushBackError):
        await sought(There(FULL), known=known)
    known.failures = [ConfigurationError("no right to describe the group")]
    with pytest.raises(ConfigurationError):
        await sought(There(RECORDED), known=known)
    known.failures = [ConfigurationError("no right to describe the group")]
    assert await sought(There(RECORDED), known=known, here=Here(GONE, MOVED)) == RECORDED


@pytest.mark.parametrize(
    "error", [NotAppendedError("failed 3 times; nothing is recorded"), DuplicateRelativePathError("it is there")]
)
@pytest.mark.parametrize("doubtful", [False, True])
async def test_what_the_writer_has_decided_is_the_answer(error: Exception, doubtful: bool) -> None:
    there = There(error)
    with pytest.raises(type(error)) as heard:
        await sought(there, here=Here(GONE, MOVED) if doubtful else None)
    assert heard.value is error
    assert there.asked == 1


async def test_a_question_leaves_nothing_in_doubt() -> None:
    with pytest.raises(PushBackError) as heard:
        await router_of(There(GONE, FULL)).answer(0, QUESTION)
    assert heard.value is FULL


async def test_commands_of_a_partition_that_moves_are_answered_by_its_new_writer() -> None:
    """The log may hold the one whose transaction failed, so that a full writer is no answer to it."""
    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts())
    writer = PartitionWriter(0, cast("Any", context))
    seeking = router_of(There(FULL, FULL, RECORDED), here=writer)
    answers = [asyncio.ensure_future(seeking.answer(0, MADE)) for _ in range(2)]
    requests: list[Request] = []
    while len(requests) < len(answers):
        await asyncio.sleep(0)
        requests += writer._queue.take(0) or []
    requests[1].failed("KafkaException", spoiled=False)
    writer._queue.put_back(requests)
    writer.stop()
    async with asyncio.timeout(30):
        heard = await asyncio.gather(*answers, return_exceptions=True)
    assert heard == [FULL, RECORDED]


async def test_a_request_gets_no_more_time_from_the_next_writer_or_from_a_group_that_does_not_answer() -> None:
    class Unknown(Known):
        async def all(self) -> Mapping[int, Owner]:
            await asyncio.Event().wait()
            raise AssertionError("never reached")

    context = SimpleNamespace(loop=asyncio.get_running_loop(), submit_seconds=30.0, counts=Counts())
    for here in (PartitionWriter(0, cast("Any", context)), None):
        began = asyncio.get_running_loop().time()
        with pytest.raises(UnavailableError, match="the outcome is unknown"):
            await sought(There(RECORDED), known=Unknown(), here=here, seconds=0.2)
        assert asyncio.get_running_loop().time() - began < 5.0


async def test_a_router_that_closes_waits_for_what_it_has_taken() -> None:
    answered = asyncio.Event()

    class Late(There):
        async def submit(self, url: str, command: Command) -> Acknowledgement:
            await answered.wait()
            return await super().submit(url, command)

    seeking = router_of(Late(RECORDED))
    answer = asyncio.ensure_future(seeking.answer(0, MADE))
    await asyncio.sleep(0)
    closing = asyncio.ensure_future(seeking.close())
    await asyncio.sleep(0)
    with pytest.raises(PushBackError, match="shut down"):
        await seeking.answer(0, MADE)
    with pytest.raises(PartitionNotOwnedError):
        await seeking.answer_here(0, MADE)
    assert not closing.done()
    answered.set()
    await closing
    assert answer.result() == RECORDED
