"""Two writers of one partition, open foreign transactions, and commands that Kafka refuses."""

from __future__ import annotations

import asyncio
import base64
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any
from uuid import uuid4

import confluent_kafka.admin
import pytest
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition

from artifact_store.errors import (
    InvalidPositionError,
    PackageNotFoundError,
    PackageQuarantinedError,
    RejectedError,
    UnavailableError,
)
from artifact_store.events import Event, PackageCreated
from artifact_store.models import Acknowledgement
from benchmarks.kafka_topics import read_records
from schemas.codec import decode, encode
from schemas.headers import headers
from schemas.runs import encode_all
from services.config import Settings
from services.core.decide import Command, FinalizePackage, IngestCheck, IngestFiles, IngestTogether, Limits, decide
from services.log.kafka import KafkaLog, KafkaWriter, driver
from services.log.kafka.cluster import Cluster
from services.log.kafka.driver import PartitionLease
from services.log.port import PartitionNotOwnedError, Record
from services.log.sequencer.driver import Staged
from services.log.state.restore import States
from services.runtime.clock import system_clock
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    create_in,
    cut_off,
    foreign_transaction,
    lone_writer,
    operate,
    set_on_topic,
)

pytestmark = pytest.mark.services

# The package's types do not mark what its documentation names as exported.
_admin: Any = confluent_kafka.admin


class DeposedLeader(Cluster):
    """Asks a leader that was deposed and does not know it, so that the log ends where it ended then."""

    def __init__(self, log: KafkaLog, ends: Mapping[int, int]) -> None:
        super().__init__(log.kafka)
        self._ends = ends

    def last_stable(self, partitions: Iterable[int]) -> dict[int, int]:
        """See `Cluster`."""
        return {p: self._ends[p] for p in partitions}

    high_watermark = last_stable


async def take_over(
    kafka: Settings,
    log: KafkaLog,
    partition: int,
    *,
    ours: bool = True,
    cluster: Cluster | None = None,
    folder: str = "rivals",
) -> PartitionLease:
    """The right to a partition, without asking any group, and with a separate state."""
    identity = await log.identity()
    states = States(kafka.state_dir.with_name(folder))
    return await asyncio.to_thread(
        lambda: PartitionLease.take_over(
            log.kafka,
            cluster or log.cluster,
            partition,
            identity,
            states,
            is_ours=lambda: ours,
            stopping=lambda: False,
            in_doubt=lambda: False,
        )
    )


def carry_out(holder: PartitionLease, command: Command) -> None:
    """Decide a command and append what it becomes."""
    now = max(system_clock(), holder.state.last_created_at)
    package = holder.state.package(command.package_id)
    events = decide(package, command, now, Limits())
    holder.state.fold(package, events)
    append(holder, events)


def append(holder: PartitionLease, events: Sequence[Event]) -> None:
    """Append a command's events in a separate transaction."""
    holder.commit(holder.hand_over([staged(events, None)]))


CREATED = PackageCreated("n", "p", "s", "scratch", 7, "{}")


def staged(events: Sequence[Event], *traceparents: str | None) -> Staged:
    """The events as they are handed over."""
    return Staged(events, encode_all(events), traceparents, CREATED)


async def test_who_was_cut_off_can_append_nothing_more_and_its_successor_knows_all_it_wrote(
    kafka: Settings, log: KafkaLog
) -> None:
    first = await take_over(kafka, log, 0)
    made = create_in(0)
    await asyncio.to_thread(carry_out, first, made)
    second = await take_over(kafka, log, 0)
    assert second.state.package(made.package_id) == first.state.package(made.package_id)
    with pytest.raises((KafkaException, SystemError)):
        await asyncio.to_thread(carry_out, first, create_in(0))
    await asyncio.to_thread(carry_out, second, create_in(0))
    for holder in (first, second):
        await asyncio.to_thread(holder.close)
    assert len(await read_valid(log)) == 2


async def test_a_successor_knows_what_was_appended_although_a_deposed_leader_answers_where_the_log_ends(
    kafka: Settings, log: KafkaLog
) -> None:
    deposed = DeposedLeader(log, {0: 0})
    first = await take_over(kafka, log, 0)
    made = create_in(0)
    await asyncio.to_thread(carry_out, first, made)
    second = await take_over(kafka, log, 0, cluster=deposed, folder="empty disk")
    known = second.state.package(made.package_id)
    for holder in (first, second):
        await asyncio.to_thread(holder.close)
    assert known is not None, "a retry would create the package a second time"
    assert made.command_id in known.commands


async def test_the_end_that_a_take_over_reads_up_to_is_seen_by_nobody(kafka: Settings, log: KafkaLog) -> None:
    for _ in range(3):
        holder = await take_over(kafka, log, 0)
        await asyncio.to_thread(holder.close)
    assert (await log.end()).offsets[0] > 0
    assert await read_valid(log) == []
    scanned = [record async for batch in log.scan({0: 0}, (await log.end()).offsets) for record in batch.records]
    assert scanned == []
    stranger = Consumer({**log.kafka.reader(), "isolation.level": "read_uncommitted"})
    stranger.assign([TopicPartition(log.kafka.topic, 0, 0)])
    barriers = await asyncio.to_thread(stranger.consume, 3, 30.0)
    stranger.close()
    assert [(b.key(), b.value()) for b in barriers] == [(None, None)] * 3


async def test_a_take_over_leaves_nothing_that_retention_would_delete(kafka: Settings, log: KafkaLog) -> None:
    """A broker deletes a segment by its latest time, and a log whose beginning is gone is refused for good."""
    holder = await take_over(kafka, log, 0)
    await asyncio.to_thread(carry_out, holder, create_in(0))
    await asyncio.to_thread(holder.close)
    await asyncio.to_thread(set_on_topic, log, **{"retention.ms": "31536000000"})
    old = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    for decoy in (1, 2):  # one after the other, so that a whole pass over all partitions lies between
        for time_ms in (1, 0):  # the second has the time of now, and begins a segment
            old.produce(log.kafka.topic, b"old", b"key", decoy, timestamp=time_ms)
            assert await asyncio.to_thread(old.flush, 30) == 0

        async def deleted(decoy: int = decoy) -> bool:
            return (await asyncio.to_thread(log.cluster.earliest, [decoy]))[decoy] > 0

        await until(deleted, 30, "the broker deletes nothing")
    assert await asyncio.to_thread(log.cluster.earliest, [0]) == {0: 0}


async def test_nothing_is_committed_behind_what_the_writer_has_not_read(kafka: Settings, log: KafkaLog) -> None:
    """As when the take-over's end was not the end: somebody's event lies between it and the first transaction."""
    made, late = create_in(0), create_in(0)
    holder = await take_over(kafka, log, 0)
    (event,) = decide(None, made, system_clock(), Limits())
    stranger = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    stranger.produce(log.kafka.topic, encode(event), str(event.package_id), 0)
    assert await asyncio.to_thread(stranger.flush, 30) == 0
    with pytest.raises(UnavailableError, match="another process has written to the partition"):
        await asyncio.to_thread(carry_out, holder, late)
    await asyncio.to_thread(holder.close)
    next_holder = await take_over(kafka, log, 0)
    await asyncio.to_thread(next_holder.close)
    assert [event.package_id for event in await read_valid(log)] == [made.package_id]


async def test_what_a_predecessor_left_uncommitted_is_gone_for_its_successor(kafka: Settings, log: KafkaLog) -> None:
    first = await take_over(kafka, log, 1)
    producer = first._producer
    assert producer is not None
    producer.begin_transaction()
    producer.produce(log.kafka.topic, b"left behind", b"key", 1)
    producer.flush(30)
    second = await take_over(kafka, log, 1)
    made = create_in(1)
    await asyncio.to_thread(carry_out, second, made)
    for holder in (first, second):
        await asyncio.to_thread(holder.close)
    assert [event.package_id for event in await read_valid(log)] == [made.package_id]


async def test_nobody_is_cut_off_by_who_does_not_own_the_partition(kafka: Settings, log: KafkaLog) -> None:
    owner = await take_over(kafka, log, 0)
    with pytest.raises(PartitionNotOwnedError):
        await take_over(kafka, log, 0, ours=False)
    await asyncio.to_thread(carry_out, owner, create_in(0))
    await asyncio.to_thread(owner.close)


async def test_commands_are_settled_exactly_once_when_rivals_cut_the_writer_off_again_and_again(
    kafka: Settings, log: KafkaLog
) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        done: list[tuple[Command, Acknowledgement]] = []

        async def client(n: int) -> None:
            for _ in range(30):
                command = create_in(n % 3)
                done.append((command, await writer.submit(command)))
                added = IngestFiles(command.package_id, uuid4(), "ada", (stored("a"), stored("b")))
                done.append((added, await writer.submit(added)))

        clients = [asyncio.ensure_future(client(n)) for n in range(12)]
        for n in range(9):
            await asyncio.to_thread(cut_off, log, n % 3)
        await asyncio.gather(*clients)
        assert all(status.since is not None for status in await writer.status())
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == 12 * 30 * 3


async def test_a_refusal_is_never_given_on_a_state_that_another_has_moved_on(kafka: Settings, log: KafkaLog) -> None:
    """As after a freeze: another process owned the partition for a while, and this one does not know it yet."""
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        made = create_in(2)
        with pytest.raises(PackageNotFoundError):
            await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))
        rival = await take_over(kafka, log, 2)
        await asyncio.to_thread(carry_out, rival, made)
        await asyncio.to_thread(rival.close)
        await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))
        done = [(made, await writer.submit(made))]
        ended = FinalizePackage(made.package_id, uuid4(), "ada")
        done_too = [(ended, await writer.submit(ended))]
    assert_recorded_once(await read_valid(log), [*done, *done_too])


async def test_a_refusal_is_never_given_on_what_a_deposed_leader_says_of_the_end(
    kafka: Settings, log: KafkaLog
) -> None:
    log.cluster = DeposedLeader(log, (await log.end()).offsets)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        made = create_in(2)
        with pytest.raises(PackageNotFoundError):
            await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))
        rival = await take_over(kafka, log, 2)
        await asyncio.to_thread(carry_out, rival, made)
        await asyncio.to_thread(rival.close)
        await writer.check_ingest(IngestCheck(made.package_id, ["a"], None))


async def test_a_reader_does_not_stop_for_what_a_deposed_leader_says_of_the_end(kafka: Settings, log: KafkaLog) -> None:
    holder = await take_over(kafka, log, 0)
    await asyncio.to_thread(carry_out, holder, create_in(0))
    end = await log.end()
    await asyncio.to_thread(carry_out, holder, create_in(0))
    await asyncio.to_thread(holder.close)
    log.cluster = DeposedLeader(log, dict.fromkeys(range(3), 0))
    follower = log.read(end, follow=True)
    assert (await anext(follower)).position.covers(end)
    await follower.aclose()
    assert (await log.end(end)).covers(end)

    async def where_it_stood(partitions: Sequence[int]) -> Mapping[int, int]:
        return {p: end.offsets[p] for p in partitions}

    subscription = await log.subscribe("usage", where_it_stood)
    found: list[Record] = []
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not found:
            found += (await subscription.poll(10, 1.0)).records
    await subscription.close()
    assert [record.partition for record in found] == [0]


async def test_a_writer_proves_where_its_partition_ends_whatever_a_deposed_leader_says(
    kafka: Settings, log: KafkaLog
) -> None:
    real = log.cluster
    log.cluster = DeposedLeader(log, dict.fromkeys(range(3), 0))
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await writer.submit(create_in(2))
        rival = await take_over(kafka, log, 2)
        await asyncio.to_thread(carry_out, rival, create_in(2))
        last = rival.state.next_offset
        await asyncio.to_thread(rival.close)
        found = await writer.end(range(3))
    log.cluster = real
    assert found.offsets.keys() == {0, 1, 2}
    assert found.offsets[2] >= last
    assert (await log.end()).covers(found)


async def test_a_reader_stops_beyond_the_end_that_all_brokers_name(kafka: Settings, log: KafkaLog) -> None:
    beyond = (await log.end()).after(0, 1_000)
    with pytest.raises(InvalidPositionError):
        await anext(log.read(beyond))
    assert not (await log.end(beyond)).covers(beyond)


async def test_refusals_add_nothing_to_the_log_and_share_their_proofs(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    proofs: list[float] = []
    prove = PartitionLease.prove

    def counted(holder: PartitionLease) -> None:
        proofs.append(time.monotonic())
        prove(holder)

    monkeypatch.setattr(PartitionLease, "prove", counted)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        before = await log.end()

        async def refused() -> None:
            for _ in range(20):
                with pytest.raises(PackageNotFoundError):
                    await writer.check_ingest(IngestCheck(create_in(1).package_id, ["a"], None))

        await asyncio.gather(*(refused() for _ in range(20)))
        assert await log.end() == before
        done = [(made, await writer.submit(made)) for made in [create_in(1) for _ in range(5)]]
    assert 0 < len(proofs) <= 60  # each of the twenty in a row waits for one, or for two when it comes during one
    assert all(later - earlier >= driver.PROOF_SECONDS for earlier, later in pairwise(proofs))
    assert_recorded_once(await read_valid(log), done)


async def named(writer: KafkaWriter) -> None:
    """Wait until the writer says that a transaction is in its way."""

    async def found() -> bool:
        return "open since offset" in (await writer.ready() or "")

    await until(found, PATIENCE_SECONDS, "the cause is not named")


async def test_a_stranger_s_open_transaction_bounds_a_take_over_and_is_named(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 0.5)
    with foreign_transaction(log, 1):
        async with lone_writer(kafka, log, submit_seconds=3.0) as writer:
            await named(writer)
            with pytest.raises(UnavailableError, match=r"transaction that is open since offset 0"):
                await writer.submit(create_in(1))
            assert "kafka-transactions.sh" in (await writer.ready() or "")
        async with lone_writer(kafka, log) as writer:  # one that has time for its own work
            await named(writer)
            await writer.submit(create_in(0))
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await writer.submit(create_in(1))
    assert len(await read_valid(log)) == 2


async def test_a_command_below_a_stranger_s_transaction_waits_and_is_settled_once_when_it_ends(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "PATIENCE_SECONDS", 0.5)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        commands = [create_in(1) for _ in range(20)]
        with foreign_transaction(log, 1):
            answers = [asyncio.ensure_future(writer.submit(command)) for command in commands]
            await named(writer)
            assert not any(answer.done() for answer in answers)
        done = list(zip(commands, await asyncio.gather(*answers), strict=True))
        await ready(writer)
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == len(commands)


async def test_a_command_that_the_broker_does_not_take_is_rejected_and_its_neighbours_are_recorded(
    kafka: Settings, log: KafkaLog
) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        entry = _admin.ConfigEntry("max.message.bytes", "20000", incremental_operation=_admin.AlterConfigOpType.SET)
        resource = _admin.ConfigResource(_admin.ResourceType.TOPIC, log.kafka.topic, incremental_configs=[entry])
        await asyncio.to_thread(operate, log, lambda admin: admin.incremental_alter_configs([resource]))
        # What cannot be compressed, so that it is as large for the broker as it is for us.
        noise = base64.b64encode(os.urandom(30_000)).decode()
        poison = create_in(0, metadata=f'{{"noise":"{noise}"}}')
        commands: list[Command] = [create_in(0) for _ in range(30)]
        commands.insert(11, poison)
        answers = await asyncio.gather(*(writer.submit(command) for command in commands), return_exceptions=True)
        refused = [n for n, answer in enumerate(answers) if isinstance(answer, RejectedError)]
        assert refused == [11]
        done = [(c, a) for c, a in zip(commands, answers, strict=True) if not isinstance(a, BaseException)]
        assert len(done) == 30
    events = await read_valid(log)
    assert_recorded_once(events, done)
    assert len(events) == 30


async def test_records_say_of_which_command_they_are_although_several_were_decided_together(
    kafka: Settings, log: KafkaLog
) -> None:
    holder = await take_over(kafka, log, 0)
    made = create_in(0)
    await asyncio.to_thread(carry_out, holder, made)
    *several, torn = (
        IngestFiles(made.package_id, uuid4(), "ada", tuple(stored(path) for path in paths))
        for paths in ("ab", "c", "def", "xyz")
    )
    now, package = max(system_clock(), holder.state.last_created_at), holder.state.package(made.package_id)
    assert package is not None
    together = decide(package, IngestTogether(made.package_id, tuple(several)), now, Limits())
    holder.state.fold(package, together)
    traces = [f"00-{number:032x}-{number:016x}-01" for number in (1, 2)]
    given = [staged(together, traces[0], None, traces[1])]
    first = decide(package, torn, now, Limits())[:1]
    holder.state.apply(first[0])
    given.append(staged(first, None))
    rest = decide(package, torn, now, Limits())
    holder.state.fold(package, rest)
    given.append(staged(rest, traces[0]))
    await asyncio.to_thread(lambda: holder.commit(holder.hand_over(given)))
    await asyncio.to_thread(holder.close)
    found = (await asyncio.to_thread(read_records, log.kafka))[0][1:]
    identity = await log.identity()
    expected = [
        (command.command_id, index, len(command.files), trace)
        for command, trace in zip(several, (traces[0], None, traces[1]), strict=True)
        for index in range(len(command.files))
    ]
    expected += [(torn.command_id, index, 3, trace) for index, trace in enumerate((None, traces[0], traces[0]))]
    assert [decode(record.value).command_id for record in found] == [command for command, _, _, _ in expected]
    for record, (command_id, index, count, trace) in zip(found, expected, strict=True):
        event = decode(record.value)
        assert (event.command_id, event.command_index, event.command_count) == (command_id, index, count)
        assert record.headers == list(headers(event, identity, CREATED, trace).items())


async def test_a_package_without_a_beginning_stops_no_other(kafka: Settings, log: KafkaLog) -> None:
    holder = await take_over(kafka, log, 0)
    made = create_in(0)
    await asyncio.to_thread(carry_out, holder, made)
    torn = create_in(0)
    (created,) = decide(None, torn, system_clock(), Limits())
    await asyncio.to_thread(append, holder, [replace(created, sequence=2)])
    await asyncio.to_thread(holder.close)
    async with lone_writer(kafka, log) as writer:
        with pytest.raises(PackageQuarantinedError):
            await writer.submit(torn)
        for partition in (0, 1):
            await writer.submit(create_in(partition))
        assert (await writer.submit(made)).sequence == 1
        await ready(writer)
