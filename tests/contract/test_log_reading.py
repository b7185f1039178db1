"""The contract of the log of record, which both adapters must pass: reading, positions, subscriptions."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from uuid import UUID, uuid4

import pytest

from artifact_store.errors import CorruptError, InvalidPositionError, LogIdentityError
from artifact_store.position import Position
from schemas.codec import decode
from services.core.decide import Command
from services.log.port import Record
from tests.commands import create, finalize, ingest
from tests.contract.log_invariants import read_valid
from tests.contract.log_stage import (
    PATIENCE_SECONDS,
    Projection,
    Stage,
    by_package,
    fill,
    first,
    settled,
)


async def test_an_empty_log_has_an_end_and_nothing_to_read(stage: Stage) -> None:
    end = await stage.log.end()

    assert [event async for event in stage.log.read()] == []
    assert [event async for event in stage.log.read(end)] == []
    assert end.log == await stage.log.identity()


async def test_reading_on_from_any_event_gives_exactly_the_rest(stage: Stage) -> None:
    await fill(stage)
    events = await read_valid(stage.log)

    for index, event in enumerate(events):
        rest = [found async for found in stage.log.read(event.position)]
        assert by_package(rest) == {p: s for p, s in by_package(events[index + 1 :]).items() if s}
    assert [found async for found in stage.log.read(await stage.log.end())] == []


async def test_a_scan_gives_every_record_between_two_positions_of_the_log(stage: Stage) -> None:
    await fill(stage)
    events = await read_valid(stage.log)
    half, end = events[len(events) // 2].position, await stage.log.end()

    records: list[Record] = []
    reached: dict[int, int] = {}
    async for batch in stage.log.scan({p: half.offsets.get(p, 0) for p in end.offsets}, end.offsets):
        records += batch.records
        reached.update(batch.next_offsets)
    until_half = [batch async for batch in stage.log.scan(dict.fromkeys(half.offsets, 0), half.offsets)]

    assert by_package([decode(r.value) for r in records]) == by_package(events[len(events) // 2 + 1 :])
    assert {p: offset for p, offset in end.offsets.items() if offset > half.offsets.get(p, 0)} == reached
    before = [decode(record.value) for batch in until_half for record in batch.records]
    assert by_package(before) == by_package(events[: len(events) // 2 + 1])
    with pytest.raises(CorruptError):
        [batch async for batch in stage.log.scan(end.offsets, {p: offset + 1 for p, offset in end.offsets.items()})]


async def test_a_position_survives_as_text(stage: Stage) -> None:
    await fill(stage)
    events = await read_valid(stage.log)
    half = Position.parse(str(events[len(events) // 2].position))

    rest = [event async for event in stage.log.read(half)]

    assert by_package(rest) == by_package(events[len(events) // 2 + 1 :])
    assert (await stage.log.end()).covers(half)


async def test_one_package_can_be_read_alone_from_any_position(stage: Stage) -> None:
    await fill(stage)
    events = await read_valid(stage.log)
    chosen = events[0].package_id
    mine = [event for event in events if event.package_id == chosen]
    end = await stage.log.end()

    alone = [event async for event in stage.log.read(package_id=chosen)]
    # A position also says how far other partitions had been read.
    assert [replace(event, position=end) for event in alone] == [replace(event, position=end) for event in mine]
    for event in events:
        rest = [found.sequence async for found in stage.log.read(event.position, package_id=chosen)]
        partition = stage.log.partition_of(chosen)
        reached = event.position.offsets.get(partition, 0)
        assert rest == [found.sequence for found in mine if found.position.offsets[partition] > reached]
    assert [event async for event in stage.log.read(package_id=uuid4())] == []


async def test_reading_ends_where_the_log_ended_when_it_began(stage: Stage) -> None:
    made = create()
    async with stage.writer() as writer:
        await settled(writer, made)
        found = []
        async for event in stage.log.read():
            found.append(event)
            await settled(writer, ingest(made.package_id, f"{len(found)}", name=len(found)))

    assert len(found) == 1


@pytest.mark.parametrize("alone", [False, True], ids=["all packages", "one package"])
async def test_a_follower_sees_what_comes_later(stage: Stage, alone: bool) -> None:
    made, other = create(), create("other")
    chosen = made.package_id if alone else None
    async with stage.writer() as writer:
        await settled(writer, made)
        end = await stage.log.end()
        follower = asyncio.create_task(first(stage.log.read(end, package_id=chosen, follow=True), 3))
        sent: list[Command] = [ingest(made.package_id, "a"), ingest(made.package_id, "b", name="b")]
        sent += [finalize(made.package_id)] if alone else []
        for command in [other, *sent]:
            await settled(writer, command)
        found = await follower

    assert len({event.event_id for event in found}) == 3
    assert all(event.package_id == made.package_id for event in found) is alone


async def test_a_position_of_another_log_or_outside_this_one_is_refused(stage: Stage) -> None:
    await fill(stage, packages=1)
    end = await stage.log.end()
    beyond = {partition: offset + 1000 for partition, offset in end.offsets.items()}
    for position, error in (
        (Position(uuid4(), end.offsets), LogIdentityError),
        (Position(end.log, beyond), InvalidPositionError),
        (Position(end.log, {10_000: 0}), InvalidPositionError),
    ):
        for follow in (False, True):
            with pytest.raises(error):
                await first(stage.log.read(position, follow=follow), 1)


async def test_identity_and_partitions_stay_the_same_for_every_reader(stage: Stage) -> None:
    await stage.log.migrate()
    await stage.log.check()
    identity, partitions = await stage.log.identity(), await stage.log.partitions()
    packages = [uuid4() for _ in range(50)]
    async with stage.reopened() as other:
        assert (await other.identity(), await other.partitions()) == (identity, partitions)
        assert [other.partition_of(p) for p in packages] == [stage.log.partition_of(p) for p in packages]
    assert {stage.log.partition_of(package_id) for package_id in packages} <= set(range(partitions))


# Subscriptions


async def test_a_projection_gets_every_record_in_order_and_can_decode_it(stage: Stage) -> None:
    await fill(stage)
    projection = Projection(stage.log)
    subscription = await projection.subscribe()
    await projection.catch_up(subscription)
    await subscription.close()

    events = await read_valid(stage.log)
    assert len(projection.records) == len(events)
    read = [decode(record.value) for record in projection.records]
    found: dict[UUID, list[int]] = {}
    for record, event in zip(projection.records, read, strict=True):
        assert record.key == str(event.package_id).encode()
        assert record.partition == stage.log.partition_of(event.package_id)
        found.setdefault(event.package_id, []).append(event.sequence)
    assert found == by_package(events)
    assert projection.asked == [list(range(await stage.log.partitions()))]


async def test_a_committed_projection_lags_behind_only_what_comes_later(stage: Stage) -> None:
    await fill(stage)
    behind = await stage.log.lag("registry")
    projection = Projection(stage.log)
    subscription = await projection.subscribe()
    await projection.catch_up(subscription)
    await subscription.commit(projection.offsets, "generation 1")

    assert sum(behind.values()) >= 15
    assert set((await stage.log.lag("registry")).values()) == {0}
    assert sum((await stage.log.lag("retention")).values()) == sum(behind.values())
    async with stage.writer() as writer:
        await settled(writer, create("later"))
    assert sum((await stage.log.lag("registry")).values()) >= 1
    await subscription.close()


async def test_a_projection_goes_on_where_it_says_and_the_log_tells_what_was_committed(stage: Stage) -> None:
    await fill(stage)
    projection = Projection(stage.log)
    before = await projection.subscribe()
    await projection.catch_up(before)
    await before.commit(projection.offsets, "generation 7")
    committed = dict(projection.offsets)
    await before.close()
    read = len(projection.records)
    async with stage.writer() as writer:
        await settled(writer, create("later"))

    after = await projection.subscribe()
    await projection.catch_up(after)
    assert after.assigned == frozenset(range(await stage.log.partitions()))
    await after.close()

    assert len(projection.records) == read + 1
    found = await stage.log.committed(projection.name)
    assert found == {partition: (offset, "generation 7") for partition, offset in committed.items()}


async def test_offsets_are_committed_from_outside_only_for_a_group_without_members(stage: Stage) -> None:
    await fill(stage)
    projection = Projection(stage.log)
    assert await stage.log.committed(projection.name) == {}
    member = await projection.subscribe()
    await projection.catch_up(member)
    await member.commit(projection.offsets, "generation 7")
    ours = await stage.log.committed(projection.name)
    assert not await stage.log.show(projection.name, dict.fromkeys(ours, 1), "another")
    assert await stage.log.committed(projection.name) == ours
    await member.close()

    assert await stage.log.show(projection.name, dict.fromkeys(ours, 1), "another")
    assert await stage.log.committed(projection.name) == dict.fromkeys(ours, (1, "another"))


async def test_reading_ends_where_it_is_told(stage: Stage) -> None:
    await fill(stage)
    end, before = await stage.log.end(), await read_valid(stage.log)
    async with stage.writer() as writer:
        await settled(writer, create("later"))

    assert [event async for event in stage.log.read(until=end)] == before
    assert [event async for event in stage.log.read(end, until=end)] == []
    chosen = before[0].package_id
    mine = [event.sequence for event in before if event.package_id == chosen]
    assert [event.sequence async for event in stage.log.read(package_id=chosen, until=end)] == mine
    assert [event async for event in stage.log.read(package_id=chosen, until=Position(end.log, {}))] == []


async def test_another_member_takes_over_when_one_leaves(stage: Stage) -> None:
    await fill(stage)
    everything = frozenset(range(await stage.log.partitions()))
    projection = Projection(stage.log)
    one = await projection.subscribe()
    await projection.catch_up(one)
    two = await projection.subscribe()
    await one.close()

    await projection.poll_until(two, lambda: two.assigned == everything)
    async with stage.writer() as writer:
        await settled(writer, create("later"))
    await projection.catch_up(two)
    await two.close()

    assert one.assigned == frozenset()
    assert len(projection.records) == len(await read_valid(stage.log))


async def test_a_projection_that_stands_outside_the_log_stops(stage: Stage) -> None:
    await fill(stage)
    end = await stage.log.end()
    projection = Projection(stage.log, offsets={partition: offset + 1000 for partition, offset in end.offsets.items()})
    subscription = await projection.subscribe()
    try:
        with pytest.raises(CorruptError, match="offset"):
            await projection.poll_until(subscription, lambda: False)
    finally:
        await subscription.close()
    assert projection.records == []


async def test_waiting_for_records_ends_with_the_time_out(stage: Stage) -> None:
    projection = Projection(stage.log)
    subscription = await projection.subscribe()
    async with asyncio.timeout(PATIENCE_SECONDS):
        await projection.poll(subscription)
    await subscription.close()

    assert projection.records == []
