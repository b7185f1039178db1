"""A log that lost acknowledged events, whatever remembers them, takes no writes until an operator accepts the loss."""

from __future__ import annotations

import asyncio
import json
import shutil
from collections import Counter
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from confluent_kafka import Producer, TopicPartition

from artifact_store.errors import ConflictError, CorruptError, InvalidRequestError, LogLostError
from artifact_store.events import Event, LossAccepted
from services.blobs.port import BlobStore
from services.config import SecretStr, Settings
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.driver import PartitionLease
from services.log.kafka.tail import Reader
from services.log.port import PartitionStatus, Record
from services.log.records import AcceptLoss, AdministrativeHead, Confirmation, SkipRecord, read_record
from services.log.state import snapshots
from services.log.state.restore import States
from services.log.state.state_file import Anchor, LogPartition, StateFile
from tests.contract.log_invariants import read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.integration.conditions import until
from tests.integration.kafka.test_bad_records import bad_record, created, stray, wait
from tests.integration.kafka_stage import (
    PARTITIONS,
    create_in,
    kafka_settings,
    lone_writer,
    make_anew,
    open_kafka_log,
    operate,
    state_about,
)
from tests.integration.processes import (
    ProductProcess,
    get,
    metrics_of,
    output_of,
    partitions_of,
    readiness,
    run_command,
)
from tests.services.kafka import KafkaBroker

pytestmark = pytest.mark.services

AT_ONCE_SECONDS = 10.0
"""An answer that needs no take-over comes within this time, and not at the end of `SUBMIT_SECONDS`."""


async def fill(kafka: Settings, log: KafkaLog, store: BlobStore | None = None) -> None:
    """Some packages in every partition, acknowledged, and a state file of each on the disk."""
    async with lone_writer(kafka, log, snapshots=store) as writer:
        await ready(writer)
        for partition in range(PARTITIONS):
            for _ in range(3):
                await writer.submit(create_in(partition))


@asynccontextmanager
async def refusing(
    kafka: Settings, log: KafkaLog, store: BlobStore | None = None, *, partitions: int = PARTITIONS
) -> AsyncIterator[tuple[KafkaWriter, dict[int, PartitionStatus]]]:
    """A writer that refuses to append to so many partitions, the first ones, and what it shows of them."""
    async with lone_writer(kafka, log, snapshots=store) as writer:
        shown: dict[int, PartitionStatus] = {}

        async def refused() -> bool:
            shown.update({s.partition: s for s in await writer.status()})
            return all("accept-loss" in (shown[p].trouble or "") for p in range(partitions))

        await until(refused, PATIENCE_SECONDS, f"it writes, or says nothing: {shown}")
        for partition in range(partitions):
            with pytest.raises(LogLostError, match=f"partition {partition} lost"):
                await writer.submit(create_in(partition))
            assert shown[partition].since is None, "the partition is shown as one that is written to"
        for partition in range(partitions, PARTITIONS):
            await writer.submit(create_in(partition))
        assert "accept-loss" in (await writer.ready() or "")
        yield writer, shown


def state_of(kafka: Settings, partition: int) -> Path:
    """The partition's only state file."""
    [found] = kafka.state_dir.glob(f"*-{partition}.db")
    return found


async def test_a_state_beyond_the_end_stops_its_partition_and_is_kept(kafka: Settings, log: KafkaLog) -> None:
    await fill(kafka, log)
    path = state_of(kafka, 0)
    with state_about(path) as about:
        about[3] += 1_000
        offset, digest = about[3] - 1, about[4]
    before = len(await read_valid(log))
    for _ in range(2):  # nothing changes by starting it again
        async with refusing(kafka, log, partitions=1) as (_, shown):
            trouble = shown[0].trouble or ""
        assert f"partition 0 lost what it had acknowledged: the file {path} stands on" in trouble
        assert f"the record at offset {offset} with digest {digest.hex()} of log {await log.identity()}" in trouble
        assert "but the log ends at offset" in trouble
        assert f"`artifact-store log accept-loss 0 {offset} --digest {digest.hex()}`" in trouble
    with state_about(path) as about:
        assert (about[3] - 1, about[4]) == (offset, digest)
    others = 2 * (PARTITIONS - 1)
    assert len(await read_valid(log)) == before + others


async def test_a_state_on_a_record_that_is_another_one_by_now_names_both(kafka: Settings, log: KafkaLog) -> None:
    await fill(kafka, log)
    with state_about(state_of(kafka, 0)) as about:
        about[4], held = bytes(32), about[4]
    async with refusing(kafka, log, partitions=1) as (_, shown):
        trouble = shown[0].trouble or ""
    assert f"with digest {bytes(32).hex()}" in trouble
    assert f"but the log holds a record with digest {held.hex()} there" in trouble


async def test_a_state_on_an_offset_that_holds_no_record_is_no_reason_to_wait(kafka: Settings, log: KafkaLog) -> None:
    """A transaction's marker lies there: so it is when the log was cut off and take-overs went on with it."""
    await fill(kafka, log)
    with state_about(state_of(kafka, 0)) as about:
        about[3] += 1
    async with refusing(kafka, log, partitions=1) as (_, shown):
        assert "but the log holds no record there" in (shown[0].trouble or "")


async def test_a_deposed_leader_that_lacks_records_is_no_proof_of_a_loss(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A consumer is told that its offset is out of range, although the partition's leader has the record."""
    await fill(kafka, log)
    asked: Counter[tuple[int, ...]] = Counter()

    class FromDeposedLeader(Reader):
        def take(self, limit: int, timeout: float, *, headers: bool = False) -> list[Record]:
            asked[tuple(self.reached())] += 1
            if asked[tuple(self.reached())] == 1:
                raise CorruptError("the offset is no longer in the log")
            return super().take(limit, timeout)

    with monkeypatch.context() as patched:
        patched.setattr("services.log.kafka.driver.Reader", FromDeposedLeader)
        async with lone_writer(kafka, log) as writer:
            await ready(writer)
            assert {status.restored_from for status in await writer.status()} == {"file"}
    assert set(asked) == {(partition,) for partition in range(PARTITIONS)}


async def test_a_partition_whose_beginning_was_deleted_with_the_rest_is_refused_and_its_state_is_kept(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Under a running gateway; none would start on such a topic. No acceptance helps: there is nothing to fold."""
    await fill(kafka, log)
    path = state_of(kafka, 0)
    with state_about(path) as about:
        offset = about[3] - 1
    behind = [TopicPartition(log.kafka.topic, 0, (await log.end()).offsets[0])]
    await asyncio.to_thread(operate, log, lambda admin: admin.delete_records(behind))
    monkeypatch.setattr("services.log.kafka.topic.check", lambda _, cluster, **__: cluster.topic())
    monkeypatch.setattr("services.log.kafka.topic.losses", lambda *_: [])
    async with lone_writer(kafka, log) as writer:

        async def refused() -> bool:
            [trouble] = [status.trouble for status in await writer.status() if status.partition == 0]
            return "no longer in the log" in (trouble or "")

        await until(refused, PATIENCE_SECONDS, "it is written to")
        with pytest.raises(CorruptError):
            await writer.submit(create_in(0))
        async with asyncio.timeout(AT_ONCE_SECONDS):
            with pytest.raises(ConflictError, match=r"no longer in the log.* Restore the topic"):
                await writer.confirm_here(AcceptLoss(0, offset, bytes(32), "ada", "", uuid4()))
        await writer.submit(create_in(1))
    with state_about(path) as about:
        assert about[3] - 1 == offset


async def test_a_topic_that_was_made_again_is_not_written_to(kafka: Settings, log: KafkaLog) -> None:
    await fill(kafka, log)
    before = await log.identity()
    await make_anew(log)
    async with refusing(kafka, log) as (_, shown):
        for partition in range(PARTITIONS):
            trouble = shown[partition].trouble or ""
            assert f"of log {before}, but the log is {await log.identity()}: the topic was deleted and made" in trouble
    assert await read_valid(log) == []
    for partition in range(PARTITIONS):
        with state_about(state_of(kafka, partition)) as about:
            assert about[0] == before.bytes


async def test_a_topic_that_was_made_again_before_anything_was_acknowledged_is_a_new_one(
    kafka: Settings, log: KafkaLog
) -> None:
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
    await make_anew(log)
    async with lone_writer(kafka, log) as writer:
        await ready(writer)
        await writer.submit(create_in(0))
    assert len(await read_valid(log)) == 1


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
@pytest.mark.parametrize("witnesses", ["left", "missing"])
async def test_a_snapshot_beyond_the_end_stops_the_partition_on_an_empty_disk(
    kafka: Settings, log: KafkaLog, store: BlobStore, witnesses: str
) -> None:
    """Snapshots of earlier releases have no witness beside them."""
    await fill(kafka, log, store)
    path = state_of(kafka, 0)
    with state_about(path) as about:
        about[3] += 1_000
        offset, digest = about[3] - 1, about[4]
    await snapshot_of(path, log, store)
    if witnesses == "missing":
        for key in await store.list_objects("snapshots/witnesses/"):
            await store.delete_object(key)
    for _ in range(2):
        shutil.rmtree(kafka.state_dir)
        async with refusing(kafka, log, store, partitions=1) as (_, shown):
            trouble = shown[0].trouble or ""
        assert "lost what it had acknowledged: the snapshot snapshots/" in trouble
        assert f"the record at offset {offset} with digest {digest.hex()}" in trouble


async def snapshot_of(path: Path, log: KafkaLog, store: BlobStore) -> None:
    """Store this state of partition 0 as its writer does."""
    place = LogPartition(await log.identity(), log.kafka.topic, 0)
    file = StateFile.open(path, place)
    file.close()
    made = snapshots.Snapshots(store, asyncio.get_running_loop())
    made.offer(place, path, file.anchor.next_offset, closing=True)
    await asyncio.to_thread(made.close, PATIENCE_SECONDS)


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_a_topic_that_was_made_again_is_not_written_to_from_an_empty_disk(
    kafka: Settings, log: KafkaLog, store: BlobStore
) -> None:
    await fill(kafka, log, store)
    before = await log.identity()
    await make_anew(log)
    shutil.rmtree(kafka.state_dir)
    async with refusing(kafka, log, store) as (_, shown):
        assert all(f"of log {before}, but the log is" in (status.trouble or "") for status in shown.values())


async def test_what_one_disk_proves_is_known_on_every_other(kafka: Settings, log: KafkaLog, store: BlobStore) -> None:
    """The file itself is made too small for a snapshot; the machine that has it may never come back."""
    await fill(kafka, log, store)
    with state_about(state_of(kafka, 0)) as about:
        about[3] += 1
        offset, digest = about[3] - 1, about[4]
    async with refusing(kafka, log, store, partitions=1):
        pass
    elsewhere = replace(kafka, state_dir=kafka.state_dir.with_name("elsewhere"))
    async with refusing(elsewhere, log, store, partitions=1) as (_, shown):
        assert f"the record at offset {offset} with digest {digest.hex()}" in (shown[0].trouble or "")


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_older_snapshots_and_files_prove_nothing(kafka: Settings, log: KafkaLog, store: BlobStore) -> None:
    await fill(kafka, log, store)
    old = kafka.state_dir.with_name("old")
    shutil.copytree(kafka.state_dir, old)
    for _ in range(3):
        await fill(kafka, log, store)
    for folder in (old, kafka.state_dir.with_name("empty"), kafka.state_dir):
        await fill(replace(kafka, state_dir=folder), log, store)


async def test_a_broker_that_was_restored_from_an_older_copy_is_noticed_until_the_newer_one_is_back(
    tmp_path: Path,
) -> None:
    older, newer = tmp_path / "older", tmp_path / "newer"
    with KafkaBroker(tmp_path / "broker") as broker:

        async def put_back(saved: Path, *, keep: Path | None = None) -> None:
            """Let the broker go on with the saved data, and keep what it has now."""
            await asyncio.to_thread(broker.stop)
            if keep is not None:
                shutil.copytree(broker.data, keep)
            shutil.rmtree(broker.data)
            shutil.copytree(saved, broker.data)
            await asyncio.to_thread(broker.start)

        kafka = kafka_settings(f"kafka://{broker.endpoint}/private", tmp_path)
        async with open_kafka_log(kafka) as log:
            await fill(kafka, log)
            await asyncio.to_thread(broker.stop)
            shutil.copytree(broker.data, older)
            await asyncio.to_thread(broker.start)
            await fill(kafka, log)
            events = {event.event_id for event in await read_valid(log)}
        await put_back(older, keep=newer)
        async with open_kafka_log(kafka) as log:
            async with refusing(kafka, log):
                assert len(await read_valid(log)) < len(events), "reads go on"
            await put_back(newer)
            await fill(kafka, log)
            assert events < {event.event_id for event in await read_valid(log)}


def acceptance(status: PartitionStatus, **changes: Any) -> AcceptLoss:
    """Of what this partition shows as lost."""
    assert status.lost_offset is not None
    digest = bytes.fromhex(status.lost_digest or "")
    confirmation = AcceptLoss(status.partition, status.lost_offset, digest, "ada", "the disk burned", uuid4())
    return replace(confirmation, **changes)


async def accept(writer: KafkaWriter, shown: Mapping[int, PartitionStatus]) -> None:
    """Accept what these partitions show, and wait until they are written to."""
    for status in shown.values():
        if status.lost_offset is not None:
            await writer.confirm_here(acceptance(status))
    await ready(writer)


async def losses_accepted(log: KafkaLog) -> list[LossAccepted]:
    end = (await log.end()).offsets
    records = [r async for batch in log.scan(dict.fromkeys(end, 0), end) for r in batch.records]
    events = [found for r in records if isinstance(found := read_record(r, log.partition_of), Event)]
    return [event.payload for event in events if isinstance(event.payload, LossAccepted)]


async def test_a_process_remembers_what_a_lease_has_read_before_the_lease_closes(
    kafka: Settings, log: KafkaLog
) -> None:
    # A call to Kafka may keep a lease from closing while the group assigns its partition to the process again.
    await fill(kafka, log)
    states = States(kafka.state_dir)
    with closing(await leased(log, await log.identity(), states)) as lease:
        before = states.remembered[0][1]
        assert before == lease.state.anchor
        assert before.next_offset > 0
        bad = await bad_record(log, 0, await asyncio.to_thread(stray, kafka, partition=0))
    with closing(await leased(log, await log.identity(), states)) as lease:
        assert states.remembered[0][1] == before, "it stops before the stranger's record"
        skip = SkipRecord(0, bad.offset, bad.digest, "ada", "a stray producer", uuid4())
        await asyncio.to_thread(lease.record, skip, 1, lambda: None)
        assert states.remembered[0][1] == lease.state.anchor
        assert lease.state.anchor.next_offset > bad.offset


async def leased(log: KafkaLog, identity: UUID, states: States) -> PartitionLease:
    """Take partition 0 over."""
    return await asyncio.to_thread(
        lambda: PartitionLease.take_over(
            log.kafka,
            log.cluster,
            0,
            identity,
            states,
            is_ours=lambda: True,
            stopping=lambda: False,
            in_doubt=lambda: False,
        )
    )


async def test_a_loss_that_a_process_remembers_is_accepted_once_before_a_record_that_stops_the_partition(
    kafka: Settings, log: KafkaLog
) -> None:
    await fill(kafka, log)
    bad = await bad_record(log, 0, await asyncio.to_thread(stray, kafka, partition=0))
    skip = SkipRecord(0, bad.offset, bad.digest, "ada", "a stray producer", uuid4())
    identity = await log.identity()
    read = identity, Anchor(bad.offset + 1_000, bytes(32), 1)
    lease = await leased(log, identity, States(kafka.state_dir, remembered={0: read}))
    with closing(lease):
        accepting = AcceptLoss(0, bad.offset + 999, bytes(32), "ada", "the disk burned", uuid4())

        async def record(confirmation: Confirmation) -> AdministrativeHead:
            return await asyncio.to_thread(lease.record, confirmation, 1, lambda: None)

        assert bad == lease.stopped
        found = [(await record(confirmation)).sequence for confirmation in (accepting, accepting, skip, accepting)]
        assert found == [1, 1, 2, 1], "a repeat gets the first answer"
        assert not lease.losses
    [recorded] = await losses_accepted(log)
    assert (recorded.evidence, recorded.expected_offset) == ("file", accepting.offset)


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_a_loss_that_is_accepted_is_recorded_and_forgotten_everywhere(
    kafka: Settings, log: KafkaLog, store: BlobStore
) -> None:
    await fill(kafka, log, store)
    elsewhere = replace(kafka, state_dir=kafka.state_dir.with_name("elsewhere"))
    shutil.copytree(kafka.state_dir, elsewhere.state_dir)
    for settings, further in ((elsewhere, 10), (kafka, 1_000)):
        with state_about(state_of(settings, 0)) as about:
            about[3] += further
            offset, digest = about[3] - 1, about[4]
    await snapshot_of(state_of(kafka, 0), log, store)
    async with refusing(kafka, log, store, partitions=1) as (writer, shown):
        right = acceptance(shown[0])
        assert (right.offset, right.digest) == (offset, digest)
        for wrong in (replace(right, offset=offset - 1), replace(right, digest=bytes(32)), replace(right, partition=1)):
            with pytest.raises(InvalidRequestError, match="not known to have lost"):
                await writer.confirm_here(wrong)
        answered = await writer.confirm_here(right)
        await ready(writer)
        assert await writer.confirm_here(right) == answered, "a retry gets the first answer"
        await writer.submit(create_in(0))
    [recorded] = await losses_accepted(log)
    expected = LossAccepted(
        await log.identity(), 0, "file", None, offset, digest, None, recorded.end_offset, "the disk burned"
    )
    assert recorded == expected
    assert 0 < recorded.end_offset < offset
    # Here, on another machine that remembers less of what was lost, and on an empty disk.
    for settings in (kafka, elsewhere, replace(kafka, state_dir=kafka.state_dir.with_name("empty"))):
        await fill(settings, log, store)
    left = await store.list_objects(f"snapshots/witnesses/{log.kafka.topic}/0/")
    assert f"{offset + 1:020d}" not in "".join(left)
    assert len(await losses_accepted(log)) == 1


async def test_what_is_lost_after_an_acceptance_is_another_loss(kafka: Settings, log: KafkaLog) -> None:
    await fill(kafka, log)
    with state_about(state_of(kafka, 0)) as about:
        about[3] += 1_000
    async with refusing(kafka, log, partitions=1) as (writer, shown):
        await accept(writer, {0: shown[0]})
    await fill(kafka, log)
    [path] = kafka.state_dir.glob("*-0.*db")
    with state_about(path) as about:
        about[3] += 100  # not as far as what was accepted
    async with refusing(kafka, log, partitions=1) as (writer, shown):
        await accept(writer, {0: shown[0]})
    await fill(kafka, log)
    assert len(await losses_accepted(log)) == 2


async def test_a_topic_that_was_made_again_is_written_to_once_that_is_accepted(
    kafka: Settings, log: KafkaLog, store: BlobStore
) -> None:
    await fill(kafka, log, store)
    before = await log.identity()
    elsewhere = replace(kafka, state_dir=kafka.state_dir.with_name("elsewhere"))
    shutil.copytree(kafka.state_dir, elsewhere.state_dir)
    await make_anew(log)
    async with refusing(kafka, log, store) as (writer, shown):
        await accept(writer, shown)
    for settings in (kafka, elsewhere):
        await fill(settings, log, store)
        assert all(len(list(settings.state_dir.glob(f"*-{p}.*db"))) == 1 for p in range(PARTITIONS))
    recorded = await losses_accepted(log)
    assert {payload.partition: payload.previous_log for payload in recorded} == dict.fromkeys(range(PARTITIONS), before)
    await make_anew(log)  # what was accepted is gone with the topic that it was recorded in
    async with refusing(kafka, log, store):
        pass


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
@pytest.mark.parametrize("missing", [0, 1])
async def test_a_copy_of_the_log_is_written_to_unless_it_lacks_the_last_record(
    kafka: Settings, log: KafkaLog, store: BlobStore, missing: int
) -> None:
    """As after a restore from a mirror: another topic, other offsets, the same records in their order."""
    await fill(kafka, log, store)
    elsewhere = replace(kafka, state_dir=kafka.state_dir.with_name("elsewhere"))
    shutil.copytree(kafka.state_dir, elsewhere.state_dir)
    end = (await log.end()).offsets
    records = [record async for batch in log.scan(dict.fromkeys(end, 0), end) for record in batch.records]
    await make_anew(log)
    producer = Producer({"bootstrap.servers": log.kafka.bootstrap})
    last = [record for record in records if record.partition == 0][-1]
    for record in records:
        if record is not last or not missing:
            producer.produce(log.kafka.topic, record.value, record.key, record.partition)
    assert await asyncio.to_thread(producer.flush, 30) == 0
    if missing:
        async with refusing(kafka, log, store, partitions=1):
            pass
        return
    for settings in (kafka, elsewhere, replace(kafka, state_dir=kafka.state_dir.with_name("empty"))):
        await fill(settings, log, store)
        assert all(len(list(settings.state_dir.glob(f"*-{p}.*db"))) == 1 for p in range(PARTITIONS))
    assert await losses_accepted(log) == []


class Unready(ProductProcess):
    """A gateway that takes no writes when it begins."""

    def answers(self) -> bool:
        """Whether it is alive."""
        return get(f"{self.endpoint}/healthz") == 200


@pytest.mark.processes
def test_operators_see_the_loss_everywhere_and_accept_it_by_one_command(
    kafka_url: str, s3_bucket: dict[str, Any], tmp_path: Path
) -> None:
    views = f"sqlite+aiosqlite:///{tmp_path / 'views.db'}"
    deployment = kafka_settings(kafka_url, tmp_path, views_url=views, internal_secret=SecretStr("sesame"), **s3_bucket)
    output_of(deployment, "migrate")
    with ProductProcess(deployment, tmp_path / "first", "gateway") as gateway:
        wait(lambda: partitions_of(gateway) == PARTITIONS, "the gateway does not serve every partition")
        before = [created(gateway) for _ in range(12)]
    with state_about(state_of(deployment, 1)) as about:
        about[3] += 1_000
        offset, digest = about[3] - 1, about[4].hex()
    command = f"artifact-store log accept-loss 1 {offset} --digest {digest}"
    with Unready(deployment, tmp_path / "second", "gateway") as gateway:
        wait(lambda: command in readiness(gateway), "the partition is written to")
        writer = json.loads(output_of(deployment, "status", "--json"))["writers"][1]
        assert writer["lost_record"] == {"offset": offset, "digest": digest}
        doctor = run_command(deployment, "doctor")
        assert doctor.returncode == 1
        for said in (writer["trouble"], doctor.stdout.decode(), output_of(deployment, "status").decode()):
            assert command in said
        name = f'artifact_store_partition_lost_record_offset{{digest="{digest}",partition="1"}}'
        assert metrics_of(gateway)[name] == offset
        refused = run_command(deployment, *command.replace(digest, "0" * 64).split()[1:])
        assert refused.returncode == 1
        assert b"not known to have lost" in refused.stderr
        output_of(deployment, *command.split()[1:], "--reason", "the disk burned", "--actor", "ada")
        wait(lambda: readiness(gateway) == "", "the partition does not go on")
        after = [created(gateway) for _ in range(12)]
        events = [json.loads(line) for line in output_of(None, "tail", "--json", url=gateway.endpoint).splitlines()]
        assert {event["package_id"] for event in events} == {*before, *after}
        findings = json.loads(run_command(deployment, "doctor", "--json").stdout)["findings"]
        assert {f["part"] for f in findings if not f["ok"]} <= {"projections"}  # which nobody runs here
        report = json.loads(run_command(deployment, "verify", "--json").stdout)
        assert (report["administrative"], report["violation_count"]) == (1, 0)
