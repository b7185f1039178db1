"""A record that is not an event visibly stops its partition, which continues after an operator has confirmed it."""

from __future__ import annotations

import asyncio
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from confluent_kafka import Producer

from artifact_store.errors import (
    BadRecordError,
    ConflictError,
    InvalidRequestError,
    PackageQuarantinedError,
    PushBackError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from schemas.codec import decode, encode
from services.config import SecretStr, Settings
from services.core.decide import Command, IngestCheck
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.connection import make_consumer
from services.log.port import Record
from services.log.records import BadRecord, SkipRecord, read_record
from tests.commands import finalize, ingest
from tests.contract.log_stage import PATIENCE_SECONDS
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    PARTITIONS,
    create_in,
    foreign_transaction,
    gateway,
    kafka_settings,
    lone_writer,
    open_kafka_log,
    owned,
)
from tests.integration.processes import (
    ProductProcess,
    metrics_of,
    output_of,
    partitions_of,
    readiness,
    run_command,
)
from tests.services.process import free_ports

GARBAGE = b"18 bytes, no event"
PARTITION = 1
SECRET = SecretStr("sesame")


def stray(settings: Settings, partition: int = PARTITION, value: bytes = GARBAGE, key: bytes | None = None) -> int:
    """Append a record as a plain producer does that knows nothing of transactions; its offset. Blocks."""
    bootstrap, _, prefix = settings.log_url.removeprefix("kafka://").partition("/")
    offsets: list[int | None] = []
    producer = Producer({"bootstrap.servers": bootstrap})
    producer.produce(f"{prefix}.events", value, key, partition, on_delivery=lambda _, m: offsets.append(m.offset()))
    producer.flush(30)
    (offset,) = offsets
    assert offset is not None
    return offset


async def bad_record(log: KafkaLog, partition: int, offset: int) -> BadRecord:
    """The record at this offset, which is no event."""
    async for batch in log.scan({partition: offset}, {partition: offset + 1}):
        for record in batch.records:
            found = read_record(record, log.partition_of)
            assert isinstance(found, BadRecord)
            return found
    raise AssertionError("there is no record")


def skip_of(bad: BadRecord) -> SkipRecord:
    return SkipRecord(bad.partition, bad.offset, bad.digest, "ada", "a stray producer", uuid4())


async def serving(writer: KafkaWriter) -> None:
    """Wait until the writer serves every partition."""

    async def all_owned() -> bool:
        return await owned(writer) == set(range(PARTITIONS))

    await until(all_owned, PATIENCE_SECONDS, "the writer does not serve every partition")


async def stands(writer: KafkaWriter, offset: int) -> None:
    """Wait until the partition is known to stand before this record."""

    async def known() -> bool:
        return any(s.bad_offset == offset for s in writer.status_here())

    await until(known, PATIENCE_SECONDS, "the partition does not stand before the record")


async def read_all(log: KafkaLog) -> list[str]:
    return [event.event_type async for event in log.read()]


@pytest.mark.services
async def test_a_partition_stands_before_garbage_until_it_is_confirmed_and_nobody_is_fenced(
    kafka_url: str, tmp_path: Path
) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log, gateway(settings, log) as writer:
        await serving(writer)
        first = await writer.submit(create_in(PARTITION))
        offset = await asyncio.to_thread(stray, settings)
        later = create_in(PARTITION)
        with pytest.raises(UnavailableError, match=f"log skip {PARTITION} {offset} .*the outcome is unknown"):
            await writer.submit(later)  # its transaction may have been committed behind the record
        await stands(writer, offset)
        with pytest.raises(BadRecordError, match=f"log skip {PARTITION} {offset} --digest [0-9a-f]{{64}}"):
            await writer.submit(later)
        await writer.submit(create_in(0))  # other partitions go on
        assert f"log skip {PARTITION} {offset}" in (await writer.ready() or "")
        with pytest.raises(BadRecordError):
            await read_all(log)
        bad = await bad_record(log, PARTITION, offset)
        before = [r.offset async for b in log.scan({PARTITION: 0}, {PARTITION: offset}) for r in b.records]
        event_at = before[0]
        takeovers = writer.counts.takeovers.total()
        wrong = SkipRecord(PARTITION, offset, bytes(32), "ada", "", uuid4())
        with pytest.raises(InvalidRequestError, match="digest"):
            await writer.confirm_here(wrong)
        with pytest.raises(InvalidRequestError, match="is an event"):
            await writer.confirm_here(SkipRecord(PARTITION, event_at, bad.digest, "ada", "", uuid4()))
        recorded = await writer.confirm_here(skip_of(bad))
        assert recorded.sequence == 1
        again: Acknowledgement = await writer.confirm_here(skip_of(bad))
        assert again == recorded, "a retry is told what is recorded"
        assert (await writer.submit(later)).sequence == 1
        assert writer.counts.takeovers.total() == takeovers, "nobody was fenced for it"
        assert await writer.ready() is None
        assert (await read_all(log)).count("v1.package.created") == 3, "each once, whatever was in doubt"
        status = next(s for s in writer.status_here() if s.partition == PARTITION)
        assert (status.skipped, status.bad_offset) == (1, None)
        # A second record of the same bytes comes after the confirmation, and is confirmed by itself.
        second = await asyncio.to_thread(stray, settings)
        await stands_after_submit(writer, second)
        assert (await writer.confirm_here(skip_of(await bad_record(log, PARTITION, second)))).sequence == 2
        assert (await writer.submit(create_in(PARTITION))).sequence == 1
        for partition in range(PARTITIONS):
            await writer.submit(create_in(partition))
        events = [event async for event in log.read()]
        assert first.package_id in {event.package_id for event in events}
        assert {event.event_type for event in events} == {"v1.package.created"}, "readers see no administrative record"
        # Followers tell by it which partition an event lies in, whatever was passed over in between.
        for one, two in pairwise(event.position.offsets for event in events):
            assert len([p for p, offset in two.items() if one.get(p) != offset]) == 1
        rest = [event.package_id async for event in log.read(events[2].position)]
        assert sorted(rest) == sorted(event.package_id for event in events[3:])


@pytest.mark.services
async def test_a_record_behind_an_open_transaction_is_not_said_to_be_missing(kafka_url: str, tmp_path: Path) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log, gateway(settings, log) as writer:
        await serving(writer)
        with foreign_transaction(log, PARTITION):
            offset = await asyncio.to_thread(stray, settings)
            bad = BadRecord.of(Record(PARTITION, offset, b"", GARBAGE), "it is no event")
            with pytest.raises(PushBackError, match=f"offset {offset} .* hidden by an open transaction"):
                await writer.confirm_here(skip_of(bad))
            with pytest.raises(InvalidRequestError, match="holds no record"):
                await writer.confirm_here(replace(skip_of(bad), offset=offset + 1))
        assert (await writer.confirm_here(skip_of(bad))).sequence == 1


@pytest.mark.services
@pytest.mark.parametrize("restored_from", ["file", "log"])
async def test_a_take_over_passes_over_what_was_confirmed(kafka_url: str, tmp_path: Path, restored_from: str) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log:
        async with gateway(settings, log) as writer:
            await serving(writer)
            await writer.submit(create_in(PARTITION))
            offsets = [await asyncio.to_thread(stray, settings, value=value) for value in (GARBAGE, b"", GARBAGE)]
            await stands_after_submit(writer, offsets[0])
            # Any of them can be confirmed; what comes behind may be so before what comes first.
            for offset in reversed(offsets):
                await writer.confirm_here(skip_of(await bad_record(log, PARTITION, offset)))
            await writer.submit(create_in(PARTITION))
        if restored_from == "log":
            settings = replace(settings, state_dir=tmp_path / "empty")
        async with gateway(settings, log) as writer:
            await serving(writer)
            status = next(s for s in writer.status_here() if s.partition == PARTITION)
            assert (status.restored_from, status.skipped, status.bad_offset) == (restored_from, 3, None)
            offset = await asyncio.to_thread(stray, settings, value=b"one more")
            await stands_after_submit(writer, offset)
            confirmed = await writer.confirm_here(skip_of(await bad_record(log, PARTITION, offset)))
            assert confirmed.sequence == 3, "a confirmation covers all records of its digest before it"


async def stands_after_submit(writer: KafkaWriter, offset: int) -> None:
    """Submit a command to the partition, which finds the record then."""
    with pytest.raises(UnavailableError, match="is no event"):
        await writer.submit(create_in(PARTITION))
    await stands(writer, offset)


@pytest.mark.services
@pytest.mark.parametrize("kind", ["key", "partition"])
async def test_an_event_that_does_not_belong_where_it_lies_is_none(kafka_url: str, tmp_path: Path, kind: str) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log, gateway(settings, log) as writer:
        await serving(writer)
        source = PARTITION if kind == "key" else 0
        made = await writer.submit(create_in(source))
        value = (await records_of(log, source))[0].value
        key = str(made.package_id) if kind == "partition" else str(create_in(PARTITION).package_id)
        offset = await asyncio.to_thread(stray, settings, value=value, key=key.encode())
        await stands_after_submit(writer, offset)
        await writer.confirm_here(skip_of(await bad_record(log, PARTITION, offset)))
        assert (await writer.submit(create_in(PARTITION))).sequence == 1
        assert (await read_all(log)).count("v1.package.created") in (2, 3)  # the one in doubt may be recorded


async def records_of(log: KafkaLog, partition: int) -> list[Record]:
    end = (await log.end()).offsets
    return [r async for batch in log.scan({partition: 0}, {partition: end[partition]}) for r in batch.records]


def irregular(writer: KafkaWriter) -> tuple[int, int]:
    """How many records came again in the partition, and how many packages are quarantined."""
    status = next(s for s in writer.status_here() if s.partition == PARTITION)
    return status.repeated, status.quarantined


async def submitted(writer: KafkaWriter, command: Command) -> Acknowledgement:
    """The command's answer, tried again with the same id while its outcome is unknown, as clients do."""
    async with asyncio.timeout(PATIENCE_SECONDS):
        while True:
            try:
                return await writer.submit(command)
            except UnavailableError:
                await asyncio.sleep(0)


@pytest.mark.services
async def test_records_that_come_again_are_passed_over_by_writers_and_readers(kafka_url: str, tmp_path: Path) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log, gateway(settings, log) as writer:
        await serving(writer)
        made = create_in(PARTITION)
        first = await writer.submit(made)
        await writer.submit(ingest(made.package_id, "a", "b"))
        for record in await records_of(log, PARTITION):
            await asyncio.to_thread(stray, settings, value=record.value, key=record.key)
        more = await submitted(writer, ingest(made.package_id, "c", name="more"))
        assert more.sequence == 4
        assert await writer.submit(made) == first
        assert irregular(writer) == (3, 0)
        assert [event.sequence async for event in log.read()] == [1, 2, 3, 4]


@pytest.mark.services
@pytest.mark.parametrize("kind", ["gap", "chain", "content"])
async def test_a_contradicted_package_takes_no_more_events_and_others_go_on(
    kafka_url: str, tmp_path: Path, kind: str
) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    async with open_kafka_log(settings) as log:
        made, ingested = create_in(PARTITION), None
        async with gateway(settings, log) as writer:
            await serving(writer)
            ingested = ingest(made.package_id, "a")
            await writer.submit(made)
            recorded = await writer.submit(ingested)
            last = decode((await records_of(log, PARTITION))[-1].value)
            wrong = {
                "gap": replace(last, sequence=7),
                "chain": replace(last, sequence=3, previous_digest=bytes(32)),
                "content": replace(last, actor="eve"),
            }[kind]
            await asyncio.to_thread(stray, settings, value=encode(wrong), key=str(wrong.package_id).encode())
            other = create_in(PARTITION)
            assert (await submitted(writer, other)).sequence == 1
        # Also for a writer that goes on from the file.
        async with gateway(settings, log) as writer:
            await serving(writer)
            assert irregular(writer) == (0, 1)
            for refused in (ingest(made.package_id, "b", name="b"), finalize(made.package_id)):
                with pytest.raises(PackageQuarantinedError, match="contradicts"):
                    await writer.submit(refused)
            with pytest.raises(PackageQuarantinedError):
                await writer.check_ingest(IngestCheck(made.package_id, ["b"], None))
            assert await writer.submit(ingested) == recorded, "what was recorded is answered as before"
            assert (await writer.submit(ingest(other.package_id, "a"))).sequence == 2


@pytest.mark.services
@pytest.mark.parametrize("group", ["writers", "projector.registry"])
async def test_nothing_is_recorded_while_a_member_of_an_older_release_could_not_read_it(
    kafka_url: str, tmp_path: Path, group: str
) -> None:
    settings = kafka_settings(kafka_url, tmp_path)
    another = replace(settings, log_url=f"{settings.log_url}-another")
    async with (
        open_kafka_log(another) as elsewhere,
        open_kafka_log(settings) as log,
        lone_writer(settings, log) as writer,
    ):
        await serving(writer)
        offset = await asyncio.to_thread(stray, settings)
        await stands_after_submit(writer, offset)
        bad = await bad_record(log, PARTITION, offset)
        # It has subscribed to another topic, so that it takes no partition of this one.
        consumer = make_consumer(log.kafka.member(f"{log.kafka.prefix}.{group}", "http://10.0.0.1:7000", {}))
        try:
            consumer.subscribe([elsewhere.kafka.topic])

            async def joined() -> bool:
                await asyncio.to_thread(consumer.poll, 0.1)
                members = await log.blocking(lambda: log.cluster.members(f"{log.kafka.prefix}.{group}"))
                return any(member.client_id == "http://10.0.0.1:7000" for member in members or ())

            await until(joined, PATIENCE_SECONDS, "the older member is not seen")
            await serving_or_standing(writer)
            with pytest.raises(ConflictError, match=r"http://10\.0\.0\.1:7000 .* upgrade it"):
                await writer.confirm_here(skip_of(bad))
        finally:
            consumer.close()
        await serving_or_standing(writer)
        assert (await writer.confirm_here(skip_of(bad))).sequence == 1


async def serving_or_standing(writer: KafkaWriter) -> None:
    """Wait until the group has settled, and the partition stands before its record again."""

    async def settled() -> bool:
        if await asyncio.to_thread(writer._group.members) is None:
            return False
        return any(s.bad_offset is not None for s in writer.status_here())

    await until(settled, PATIENCE_SECONDS, "the group does not settle")


@pytest.fixture
def deployment(kafka_url: str, s3_bucket: dict[str, Any], tmp_path: Path) -> Settings:
    views = f"sqlite+aiosqlite:///{tmp_path / 'views.db'}"
    return kafka_settings(kafka_url, tmp_path, views_url=views, internal_secret=SECRET, **s3_bucket)


def created(gateway: ProductProcess) -> str:
    """Create a package through the gateway; its id. Raises HTTPError."""
    body = b'{"name":"n","producer":"p","subject":"s","retention_class":"scratch"}'
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{gateway.endpoint}/v1/packages", body, headers)  # noqa: S310 - of our own
    with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310 - as above
        found: str = json.loads(answer.read())["package_id"]
        return found


def wait(condition: Callable[[], bool], otherwise: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, otherwise
        time.sleep(0.1)  # an answer over HTTP or of a command, which nothing announces


@pytest.mark.services
@pytest.mark.processes
def test_operators_see_the_record_everywhere_and_confirm_it_by_one_command(
    deployment: Settings, tmp_path: Path
) -> None:
    output_of(deployment, "migrate")
    ports = free_ports(2)
    with (
        ProductProcess(deployment, tmp_path / "gateway", "gateway", port=ports[0]) as gateway,
        ProductProcess(deployment, tmp_path / "projector", "projector", listens=False, port=ports[1]),
    ):
        wait(lambda: partitions_of(gateway) == PARTITIONS, "the gateway does not serve every partition")
        before = [created(gateway) for _ in range(6)]
        offset = stray(deployment)

        def stopped() -> bool:
            try:
                created(gateway)
            except urllib.error.HTTPError:
                return f"log skip {PARTITION} {offset}" in readiness(gateway)
            return False

        wait(stopped, "the partition goes on")
        status = json.loads(output_of(deployment, "status", "--json"))
        writer = status["writers"][PARTITION]
        digest = writer["bad_record"]["digest"]
        command = f"artifact-store log skip {PARTITION} {offset} --digest {digest}"
        assert writer["bad_record"]["offset"] == offset
        for said in (
            writer["trouble"],
            readiness(gateway),
            run_command(deployment, "doctor").stdout.decode(),
            run_command(deployment, "verify").stdout.decode(),
            run_command(None, "tail", url=gateway.endpoint).stderr.decode(),
        ):
            assert command in said
        name = "artifact_store_partition_bad_record_offset"
        labels = f'{{digest="{digest}",partition="{PARTITION}"}}'
        assert {k: v for k, v in metrics_of(gateway).items() if k.startswith(name)} == {name + labels: float(offset)}
        output_of(deployment, *command.split()[1:], "--reason", "a stray producer", "--actor", "ada")
        wait(lambda: readiness(gateway) == "", "the partition does not go on")
        after = [created(gateway) for _ in range(6)]
        events = [json.loads(line) for line in output_of(None, "tail", "--json", url=gateway.endpoint).splitlines()]
        assert {event["package_id"] for event in events} >= {*before, *after}
        assert {event["type"] for event in events} == {"v1.package.created"}

        def caught_up() -> bool:
            projections = json.loads(output_of(deployment, "status", "--json"))["projections"]
            return all((p["behind"], p["parked"]) == (0, 0) for p in projections)

        wait(caught_up, "the views do not go on")
        report = json.loads(output_of(deployment, "verify", "--json"))
        assert (report["skipped"], report["administrative"], report["violation_count"]) == (1, 1, 0)
        writer = json.loads(output_of(deployment, "status", "--json"))["writers"][PARTITION]
        assert (writer["skipped"], writer["bad_record"]) == (1, None)
        assert metrics_of(gateway)[f'artifact_store_partition_skipped{{partition="{PARTITION}"}}'] == 1
        shown = f"partition {PARTITION}: 1 records skipped, 0 repeated, 0 packages quarantined"
        for command in ("status", "doctor"):
            assert shown in output_of(deployment, command).decode()
        # Folded again from zero, beside the live view, it is the same.
        replayed = json.loads(output_of(deployment, "replay", "registry", "--json"))
        assert replayed["projection"] == "registry"
