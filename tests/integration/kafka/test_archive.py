"""Archives and copies of a topic on a real broker: what is kept, continued after an interruption, and refused."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from confluent_kafka import Producer

from artifact_store.errors import ConfigurationError, ConflictError, CorruptError, NotFoundError, UnavailableError
from artifact_store.events import Event
from services.archive import Archive, compare_logs, copy_log, export_log, import_archive, load, translate
from services.config import Settings
from services.log.kafka import KafkaFiller, KafkaLog
from services.log.port import Record
from services.log.records import SkipRecord
from tests.archives import EndsEarly, as_records, digests_of, records_of
from tests.commands import command_id, create, finalize, ingest
from tests.contract.log_stage import settled
from tests.integration.kafka_stage import lone_writer
from tests.views_history import History

pytestmark = pytest.mark.services


@asynccontextmanager
async def another(settings: Settings, name: str, **changes: Any) -> AsyncIterator[KafkaLog]:
    """A log on the same broker. Its topic does not exist yet, and is deleted afterwards."""
    log = KafkaLog(replace(settings, log_url=f"{settings.log_url}-{name}", **changes))
    try:
        yield log
    finally:
        await asyncio.to_thread(_delete, log)
        await log.close()


def _delete(log: KafkaLog) -> None:
    for future in log.cluster._admin().delete_topics([log.kafka.topic], operation_timeout=30).values():
        future.exception(30)


async def fill(log: KafkaLog, packages: int = 6, seed: int = 3) -> Sequence[Event]:
    """Fill the log as gateways would."""
    events = History(seed).fill(packages=packages, files=2).events
    await append(log, await as_records(log, events))
    return events


async def append(log: KafkaLog, records: Mapping[int, Sequence[Record]]) -> None:
    """Append records, of each partition in two transactions."""
    filler = KafkaFiller(log)
    await filler.begin()
    for partition, found in records.items():
        for some in (found[:2], found[2:]):
            if some:
                await filler.append(partition, some)
    await filler.settle()


async def stray(log: KafkaLog, partition: int) -> None:
    """Write a record that is not an event, as anybody might."""
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap, "log_level": 3})
    producer.produce(log.kafka.topic, b"no event", b"stray", partition)
    assert await asyncio.to_thread(producer.flush, 30) == 0


def whole(records: Mapping[int, Sequence[Record]]) -> dict[int, list[tuple[object, ...]]]:
    """What a copy keeps of the records."""
    return {p: [(r.key, r.value, r.timestamp, r.headers) for r in found] for p, found in records.items()}


async def test_an_import_keeps_partitions_where_counts_agree_and_digests_everywhere(
    kafka: Settings, log: KafkaLog, tmp_path: Path
) -> None:
    events = await fill(log, packages=4)
    path = tmp_path / "log.archive"
    done = await export_log(log, path)
    before = await records_of(log)
    assert done.events == sum(map(len, before.values())) == len(events)
    assert all(dict(r.headers)["ce_source"] for found in before.values() for r in found)
    read = [event async for event in log.read()]
    async with another(kafka, "same") as same, another(kafka, "five", kafka_partitions=5) as five:
        for target in (same, five):
            filler = KafkaFiller(target)
            with Archive(path) as archive:
                await import_archive(archive, target, filler)
                (found,) = await translate(archive, target, [read[10].position])
            await filler.close()
            left = [event.event_id async for event in target.read(found)]
            assert {event.event_id for event in read[11:]} <= set(left)
            if target is same:
                assert len(left) == len(read) - 11
                assert whole(await records_of(same)) == whole(before)
        assert await digests_of(five, tmp_path) == await digests_of(log, tmp_path)


async def test_a_gateway_goes_on_where_an_import_ended(kafka: Settings, log: KafkaLog, tmp_path: Path) -> None:
    async with lone_writer(kafka, log) as writer:
        first = await settled(writer, create())
        await settled(writer, ingest(first.package_id, "a"))
    await export_log(log, tmp_path / "log.archive")
    async with another(kafka, "new") as new:
        filler = KafkaFiller(new)
        with Archive(tmp_path / "log.archive") as archive:
            await import_archive(archive, new, filler)
        async with lone_writer(replace(kafka, log_url=f"{kafka.log_url}-new"), new) as writer:
            assert await settled(writer, create()) == first  # the retry of a command that the archive holds
            await settled(writer, finalize(first.package_id))
            with pytest.raises(ConflictError, match="gateways write to the topic"):
                await KafkaFiller(new).begin()
            records = await records_of(new)
            partition = new.partition_of(first.package_id)
            with pytest.raises(UnavailableError, match="another process has taken over the partition"):
                await filler.append(partition, records[partition])
        assert await records_of(new) == records
        assert [event.sequence async for event in new.read()] == [1, 2, 3]


@pytest.mark.parametrize("answer_lost", [True, pytest.param(False, marks=pytest.mark.endurance)])
async def test_a_copy_that_ended_early_goes_on_and_has_each_record_once(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch, answer_lost: bool
) -> None:
    monkeypatch.setattr(load, "BATCH_RECORDS", 5)
    await fill(log, packages=9)
    source = await records_of(log)
    async with another(kafka, "copy") as copy:
        filler = EndsEarly(KafkaFiller(copy), 4, answer_lost=answer_lost)
        with pytest.raises(UnavailableError, match="ended early"):
            await copy_log(log, copy, filler)
        await filler.settle()
        there = sum(map(len, (await records_of(copy)).values()))
        assert 0 < there < sum(map(len, source.values()))
        done = await copy_log(log, copy, KafkaFiller(copy))
        assert (done.resumed, done.records) == (there, sum(map(len, source.values())))
        assert whole(await records_of(copy)) == whole(source)
        assert (await compare_logs(log, copy)).missing == 0


async def test_a_copy_leaves_out_a_record_and_refuses_a_target_that_is_none(kafka: Settings, log: KafkaLog) -> None:
    events = await fill(log, packages=3)
    await stray(log, 1)
    source = await records_of(log)
    bad = source[1][-1]
    async with another(kafka, "copy") as copy:
        with pytest.raises(NotFoundError, match="no record at offset 99999 of partition 1"):
            await copy_log(log, copy, KafkaFiller(copy), skip={(1, 99_999)})
        done = await copy_log(log, copy, KafkaFiller(copy), skip={(bad.partition, bad.offset)})
        assert (done.records, done.skipped) == (len(events), 1)
        assert whole(await records_of(copy)) == whole({**source, 1: source[1][:-1]})
        assert (await compare_logs(log, copy)).missing == 1
        assert (await compare_logs(log, copy, skip={(bad.partition, bad.offset)})).missing == 0
        await stray(copy, 1)
        before = await records_of(copy)
        with pytest.raises(CorruptError, match="partition 1 of the target holds other records"):
            await copy_log(log, copy, KafkaFiller(copy))
        assert await records_of(copy) == before


@pytest.mark.endurance
async def test_what_was_confirmed_in_a_topic_holds_in_its_copy(kafka: Settings, log: KafkaLog, tmp_path: Path) -> None:
    events = await fill(log, packages=2)
    await stray(log, 1)
    async with lone_writer(kafka, log) as writer:
        while (bad := (await writer.status())[1]).bad_digest is None:  # noqa: ASYNC110 - the state, not an event
            await asyncio.sleep(0.02)
        assert bad.bad_offset is not None
        digest = bytes.fromhex(bad.bad_digest)
        await writer.confirm_here(SkipRecord(1, bad.bad_offset, digest, "ada", "a stray producer", command_id("skip")))
    async with another(kafka, "copy") as copy:
        await copy_log(log, copy, KafkaFiller(copy))
        assert len([event async for event in copy.read()]) == len(events)
        done = await export_log(log, tmp_path / "log.archive")
        assert done.left_out == {"skipped": 1, "repeated": 0, "administrative": 1}
        read = [event async for event in log.read()]
        with Archive(tmp_path / "log.archive") as archive:
            (found,) = await translate(archive, copy, [read[4].position])
        assert {e.event_id async for e in copy.read(found)} == {e.event_id for e in read[5:]}


@pytest.mark.endurance
async def test_a_mirror_that_repeats_records_counts_as_a_copy_and_one_that_lacks_some_does_not(
    kafka: Settings, log: KafkaLog
) -> None:
    events = await fill(log, packages=3)
    source = await records_of(log)
    async with another(kafka, "mirror") as mirror:
        await mirror.migrate()
        # The first two come once more, as a mirror that was restarted repeats them, and the last one is missing.
        await append(mirror, {p: [*found[:2], *found[:-1]] for p, found in source.items() if found})
        found = await compare_logs(log, mirror)
        partitions = sum(1 for records in source.values() if records)
        assert (found.records, found.missing, found.repeated) == (len(events), partitions, 2 * partitions)
        last = max(source.values(), key=len)[-1]
        await append(mirror, {last.partition: [last._replace(headers=(("event_type", b"other"),))]})
        with pytest.raises(CorruptError, match=f"partition {last.partition} of the copy holds other records"):
            await compare_logs(log, mirror)
    with pytest.raises(ConfigurationError, match="not a copy of itself"):
        await compare_logs(log, log)
    async with another(kafka, "two", kafka_partitions=2) as two:
        await two.migrate()
        with pytest.raises(ConfigurationError, match="has 3 partitions, the other 2"):
            await copy_log(log, two, KafkaFiller(two))


@pytest.mark.endurance
async def test_a_filler_says_so_when_what_it_appended_cannot_be_read_in_time(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    producer = Producer({**log.kafka.producer(0), "transactional.id": "somebody else's"})
    await asyncio.to_thread(producer.init_transactions, 30)
    producer.begin_transaction()
    producer.produce(log.kafka.topic, b"never committed", b"stray", 0)
    await asyncio.to_thread(producer.flush, 30)
    monkeypatch.setattr("services.log.kafka.filler.COMMIT_SECONDS", 3.0)
    with pytest.raises(UnavailableError, match="no answer in time while waiting until what was appended can be read"):
        await append(log, {0: [Record(0, 0, b"key", b"value")]})
    await asyncio.to_thread(producer.abort_transaction, 30)


@pytest.mark.endurance
async def test_an_export_leaves_out_what_was_never_committed(kafka: Settings, log: KafkaLog, tmp_path: Path) -> None:
    events = await fill(log, packages=1)
    producer = Producer({**log.kafka.producer(0), "transactional.id": "somebody else's"})
    await asyncio.to_thread(producer.init_transactions, 30)
    producer.begin_transaction()
    producer.produce(log.kafka.topic, b"never committed", b"stray", 0)
    await asyncio.to_thread(producer.flush, 30)
    await asyncio.to_thread(producer.abort_transaction, 30)
    assert (await export_log(log, tmp_path / "log.archive")).events == len(events)
