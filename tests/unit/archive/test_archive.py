"""Archives of a log: their contents, importing them, and refusals with nothing written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest

from artifact_store.errors import (
    BadRecordError,
    ConflictError,
    CorruptError,
    LogIdentityError,
    PackageNotFoundError,
    UnavailableError,
)
from artifact_store.events import Event, LogSkipped
from artifact_store.position import Position
from schemas.codec import EVENT_TYPES, decode, encode
from schemas.digests import record_digest
from services.archive import Archive, archive_file, check_archive, export_log, import_archive, load, translate
from services.log.port import Record
from services.log.records import administrative_event
from services.log.sqlite import SqliteFiller
from tests.archives import EndsEarly, digests_of, imported, records_of, sqlite_log
from tests.memory_log import MemoryLog
from tests.views_history import History


@pytest.fixture
def history() -> Sequence[Event]:
    return History(3).fill(packages=9, files=4).events


@pytest.fixture
def log(history: Sequence[Event]) -> MemoryLog:
    found = MemoryLog()
    found.append(*history)
    return found


@pytest.fixture
async def archive(log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An archive of the log, of many blocks."""
    monkeypatch.setattr(archive_file, "BLOCK_BYTES", 4_000)
    path = tmp_path / "log.archive"
    await export_log(log, path)
    return path


async def test_an_imported_log_has_every_event_in_order_and_views_with_the_same_digests(
    log: MemoryLog, history: Sequence[Event], archive: Path, tmp_path: Path
) -> None:
    done = await imported(archive, tmp_path / "new.db")
    assert (done.events, done.resumed, done.partitions) == (len(history), 0, 1)
    async with sqlite_log(tmp_path / "new.db") as new:
        events = [decode(record.value) for record in (await records_of(new))[0]]
        assert await digests_of(new, tmp_path) == await digests_of(log, tmp_path)
    # Partitions are merged by time, so that times do not decrease in the one partition either.
    assert events == list(history)


async def test_the_log_of_a_file_is_exported_with_the_headers_that_kafka_would_have(
    archive: Path, tmp_path: Path
) -> None:
    await imported(archive, tmp_path / "new.db")
    async with sqlite_log(tmp_path / "new.db") as new:
        again = await export_log(new, tmp_path / "again.archive")
        record = (await records_of(new))[0][-1]
    with Archive(archive) as first, Archive(tmp_path / "again.archive") as second:
        assert [r.value for r in second.records(0)] == [r.value for r in load._merged(first)]
        headers = dict(list(second.records(0))[-1].headers)
    assert again.events == first.contents.events
    assert headers == dict(record.headers)
    assert headers["event_type"] == b"v1.package.finalized"
    assert {"producer", "ce_id", "ce_source", "command_id"} <= headers.keys()


async def test_every_damaged_byte_is_found_before_anything_is_written(archive: Path, tmp_path: Path) -> None:
    whole = archive.read_bytes()
    assert len(whole) > 15_000
    for at in (*range(0, len(whole), 997), len(whole) - 1, len(whole) - 9):
        broken = tmp_path / f"broken at {at}"
        broken.write_bytes(whole[:at] + bytes([whole[at] ^ 0x40]) + whole[at + 1 :])
        with pytest.raises(CorruptError, match=r"broken at"):
            await imported(broken, tmp_path / "new.db")
    for size in (0, 5, 400, len(whole) // 2, len(whole) - 1):
        (tmp_path / "cut off").write_bytes(whole[:size])
        with pytest.raises(CorruptError, match=r"is cut off|is no archive"):
            await imported(tmp_path / "cut off", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


async def test_an_archive_without_one_event_is_refused_although_its_bytes_are_sound(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    added: list[object] = []

    def leave_one_out(writer: archive_file.ArchiveWriter, record: archive_file.ArchivedRecord) -> None:
        added.append(record)
        if len(added) != 20:
            add(writer, record)

    add = archive_file.ArchiveWriter.add
    monkeypatch.setattr(archive_file.ArchiveWriter, "add", leave_one_out)
    await export_log(log, tmp_path / "forged")
    with pytest.raises(CorruptError, match=r"at offset \d+ of partition \d in .*forged.* follows event"):
        await imported(tmp_path / "forged", tmp_path / "new.db")
    assert not (tmp_path / "new.db").exists()


async def test_a_log_whose_chain_is_broken_is_not_exported(history: Sequence[Event], tmp_path: Path) -> None:
    log = MemoryLog()
    broken = next(event for event in history if event.sequence == 3)
    log.append(*(event for event in history if event is not broken))
    with pytest.raises(CorruptError, match=f"of package {broken.package_id}, is event 4 .* follows event 2"):
        await export_log(log, tmp_path / "log.archive")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("answer_lost", [False, True])
async def test_an_import_that_ended_early_goes_on_and_has_each_event_once(
    log: MemoryLog,
    history: Sequence[Event],
    archive: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    answer_lost: bool,
) -> None:
    monkeypatch.setattr(load, "BATCH_RECORDS", 10)
    path = tmp_path / "new.db"
    async with sqlite_log(path) as new:
        with Archive(archive) as opened, pytest.raises(UnavailableError, match="ended early"):
            await import_archive(opened, new, EndsEarly(SqliteFiller(path), 3, answer_lost=answer_lost))
        assert (await new.end()).offsets == {0: 40 if answer_lost else 30}
        done = await imported(archive, path)
        assert (done.resumed, done.events) == (40 if answer_lost else 30, len(history))
        assert [decode(r.value) for r in (await records_of(new))[0]] == list(history)
        assert (await imported(archive, path)).resumed == len(history)


async def test_a_log_that_holds_anything_else_is_refused_and_left_as_it_is(archive: Path, tmp_path: Path) -> None:
    other = MemoryLog()
    other.append(*History(4).fill(packages=1, files=1).events)
    await export_log(other, tmp_path / "other.archive")
    await imported(tmp_path / "other.archive", tmp_path / "other.db")
    async with sqlite_log(tmp_path / "other.db") as new:
        before = await records_of(new)
        with pytest.raises(CorruptError, match=r"partition 0 of the log holds other records .* between offset 0 and"):
            await imported(archive, tmp_path / "other.db")
        assert await records_of(new) == before


async def test_a_log_that_holds_more_than_the_archive_is_refused(
    history: Sequence[Event], archive: Path, tmp_path: Path
) -> None:
    shorter = MemoryLog()
    shorter.append(*history[:30])
    await export_log(shorter, tmp_path / "shorter.archive")
    await imported(archive, tmp_path / "new.db")
    with pytest.raises(CorruptError, match=r"holds .* more than it should|holds other records than it should"):
        await imported(tmp_path / "shorter.archive", tmp_path / "new.db")


async def test_somebody_who_writes_meanwhile_is_noticed(archive: Path, tmp_path: Path) -> None:
    path = tmp_path / "new.db"

    class Rival(SqliteFiller):
        async def begin(self) -> None:
            await super().begin()
            intruder = SqliteFiller(path)
            await intruder.begin()
            event = History(9).fill(packages=1, files=0).events[0]
            await intruder.append(0, [Record(0, 0, str(event.package_id).encode(), encode(event))])

    async with sqlite_log(path) as new:
        with Archive(archive) as opened, pytest.raises((ConflictError, CorruptError)):
            await import_archive(opened, new, Rival(path))
        assert (await new.end()).offsets == {0: 1}


async def test_what_is_no_event_of_a_package_is_left_out_once_it_is_confirmed(
    log: MemoryLog, history: Sequence[Event], tmp_path: Path
) -> None:
    log.append(history[5])  # as a mirror repeats records
    log.append_raw(1, b"no event", b"stray")
    with pytest.raises(BadRecordError, match="artifact-store log skip 1 "):
        await export_log(log, tmp_path / "log.archive")
    skipped = LogSkipped(log.id, 1, 0, record_digest(b"stray", b"no event"), 13, "it cannot be read", "a stray")
    log.append_administrative(administrative_event(skipped, None, created_at=1, actor="ada", command_id=uuid4()))
    done = await export_log(log, tmp_path / "log.archive")
    assert done.left_out == {"skipped": 1, "repeated": 1, "administrative": 1}
    assert (await imported(tmp_path / "log.archive", tmp_path / "new.db")).events == len(history)


async def test_an_archive_of_some_packages_has_these_alone_and_is_a_log_of_its_own(
    log: MemoryLog, history: Sequence[Event], tmp_path: Path
) -> None:
    wanted = list({event.package_id: None for event in history})[2:4]
    done = await export_log(log, tmp_path / "some.archive", packages=wanted)
    assert done.package_count == 2
    await imported(tmp_path / "some.archive", tmp_path / "new.db")
    async with sqlite_log(tmp_path / "new.db") as new:
        found = [decode(record.value) for record in (await records_of(new))[0]]
    assert found == [event for event in history if event.package_id in wanted]
    with pytest.raises(PackageNotFoundError):
        await export_log(log, tmp_path / "none.archive", packages=[uuid4()])


async def test_positions_are_translated_so_that_nothing_is_missed(
    log: MemoryLog, history: Sequence[Event], archive: Path, tmp_path: Path
) -> None:
    read = [event async for event in log.read()]
    await imported(archive, tmp_path / "new.db")
    async with sqlite_log(tmp_path / "new.db") as new:
        for count in (0, 1, 17, len(read) - 1, len(read)):
            before = read[count - 1].position if count else Position(log.id, {})
            with Archive(archive) as opened:
                (found,) = await translate(opened, new, [before])
            assert found.log == await new.identity()
            left = [event.event_id async for event in new.read(found)]
            assert {event.event_id for event in read[count:]} <= set(left)
            assert len(left) == len(set(left))
        assert left == []
        with Archive(archive) as opened, pytest.raises(LogIdentityError):
            await translate(opened, new, [Position(uuid4(), {})])


async def test_positions_are_refused_in_a_log_that_is_no_import_of_the_archive(archive: Path, tmp_path: Path) -> None:
    with Archive(archive) as opened:
        position = Position(opened.contents.log, {})
        async with sqlite_log(tmp_path / "empty.db") as empty:
            with pytest.raises(CorruptError, match="does not begin with the events of the archive"):
                await translate(opened, empty, [position])


async def test_an_export_never_replaces_a_file_and_leaves_none_that_is_not_whole(
    log: MemoryLog, archive: Path, tmp_path: Path
) -> None:
    before = archive.read_bytes()
    with pytest.raises(ConflictError, match="exists"):
        await export_log(log, archive)
    assert archive.read_bytes() == before
    (tmp_path / "next.archive.part").write_bytes(b"what a killed export left" * 1000)
    await export_log(log, tmp_path / "next.archive")
    assert {path.name for path in tmp_path.iterdir()} == {"log.archive", "next.archive"}
    assert (tmp_path / "next.archive").stat().st_mode & 0o777 == 0o600
    with Archive(tmp_path / "next.archive") as opened:
        await check_archive(opened)


async def test_an_archive_by_a_schema_of_a_newer_release_is_refused_by_its_name(
    log: MemoryLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    await export_log(log, tmp_path / "log.archive")
    known = [event_type for event_type in EVENT_TYPES if event_type != "v1.file.ingested"]
    monkeypatch.setattr(load, "EVENT_TYPES", known)
    with pytest.raises(CorruptError, match=r"events of v1.file.ingested by the schema .* use a newer release"):
        await imported(tmp_path / "log.archive", tmp_path / "new.db")


async def test_a_payload_that_was_changed_is_found_by_its_digest(history: Sequence[Event], tmp_path: Path) -> None:
    log = MemoryLog()
    number = next(i for i, event in enumerate(history) if event.event_type == "v1.file.ingested")
    log.append(*history[:number], replace(history[number], payload_digest=bytes(32)))
    with pytest.raises(CorruptError, match="digest of its payload"):
        await export_log(log, tmp_path / "log.archive")
