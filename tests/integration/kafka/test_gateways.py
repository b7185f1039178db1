"""Several gateways on one Kafka log: they share its partitions, forward to each other, and hand over on leaving."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from artifact_store.errors import (
    ConfigurationError,
    DuplicateRelativePathError,
    ForbiddenError,
    PackageNotFoundError,
    PushBackError,
    UnavailableError,
)
from artifact_store.events import Event
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core import decide as core
from services.core.access import Grant, Right
from services.core.decide import (
    Command,
    CreatePackage,
    FinalizePackage,
    IngestCheck,
    IngestFiles,
    IngestTogether,
    Limits,
)
from services.core.state import PackageState
from services.log.kafka import KafkaLog, KafkaWriter, driver
from services.log.port import PartitionNotOwnedError
from services.log.sequencer import queue as requests
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready, settled
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    PARTITIONS,
    create_in,
    gateway,
    lone_writer,
    open_kafka_log,
    owned,
    shared,
)
from tests.standstill import Standstill

pytestmark = pytest.mark.services

HAND_OVER_SECONDS = 2.0


async def test_gateways_share_the_partitions_and_take_each_other_s_commands(kafka: Settings, log: KafkaLog) -> None:
    async with gateway(kafka, log) as one, gateway(kafka, log) as two:
        await shared(one, two)
        await ready(one)
        await ready(two)
        done: list[tuple[Command, Acknowledgement]] = []
        for n in range(12):
            made = create_in(n % PARTITIONS)
            first, second = (one, two) if n % 2 else (two, one)
            added = IngestFiles(made.package_id, uuid4(), "ada", (stored("a"), stored("b")))
            ended = FinalizePackage(made.package_id, uuid4(), "ada")
            done += [(made, await first.submit(made))]
            await second.check_ingest(IngestCheck(made.package_id, ["a"], None))
            done += [(added, await second.submit(added)), (ended, await first.submit(ended))]
            for writer in (one, two):
                assert await writer.submit(made) == done[-3][1]
                assert await writer.submit(ended) == done[-1][1]
    assert_recorded_once(await read_valid(log), done)


async def test_refusals_are_the_same_wherever_they_are_asked_for(kafka: Settings, log: KafkaLog) -> None:
    async with gateway(kafka, log) as one, gateway(kafka, log) as two:
        await shared(one, two)
        for partition in range(PARTITIONS):
            made, unknown = create_in(partition), create_in(partition)
            await one.submit(made)
            await one.submit(IngestFiles(made.package_id, uuid4(), "ada", (stored("a"),)))
            for writer in (one, two):
                with pytest.raises(DuplicateRelativePathError):
                    await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))
                with pytest.raises(PackageNotFoundError):
                    await writer.submit(FinalizePackage(unknown.package_id, uuid4(), "ada"))
                # And so are those of senders who may not write to the package, or not even know of it.
                for right, refusal in ((Right.READ, ForbiddenError), (Right.OPERATE, PackageNotFoundError)):
                    grants = (Grant(frozenset({right})),)
                    with pytest.raises(refusal):
                        await writer.check_ingest(IngestCheck(made.package_id, ["b"], None, grants))
                    with pytest.raises(refusal):
                        await writer.submit(FinalizePackage(made.package_id, uuid4(), "ada", grants))
                    with pytest.raises(ForbiddenError):
                        await writer.submit(replace(create_in(partition), grants=grants))


async def test_who_owns_what_is_shown_to_operators(kafka: Settings, log: KafkaLog) -> None:
    async with gateway(kafka, log) as one, gateway(kafka, log) as two:
        mine, _ = await shared(one, two)
        shown = {status.partition: status for status in await one.status()}
        for p in range(PARTITIONS):
            if p in mine:
                assert shown[p].owner == "this process"
                assert (shown[p].takeover_seconds or 0) > 0
            else:
                assert (shown[p].owner or "").startswith("http://127.0.0.1:")
                assert shown[p].since is None


async def test_a_gateway_that_closes_finishes_what_it_took_and_hands_over_within_two_seconds(
    kafka: Settings, log: KafkaLog
) -> None:
    async with AsyncExitStack() as leaving, gateway(kafka, log) as staying:
        goer = await leaving.enter_async_context(gateway(kafka, log))
        _, handed = await shared(staying, goer)
        commands = [create_in(p) for p in handed for _ in range(100)]
        accepted = [asyncio.ensure_future(goer.submit(command)) for command in commands]
        await asyncio.sleep(0)
        with Standstill() as machine:
            began = time.monotonic()
            closing = asyncio.ensure_future(leaving.aclose())
            later = [create_in(p) for p in handed]
            done = [(command, await settled(staying, command)) for command in later]
            took = time.monotonic() - began
        await closing
        done += list(zip(commands, await asyncio.gather(*accepted), strict=True))
        with pytest.raises(PushBackError):
            await goer.submit(create_in(0))
        with pytest.raises(PartitionNotOwnedError):
            await goer.submit_here(create_in(0))
    assert_recorded_once(await read_valid(log), done)
    assert took - machine.longest(began) < HAND_OVER_SECONDS


async def test_a_command_for_a_writer_that_cannot_be_reached_is_unavailable_within_a_bound(
    kafka: Settings, log: KafkaLog
) -> None:
    async with lone_writer(kafka, log) as one, lone_writer(kafka, log, submit_seconds=1.0) as two:
        others, _ = await shared(one, two)
        other = others.pop()
        assert "cannot be forwarded" in (await two.ready() or "")
        with pytest.raises(UnavailableError, match="another process that cannot be reached"):
            await two.submit(create_in(other))
        await one.submit(create_in(other))
    assert len(await read_valid(log)) == 1


async def test_a_partition_whose_queue_is_full_pushes_back_and_loses_nothing(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requests, "MAX_WAITING_BYTES", 20_000)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        commands = [create_in(0) for _ in range(200)]
        answers = await asyncio.gather(*(writer.submit(command) for command in commands), return_exceptions=True)
        pushed = [answer for answer in answers if isinstance(answer, PushBackError)]
        done = [(c, a) for c, a in zip(commands, answers, strict=True) if not isinstance(a, BaseException)]
        assert len(pushed) + len(done) == len(commands)
        assert pushed
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == len(done)


async def test_a_manifest_that_cannot_be_stored_leaves_the_package_open(kafka: Settings, log: KafkaLog) -> None:
    down = True

    async def put(_: bytes) -> None:
        if down:
            raise OSError("the blob store is down")

    writer = KafkaWriter(kafka, log, limits=Limits(inline_manifest_bytes=0), put_manifest=put)
    await writer.start()
    try:
        made = create_in(1)
        ended = FinalizePackage(made.package_id, uuid4(), "ada")
        await writer.submit(made)
        with pytest.raises(UnavailableError, match="nothing is recorded"):
            await writer.submit(ended)
        assert len(await read_valid(log)) == 1
        down = False
        done = [(ended, await writer.submit(ended))]
    finally:
        await writer.close()
    assert_recorded_once([event async for event in log.read()], done)


@pytest.mark.parametrize("case", ["all well", "one refused", "the code fails"])
async def test_commands_that_add_files_to_a_package_are_decided_together_if_they_can_be(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    asked: list[int] = []

    def decide(
        state: PackageState | None, command: Command | IngestTogether, now: int, limits: Limits
    ) -> Sequence[Event]:
        if isinstance(command, IngestTogether):
            asked.append(len(command.commands))
            if case == "the code fails":
                raise ZeroDivisionError
        return core.decide(state, command, now, limits)

    monkeypatch.setattr("services.log.sequencer.partition_writer.decide", decide)
    made = create_in(0)
    paths = [f"{number}.txt" for number in range(40)]
    if case == "one refused":
        paths[20] = paths[19]
    commands = [IngestFiles(made.package_id, uuid4(), "ada", (stored(path),)) for path in paths]
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        done: list[tuple[Command, Acknowledgement]] = [(made, await writer.submit(made))]
        answers = await asyncio.gather(*(writer.submit(command) for command in commands), return_exceptions=True)
    refused = [n for n, answer in enumerate(answers) if isinstance(answer, DuplicateRelativePathError)]
    assert refused == ([20] if case == "one refused" else [])
    done += [(c, a) for c, a in zip(commands, answers, strict=True) if not isinstance(a, BaseException)]
    assert len(done) == 1 + len(paths) - len(refused)
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert [event.command_id for event in events] == [command.command_id for command, _ in done]
    assert max(asked) > 10, "the commands did not share a transaction"
    assert ("cannot be decided together" in caplog.text) == (case == "the code fails")


async def test_a_right_that_was_taken_away_and_given_back_is_only_a_delay(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    take_over, refused = driver.PartitionLease.take_over, 0

    def without_right(*given: Any, **named: Any) -> driver.PartitionLease:
        nonlocal refused
        if refused < PARTITIONS:
            refused += 1
            raise ConfigurationError("Kafka refuses it")
        return take_over(*given, **named)

    monkeypatch.setattr(driver.PartitionLease, "take_over", without_right)
    monkeypatch.setattr("services.log.sequencer.queue.REFUSE_SECONDS", 0.2)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        answers = await asyncio.gather(*(writer.submit(create_in(n)) for n in range(PARTITIONS)))
    assert refused == PARTITIONS
    assert len(answers) == len(await read_valid(log))


async def test_a_command_that_the_code_cannot_handle_does_not_disturb_the_others(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(state: PackageState | None, command: Command, now: int, limits: Limits) -> Sequence[Event]:
        if isinstance(command, CreatePackage) and command.name == "poison":
            raise ZeroDivisionError
        return core.decide(state, command, now, limits)

    monkeypatch.setattr("services.log.sequencer.partition_writer.decide", explode)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        commands = [create_in(0, name="poison" if n == 5 else "fine") for n in range(20)]
        answers = await asyncio.gather(*(writer.submit(command) for command in commands), return_exceptions=True)
    assert [n for n, answer in enumerate(answers) if isinstance(answer, BaseException)] == [5]
    assert len(await read_valid(log)) == 19


async def test_commands_reach_their_owner_while_the_group_s_coordinator_is_away(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with open_kafka_log(kafka) as cut, gateway(kafka, log) as one, gateway(kafka, cut) as two:
        others, _ = await shared(one, two)
        other = others.pop()
        away = CoordinatorAway(monkeypatch, two)
        done: list[tuple[Command, Acknowledgement]] = []

        async def written_unasked() -> bool:
            made = create_in(other)
            done.append((made, await two.submit(made)))
            return away.asked > 1

        async with asyncio.timeout(20):
            await until(written_unasked, 20, "the group was not asked")
        assert await two.ready() is None
    assert_recorded_once(await read_valid(log), done)


async def test_a_command_that_the_last_known_owner_refuses_is_recorded_by_the_next_one(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with (
        open_kafka_log(kafka) as second,
        open_kafka_log(kafka) as third,
        gateway(kafka, log) as one,
        gateway(kafka, second) as two,
    ):
        of_one, of_two = await shared(one, two)
        # The third is given one of the two partitions that either of them has.
        loser, before, asker = (one, of_one, two) if len(of_one) > len(of_two) else (two, of_two, one)
        away = CoordinatorAway(monkeypatch, asker)
        refused = asyncio.Event()
        carry_out = loser.submit_here

        async def watched(command: Command) -> Acknowledgement:
            try:
                return await carry_out(command)
            except PartitionNotOwnedError:
                refused.set()
                raise

        monkeypatch.setattr(loser, "submit_here", watched)
        async with gateway(kafka, third) as three:

            async def moved() -> bool:
                return len(await owned(three)) == 1

            await until(moved, PATIENCE_SECONDS, "the third is given no partition")
            made = create_in((before & await owned(three)).pop())
            answer = asyncio.ensure_future(asker.submit(made))
            async with asyncio.timeout(30):
                await refused.wait()
            away.ends()
            done = [(made, await answer)]
    assert_recorded_once(await read_valid(log), done)


class CoordinatorAway:
    """Questions about the group that one process asks come to nothing until `ends`; leaders answer."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, writer: KafkaWriter) -> None:
        self._group, self._monkeypatch = writer._group, monkeypatch
        self._describe = self._group._describe
        self.asked = 0
        monkeypatch.setattr(self._group, "_describe", self._unanswered)

    def _unanswered(self, _group: str) -> None:
        self.asked += 1
        raise UnavailableError("Kafka gave no answer in time while describing a group")

    def ends(self) -> None:
        """The coordinator answers again."""
        self._monkeypatch.setattr(self._group, "_describe", self._describe)
