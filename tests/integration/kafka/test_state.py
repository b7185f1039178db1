"""A writer that takes over restores its state from its file, a snapshot or the log, whichever can be trusted."""

from __future__ import annotations

import json
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from uuid import uuid4

import pytest
from blake3 import blake3

from artifact_store.errors import AnswerExpiredError, IllegalPackageStateError, PackageAbandonedError
from artifact_store.manifest import ContentAddress
from artifact_store.models import Acknowledgement
from services.blobs.local import LocalBlobStore
from services.blobs.port import BlobStore
from services.config import Settings
from services.core.decide import (
    ANSWERS_KEPT_MICROS,
    MAX_IDLE_MICROS,
    Command,
    FinalizePackage,
    IngestCheck,
    IngestFiles,
)
from services.core.state import CREATED
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.state import snapshots
from services.log.state.state_file import FORMAT, sealed, unsealed
from services.wiring import open_blobs
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    PARTITIONS,
    create_in,
    lone_writer,
    state_about,
)

pytestmark = pytest.mark.services

Answered = list[tuple[Command, Acknowledgement]]


@asynccontextmanager
async def writer_on(kafka: Settings, log: KafkaLog, store: BlobStore | None = None) -> AsyncIterator[KafkaWriter]:
    async with lone_writer(kafka, log, snapshots=store) as writer:
        await ready(writer)
        yield writer


async def fill(writer: KafkaWriter) -> Answered:
    """In every partition a finalized package, and an open one with a file."""
    done: Answered = []
    for partition in range(PARTITIONS):
        for finalized in (True, False):
            made = create_in(partition)
            added = IngestFiles(made.package_id, uuid4(), "ada", (stored("a"), stored("b")))
            ended = FinalizePackage(made.package_id, uuid4(), "ada")
            commands: list[Command] = [made, added, *([ended] if finalized else [])]
            done += [(command, await writer.submit(command)) for command in commands]
    return done


async def assert_goes_on(writer: KafkaWriter, done: Answered) -> Answered:
    """Every retry gets its first answer; open packages go on, finalized ones do not. What was done in addition."""
    for command, answer in done:
        assert await writer.submit(command) == answer
    closed = {command.package_id for command, _ in done if isinstance(command, FinalizePackage)}
    more: Answered = []
    for package in dict.fromkeys(command.package_id for command, _ in done):
        added = IngestFiles(package, uuid4(), "ada", (stored(f"{uuid4()}"),))
        if package in closed:
            with pytest.raises(IllegalPackageStateError):
                await writer.submit(added)
        else:
            more.append((added, await writer.submit(added)))
    return more


async def restored_from(writer: KafkaWriter) -> set[str | None]:
    return {status.restored_from for status in await writer.status()}


def files(kafka: Settings) -> list[Path]:
    return sorted(kafka.state_dir.glob("*.db"))


async def test_a_restart_goes_on_from_the_files(kafka: Settings, log: KafkaLog) -> None:
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"log"}
        done = await fill(writer)
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"file"}
        done += await assert_goes_on(writer, done)
    async with writer_on(kafka, log) as writer:
        done += await assert_goes_on(writer, done)
    assert len(files(kafka)) == PARTITIONS
    assert_recorded_once(await read_valid(log), done)


async def test_a_restart_without_files_goes_on_from_the_log(kafka: Settings, log: KafkaLog) -> None:
    async with writer_on(kafka, log) as writer:
        done = await fill(writer)
    shutil.rmtree(kafka.state_dir)
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"log"}
        done += await assert_goes_on(writer, done)
    assert_recorded_once(await read_valid(log), done)


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
@pytest.mark.parametrize("where", ["local", "s3", "local, of the format before"])
async def test_an_empty_disk_goes_on_from_a_snapshot(
    kafka: Settings, log: KafkaLog, where: str, request: pytest.FixtureRequest, store: BlobStore, tmp_path: Path
) -> None:
    if where == "s3":
        store = open_blobs(Settings(**request.getfixturevalue("s3_bucket")))
    async with writer_on(kafka, log, store) as writer:
        done = await fill(writer)
    if "before" in where:
        await bring_to_the_format_before(store, f"snapshots/{await log.identity()}/", tmp_path / "copy.db")
    shutil.rmtree(kafka.state_dir)
    async with writer_on(kafka, log, store) as writer:
        assert await restored_from(writer) == {"snapshot"}
        done += await assert_goes_on(writer, done)
    assert_recorded_once(await read_valid(log), done)
    if where == "s3":
        await store.close()


async def bring_to_the_format_before(store: BlobStore, prefix: str, path: Path) -> None:
    """Replace the snapshots, each of one part, by what the release before would have made of the same state."""
    for key in [key for key in await store.list_objects(prefix) if key.endswith("/index")]:
        folder = key.removesuffix("index")
        path.write_bytes(await store.get_object(f"{folder}000000") or b"")
        with closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DROP TABLE irregular")
            connection.execute(f"PRAGMA user_version = {FORMAT - 1}")
        part = path.read_bytes()
        index = json.loads(await store.get_object(key) or b"")
        index |= {"size": len(part), "parts": [{"blake3": blake3(part).hexdigest()}]}
        before = folder.replace(f"-{FORMAT}-", f"-{FORMAT - 1}-")
        await store.put_object(f"{before}000000", part)
        await store.put_object(f"{before}index", json.dumps(index).encode())
        for name in ("index", "000000"):
            await store.delete_object(f"{folder}{name}")


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_the_newest_two_snapshots_are_kept(kafka: Settings, log: KafkaLog, store: BlobStore) -> None:
    for _ in range(4):
        async with writer_on(kafka, log, store) as writer:
            await fill(writer)
    identity = await log.identity()
    for partition in range(PARTITIONS):
        keys = await store.list_objects(f"snapshots/{identity}/{partition}/")
        assert sum(key.endswith("/index") for key in keys) == 2
        assert len(keys) == 4


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_snapshots_that_nobody_can_use_stand_in_the_way_of_none(
    kafka: Settings, log: KafkaLog, store: BlobStore
) -> None:
    """Those of another format of the file, and those that are damaged, also such as would be beyond the log's end."""
    async with writer_on(kafka, log, store) as writer:
        await fill(writer)
    prefix = f"snapshots/{await log.identity()}/0/"
    made = await store.list_objects(prefix)
    folder = made[0].removeprefix(prefix).partition("/")[0]
    position, format_, token = folder.split("-")
    strange = {
        "newer format": f"{position}-{int(format_) + 1}-{token}",
        "beyond the end": f"{10**9:020d}-{format_}-{token}",  # its index says another position
    }
    for key in made:
        for name in strange.values():
            await store.put_object(key.replace(folder, name), await store.get_object(key) or b"")
        await store.delete_object(key)
    for _ in range(3):
        shutil.rmtree(kafka.state_dir)
        async with writer_on(kafka, log, store) as writer:
            await fill(writer)
    left = {key.removeprefix(prefix).partition("/")[0] for key in await store.list_objects(prefix)}
    ours = left - set(strange.values())
    assert len(ours) == 2
    assert left - ours == {strange["newer format"], strange["beyond the end"]}
    shutil.rmtree(kafka.state_dir)
    async with writer_on(kafka, log, store) as writer:
        assert await restored_from(writer) == {"snapshot"}


async def test_a_snapshot_is_made_while_the_writer_serves(
    kafka: Settings, log: KafkaLog, store: BlobStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(snapshots, "SNAPSHOT_OFFSETS", 5)
    monkeypatch.setattr("services.log.state.partition_state.SAVE_EVENTS", 5)
    prefix = f"snapshots/{await log.identity()}"
    async with writer_on(kafka, log, store) as writer:
        done = await fill(writer)

        async def made() -> bool:
            keys = [await store.list_objects(f"{prefix}/{p}/") for p in range(PARTITIONS)]
            return all(any(key.endswith("/index") for key in found) for found in keys)

        await until(made, PATIENCE_SECONDS, "there is no snapshot of every partition")
        elsewhere = replace(kafka, state_dir=kafka.state_dir.with_name("elsewhere"))
    async with writer_on(elsewhere, log, store) as writer:
        assert await restored_from(writer) == {"snapshot"}
        done += await assert_goes_on(writer, done)
    assert_recorded_once(await read_valid(log), done)


def truncate(path: Path) -> None:
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size // 2)


def overwrite(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(4096)
        file.write(b"\x5a" * (path.stat().st_size - 4096))


def of_another_partition(path: Path) -> None:
    with state_about(path) as about:
        about[2] += PARTITIONS


def knows_a_package_wrongly(path: Path) -> None:
    """Stands before all events, and knows of open packages another last event than the log has."""
    with state_about(path) as about:
        about[3:5] = [0, b""]
    with closing(sqlite3.connect(path)) as connection, connection:
        for package, body in connection.execute("SELECT package_id, body FROM packages").fetchall():
            kind, created, created_at, last_event_at, sequence, digest, *rest = unsealed(body)
            if kind == CREATED:
                changed = sealed(kind, created, created_at, last_event_at, sequence, bytes(len(digest)), *rest)
                connection.execute("UPDATE packages SET body = ? WHERE package_id = ?", (changed, package))


SPOILING = [truncate, overwrite, of_another_partition, knows_a_package_wrongly]


@pytest.mark.parametrize("spoil", SPOILING, ids=lambda spoil: spoil.__name__)
async def test_files_that_cannot_be_trusted_are_rebuilt_from_the_log(
    kafka: Settings, log: KafkaLog, spoil: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    async with writer_on(kafka, log) as writer:
        done = await fill(writer)
    for path in files(kafka):
        spoil(path)
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"log"}
        done += await assert_goes_on(writer, done)
    assert caplog.text.count("discarded") == PARTITIONS
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"file"}
        done += await assert_goes_on(writer, done)
    assert_recorded_once(await read_valid(log), done)


async def damage(store: BlobStore, keys: Sequence[str]) -> None:
    for key in keys:
        await store.put_object(key, (await store.get_object(key) or b"")[:-20] + b"\x5a" * 20)


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
@pytest.mark.parametrize("part", ["000000", "index"])
@pytest.mark.parametrize("how", ["damaged", "missing"])
async def test_a_snapshot_that_is_not_whole_is_passed_over_for_an_older_one_or_the_log(
    kafka: Settings, log: KafkaLog, store: BlobStore, part: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    done: Answered = []
    for _ in range(2):
        async with writer_on(kafka, log, store) as writer:
            done += await fill(writer)
    prefix = f"snapshots/{await log.identity()}/"
    for left in ({"snapshot"}, {"log"}):
        newest = [
            [key for key in await store.list_objects(f"{prefix}{p}/") if key.endswith(part)][-1]
            for p in range(PARTITIONS)
        ]
        if how == "damaged":
            await damage(store, newest)
        else:
            for key in newest:
                await store.delete_object(key)
        shutil.rmtree(kafka.state_dir)
        async with lone_writer(kafka, log, snapshots=ReadOnly(store)) as writer:
            await ready(writer)
            assert await restored_from(writer) == left
            done += await assert_goes_on(writer, done)
        for p in range(PARTITIONS):  # so that the next one's turn comes
            folder = newest[p].removesuffix(part)
            for key in await store.list_objects(folder):
                await store.delete_object(key)
    if (part, how) != ("index", "missing"):
        assert "is not used" in caplog.text
    assert_recorded_once(await read_valid(log), done)


class ReadOnly:
    """A store that takes no more snapshots."""

    def __init__(self, store: BlobStore) -> None:
        self.get_object = store.get_object
        self.list_objects = store.list_objects
        self.delete_object = store.delete_object

    async def put_object(self, key: str, data: bytes) -> None:
        raise OSError(f"{key} is not taken ({len(data)} bytes)")


@pytest.mark.usefixtures("every_close_makes_a_snapshot")
async def test_a_snapshot_of_another_log_is_not_used(kafka: Settings, log: KafkaLog, store: BlobStore) -> None:
    async with writer_on(kafka, log, store) as writer:
        await fill(writer)
        identity = await log.identity()
    foreign = uuid4()
    for key in await store.list_objects(f"snapshots/{identity}/"):
        moved = key.replace(f"/{identity}/0/", f"/{foreign}/0/").replace(f"/{identity}/1/", f"/{identity}/0/")
        await store.put_object(moved, await store.get_object(key) or b"")
        if f"/{identity}/0/" in key:
            await store.delete_object(key)
    shutil.rmtree(kafka.state_dir)
    async with writer_on(kafka, log, store) as writer:
        shown = {status.partition: status.restored_from for status in await writer.status()}
        assert shown == {0: "log", 1: "snapshot", 2: "snapshot"}


async def test_a_store_that_is_down_holds_nobody_up(kafka: Settings, log: KafkaLog, tmp_path: Path) -> None:
    absent = LocalBlobStore(tmp_path / "absent")
    async with writer_on(kafka, log, absent) as writer:
        done = await fill(writer)
    async with writer_on(kafka, log, absent) as writer:
        done += await assert_goes_on(writer, done)
    await absent.close()


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@contextmanager
def held_by_another_process(path: Path) -> Iterator[None]:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        yield


async def test_a_file_that_another_process_holds_is_not_waited_for(kafka: Settings, log: KafkaLog) -> None:
    async with writer_on(kafka, log) as writer:
        done = await fill(writer)
    held = files(kafka)[0]
    before = held.read_bytes()
    with held_by_another_process(held.with_name(held.name + ".lock")):
        async with writer_on(kafka, log) as writer:
            shown = {status.partition: status.restored_from for status in await writer.status()}
            assert shown == {0: "log", 1: "file", 2: "file"}
            done += await assert_goes_on(writer, done)
    assert held.read_bytes() == before
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"file"}
        done += await assert_goes_on(writer, done)
    assert len(files(kafka)) == PARTITIONS
    assert_recorded_once(await read_valid(log), done)


async def test_a_file_that_breaks_while_it_is_in_use_is_rebuilt_and_the_caller_sees_only_delay(
    kafka: Settings, log: KafkaLog
) -> None:
    async with writer_on(kafka, log) as writer:
        done = await fill(writer)
    for path in files(kafka):
        connection = sqlite3.connect(path)
        with connection:
            connection.execute("UPDATE packages SET body = zeroblob(length(body))")
        connection.close()
    async with writer_on(kafka, log) as writer:
        assert await restored_from(writer) == {"file"}
        done += await assert_goes_on(writer, done)
        assert await restored_from(writer) == {"log"}
    assert_recorded_once(await read_valid(log), done)


async def test_a_state_is_saved_while_the_writer_is_idle(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("services.log.state.partition_state.SAVE_SECONDS", 0.1)
    monkeypatch.setattr("services.log.sequencer.partition_writer._IDLE_SECONDS", 0.1)
    async with writer_on(kafka, log) as writer:
        made = create_in(0)
        await writer.submit(made)

        async def saved() -> bool:
            connection = sqlite3.connect(files(kafka)[0])
            try:
                found = connection.execute("SELECT count(*) FROM packages").fetchone()
            finally:
                connection.close()
            return bool(found[0])

        await until(saved, PATIENCE_SECONDS, "the state is not saved")


async def test_an_open_package_that_nothing_came_to_for_a_year_goes_from_the_file_while_the_writer_serves(
    kafka: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("SAVE_SECONDS", "PUT_AWAY_SECONDS"):
        monkeypatch.setattr(f"services.log.state.partition_state.{name}", 0.1)
    monkeypatch.setattr("services.log.sequencer.partition_writer._IDLE_SECONDS", 0.1)
    now = 1_700_000_000_000_000
    async with lone_writer(kafka, log, clock=lambda: now) as writer:
        await ready(writer)
        made = create_in(0)
        added = IngestFiles(made.package_id, uuid4(), "ada", (stored("a"), stored("b")))
        await writer.submit(made)
        await writer.submit(added)
        now += MAX_IDLE_MICROS + 1
        other = create_in(0)
        await writer.submit(other)

        async def gone() -> bool:
            with closing(sqlite3.connect(files(kafka)[0])) as connection:
                left = connection.execute("SELECT package_id FROM commands").fetchall()
            return left == [(other.package_id.bytes,)]

        await until(gone, PATIENCE_SECONDS, "its commands stay in the file")
        with pytest.raises(PackageAbandonedError):
            await writer.submit(added)


async def test_a_retry_is_answered_for_a_day_after_finalization_and_refused_later(
    kafka: Settings, log: KafkaLog
) -> None:
    made, now = create_in(0), 1_700_000_000_000_000
    ended = FinalizePackage(made.package_id, uuid4(), "ada")
    late = ANSWERS_KEPT_MICROS

    def clock() -> int:
        return now

    async with lone_writer(kafka, log, clock=clock) as writer:
        await ready(writer)
        answers = [await writer.submit(made), await writer.submit(ended)]
        now += late - 1
        await writer.submit(create_in(0))
    async with lone_writer(kafka, log, clock=clock) as writer:
        await ready(writer)
        assert [await writer.submit(made), await writer.submit(ended)] == answers
        now += 1
        await writer.submit(create_in(0))
        finalized = {"package_id": str(made.package_id), "finalized_at": 1_700_000_000_000_000}
        for retried in (made, ended):
            with pytest.raises(AnswerExpiredError, match=str(retried.command_id)) as caught:
                await writer.submit(retried)
            assert caught.value.facts.items() >= finalized.items()
            assert caught.value.facts["manifest_digest"] == ContentAddress.of_digest(answers[1].manifest_digest or b"")
        with pytest.raises(AnswerExpiredError):
            await writer.check_ingest(IngestCheck(made.package_id, ["a"], uuid4()))
