"""Records of the log, and what an operator's confirmation that one is not an event covers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from uuid import UUID, uuid4

import pytest

from artifact_store.events import Event
from schemas.codec import encode
from services.log.port import Record
from services.log.records import AdministrativeHead, BadRecord, Skips, read_record
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up, list_marks
from services.views.projections import PROJECTIONS
from tests.memory_log import MemoryLog, skip_of
from tests.unit.schemas.test_golden import administrative, history
from tests.verify_scene import whole_scene

GARBAGE = b"18 bytes, no event"
EVENT = history()[0]


def record_of(event: Event, partition: int, key: str | None = None) -> Record:
    return Record(partition, 5, (key or str(event.package_id)).encode(), encode(event))


@pytest.mark.parametrize(
    ("record", "cause"),
    [
        (Record(1, 5, b"", GARBAGE), "it cannot be read"),
        (Record(1, 5, str(EVENT.package_id).encode(), b""), "it cannot be read"),
        (record_of(EVENT, 1, str(uuid4())), "its key is not its package's id"),
        (record_of(EVENT, 2), "it belongs in partition 1"),
        (record_of(administrative()[0], 2), "it belongs in partition 3"),
        (
            record_of(replace(administrative()[0], package_id=UUID(int=5)), 3),
            "its id is not that of the partition that it names",
        ),
    ],
)
def test_what_is_no_event_is_named_with_place_digest_and_command(record: Record, cause: str) -> None:
    found = read_record(record, lambda _: 1)
    assert isinstance(found, BadRecord)
    assert found.cause.startswith(cause)
    command = f"`artifact-store log skip {record.partition} 5 --digest {found.digest.hex()}`"
    assert command in found.error.detail


def test_events_and_administrative_records_are_read_where_they_belong() -> None:
    assert read_record(record_of(EVENT, 1), lambda _: 1) == EVENT
    for event in administrative():
        assert read_record(record_of(event, 3), lambda _: 1) == event


async def test_a_skip_covers_what_lies_before_it_in_its_partition_and_nothing_else() -> None:
    log = MemoryLog(partitions=2)
    for partition, value in [(0, GARBAGE), (1, GARBAGE), (0, b"other")]:
        log.append_raw(partition, value)
    bad = [BadRecord.of(r, "no event") for p in (0, 1) for r in log.take(p, 0, 10)[0]]
    first = bad[0]
    skips = Skips(log)
    assert not await skips.covers(first)
    log.append_administrative(skip_of(log, log.take(0, 0, 1)[0][0]))
    assert [await skips.covers(record) for record in bad] == [True, False, False]
    log.append_raw(0, GARBAGE)
    again = BadRecord.of(log.take(0, 0, 10)[0][-1], "no event")
    assert again.digest == first.digest
    assert not await skips.covers(again), "it came after the confirmation"
    assert not await Skips(log).covers(again)


async def test_a_skip_holds_in_a_copy_of_the_log_whatever_the_offsets_are_there() -> None:
    log, copy = MemoryLog(partitions=1), MemoryLog(partitions=1, every=1, hole=3)
    for value in (b"other", GARBAGE):
        log.append_raw(0, value)
    log.append_administrative(skip_of(log, log.take(0, 1, 1)[0][0]))
    for record in log.take(0, 0, 10)[0]:
        copy.append_raw(0, record.value, record.key)
    other, garbage = [BadRecord.of(record, "no event") for record in copy.take(0, 0, 10)[0][:2]]
    assert garbage.offset == 4, "it lay at offset 1"
    skips = Skips(copy)
    assert [await skips.covers(bad) for bad in (garbage, other)] == [True, False]


async def test_views_go_on_behind_a_record_once_it_is_confirmed_and_are_those_of_a_log_without_it(
    tmp_path: Path,
) -> None:
    scene = await whole_scene(tmp_path)
    log, clean = scene.log, MemoryLog()
    partition = log.partition_of(scene.package_id)
    key = str(scene.package_id).encode()
    log.append(*scene.events[:2])
    log.append_raw(partition, GARBAGE, key)
    log.append(*scene.events[2:])
    clean.append(*scene.events)
    views, plain = scene.views(), Views(f"sqlite+aiosqlite:///{tmp_path / 'plain.db'}")
    try:
        await plain.migrate()
        for projection in PROJECTIONS.values():
            await catch_up(views, log, projection)
            await catch_up(plain, clean, projection)
        assert {mark.package_id for mark in await list_marks(views)} == {scene.package_id}
        bad = next(r for r in log.take(partition, 0, 10)[0] if r.value == GARBAGE)
        log.append_administrative(skip_of(log, bad))
        for projection in PROJECTIONS.values():
            await catch_up(views, log, projection)
            assert (await digest_view(views, projection)).digest == (await digest_view(plain, projection)).digest
        assert await list_marks(views) == []
    finally:
        await views.close()
        await plain.close()


async def test_verify_names_a_record_that_is_no_event_until_it_is_confirmed(tmp_path: Path) -> None:
    scene = await whole_scene(tmp_path)
    scene.append()
    scene.log.append_raw(0, GARBAGE)
    await scene.fold()
    report = await scene.verify()
    assert {violation.kind for violation in report.violations} == {"undecodable", "parked"}
    bad = scene.log.take(0, 0, 10)[0][-1]
    event = skip_of(scene.log, bad)
    scene.log.append_administrative(replace(event, created_at=scene.events[-1].created_at))
    await scene.fold()
    report = await scene.verify()
    assert (report.violations, report.skipped, report.administrative) == ([], 1, 1)
    later = skip_of(scene.log, bad, AdministrativeHead.of(event))
    assert later.sequence == 2


@pytest.mark.parametrize("same", [True, False])
async def test_verify_says_whether_what_came_again_is_the_same_record(tmp_path: Path, same: bool) -> None:
    scene = await whole_scene(tmp_path)
    second = scene.events[1]
    scene.again = [scene.events[0], second if same else replace(second, actor="eve")]
    scene.append()
    await scene.fold()
    report = await scene.verify()
    kinds = {violation.kind for violation in report.violations}
    assert report.repeated == 1 + same
    assert kinds == (set() if same else {"repeated-event"})
