"""A large package is finalized or read back in the background: others continue, its own commands wait."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from uuid import uuid4

import pytest

from artifact_store.errors import IllegalPackageStateError, PushBackError, UnavailableError
from artifact_store.events import PACKAGE_FINALIZED, PackageFinalized
from artifact_store.manifest import content_key, manifest_digest
from artifact_store.models import Acknowledgement
from services.config import Settings
from services.core.decide import (
    EVENT_OVERHEAD_BYTES,
    Command,
    CreatePackage,
    FinalizePackage,
    IngestCheck,
    IngestFiles,
    Limits,
)
from services.log.kafka import KafkaLog, KafkaWriter
from services.log.kafka.driver import PartitionLease
from services.log.sequencer import background
from services.log.sequencer import partition_writer as writer_module
from services.log.state import partition_state as state
from services.log.state import state_file
from tests.commands import stored
from tests.contract.log_invariants import assert_recorded_once, read_valid
from tests.contract.log_stage import PATIENCE_SECONDS, ready, settled
from tests.integration.conditions import until
from tests.integration.kafka_stage import (
    PARTITIONS,
    create_in,
    cut_off,
    kafka_settings,
    lone_writer,
    open_kafka_log,
    owned,
)

pytestmark = pytest.mark.services

LIMITS = Limits(inline_manifest_bytes=30_000)
FILES = 80


@pytest.fixture
async def log(kafka_url: str, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[KafkaLog]:
    async with open_kafka_log(kafka_settings(kafka_url, tmp_path_factory.mktemp("log"))) as found:
        yield found


@pytest.fixture
def settings(kafka_url: str, tmp_path_factory: pytest.TempPathFactory) -> Settings:
    return kafka_settings(kafka_url, tmp_path_factory.mktemp("writer"))


@pytest.fixture
def few_are_large(monkeypatch: pytest.MonkeyPatch) -> None:
    """Packages of some files count as large, so that what is for 100,000 shows with few."""
    monkeypatch.setattr(state, "LARGE", 10)
    monkeypatch.setattr(state, "SAVE_EVENTS", 1)
    monkeypatch.setattr(state_file, "AT_ONCE", 10)
    monkeypatch.setattr(state.PartitionState.__init__, "__kwdefaults__", {"max_entries": 5})


@dataclass
class Store:
    """A blob store for manifests whose answers can be held back."""

    open: asyncio.Event = field(default_factory=asyncio.Event)
    asked: int = 0
    stored: dict[str, bytes] = field(default_factory=dict)
    failure: Exception | None = None

    async def put(self, manifest: bytes) -> None:
        self.asked += 1
        await self.open.wait()
        if self.failure is not None:
            raise self.failure
        self.stored[content_key(manifest_digest(manifest))] = manifest

    async def was_asked(self, times: int = 1) -> None:
        async def asked() -> bool:
            return self.asked >= times

        await until(asked, PATIENCE_SECONDS, "no manifest came")


@asynccontextmanager
async def writer_on(settings: Settings, log: KafkaLog, store: Store) -> AsyncIterator[KafkaWriter]:
    async with lone_writer(settings, log, limits=LIMITS, put_manifest=store.put) as writer:
        await ready(writer)
        yield writer


async def filled(writer: KafkaWriter, files: int = FILES, partition: int = 0) -> tuple[CreatePackage, IngestFiles]:
    made = create_in(partition)
    added = IngestFiles(made.package_id, uuid4(), "ada", tuple(stored(f"{n}.bin") for n in range(files)))
    for command in (made, added):
        await settled(writer, command)
    return made, added


def ending(made: CreatePackage) -> FinalizePackage:
    return FinalizePackage(made.package_id, uuid4(), "ada")


async def small_package(writer: KafkaWriter, partition: int = 0) -> list[tuple[Command, Acknowledgement]]:
    made = create_in(partition)
    added = IngestFiles(made.package_id, uuid4(), "ada", (stored("a"),))
    return [(command, await writer.submit(command)) for command in (made, added, ending(made))]


async def test_the_partition_goes_on_while_a_manifest_is_stored_and_the_packages_own_commands_wait(
    settings: Settings, log: KafkaLog
) -> None:
    store = Store()
    async with writer_on(settings, log, store) as writer:
        made, _ = await filled(writer)
        end = ending(made)
        finalizing = asyncio.ensure_future(writer.submit(end))
        await store.was_asked()
        again = asyncio.ensure_future(writer.submit(end))
        more = IngestFiles(made.package_id, uuid4(), "ada", (stored("too late"),))
        late = [
            asyncio.ensure_future(writer.submit(more)),
            asyncio.ensure_future(writer.check_ingest(IngestCheck(made.package_id, ["too late"], None))),
            asyncio.ensure_future(writer.submit(replace(end, command_id=uuid4()))),
        ]
        neighbours = [done for _ in range(5) for done in await small_package(writer)]
        assert not any(task.done() for task in (finalizing, again, *late))
        store.open.set()
        done = await finalizing
        assert await again == done
        for task in late:
            with pytest.raises(IllegalPackageStateError):
                await task
        assert await writer.submit(end) == done
        assert store.asked == 1
    events = await read_valid(log)
    assert_recorded_once(events, [*neighbours, (end, done)])
    final = next(e for e in events if e.event_type == PACKAGE_FINALIZED and e.package_id == made.package_id)
    assert isinstance(final.payload, PackageFinalized)
    assert final.payload.manifest_key is not None
    assert final.payload_digest == done.manifest_digest == manifest_digest(store.stored[final.payload.manifest_key])
    times = [event.created_at for event in events if log.partition_of(event.package_id) == 0]
    assert times == sorted(times)


async def test_several_manifests_of_a_partition_are_made_at_a_time(settings: Settings, log: KafkaLog) -> None:
    store = Store()
    async with writer_on(settings, log, store) as writer:
        made = [(await filled(writer))[0] for _ in range(background.AT_A_TIME + 2)]
        finalizing = [asyncio.ensure_future(writer.submit(ending(package))) for package in made]
        await store.was_asked(background.AT_A_TIME)
        await small_package(writer)
        assert store.asked == background.AT_A_TIME
        store.open.set()
        done = await asyncio.gather(*finalizing)
    assert len({answer.manifest_digest for answer in done}) == len(made)
    await read_valid(log)


async def test_a_manifest_that_cannot_be_stored_leaves_the_package_open(settings: Settings, log: KafkaLog) -> None:
    store = Store(failure=UnavailableError("the store is away"))
    store.open.set()
    async with writer_on(settings, log, store) as writer:
        made, _ = await filled(writer)
        end = ending(made)
        with pytest.raises(UnavailableError, match="the store is away"):
            await writer.submit(end)
        more = IngestFiles(made.package_id, uuid4(), "ada", (stored("one more"),))
        await writer.submit(more)
        store.failure = None
        done = await writer.submit(end)
    assert done.sequence == FILES + 3
    assert len(store.stored) == 1
    await read_valid(log)


async def test_a_writer_that_is_cut_off_meanwhile_makes_the_manifest_anew(settings: Settings, log: KafkaLog) -> None:
    store = Store()
    async with writer_on(settings, log, store) as writer:
        made, _ = await filled(writer)
        end = ending(made)
        finalizing = asyncio.ensure_future(settled(writer, end))
        await store.was_asked()
        await asyncio.to_thread(cut_off, log, 0)
        neighbour = create_in(0)
        await settled(writer, neighbour)
        await store.was_asked(2)
        store.open.set()
        done = await finalizing
        assert await writer.submit(end) == done
    assert_recorded_once(await read_valid(log), [(end, done)])


async def test_a_hand_over_does_not_wait_for_a_manifest(settings: Settings, log: KafkaLog) -> None:
    store = Store()
    async with writer_on(settings, log, store) as writer:
        ends = [ending((await filled(writer, partition=p))[0]) for p in range(PARTITIONS)]
        finalizing = [asyncio.ensure_future(writer.submit(end)) for end in ends]
        await store.was_asked(PARTITIONS)
        elsewhere = replace(settings, state_dir=settings.state_dir / "two")
        async with lone_writer(elsewhere, log, limits=LIMITS, put_manifest=store.put) as other:
            began = time.monotonic()

            async def handed_over() -> bool:
                return bool(await owned(other))

            await until(handed_over, PATIENCE_SECONDS, "no partition was handed over")
            assert time.monotonic() - began < background.PUT_SECONDS / 2
        store.open.set()
        done = await asyncio.gather(*finalizing)
    assert_recorded_once(await read_valid(log), [*zip(ends, done, strict=True)])


async def test_requests_for_a_package_that_is_finalized_are_pushed_back_when_they_are_many(
    settings: Settings, log: KafkaLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "HELD_BYTES", 20_000)
    store = Store()
    async with writer_on(settings, log, store) as writer:
        made, _ = await filled(writer)
        finalizing = asyncio.ensure_future(writer.submit(ending(made)))
        await store.was_asked()
        late = [
            asyncio.ensure_future(writer.check_ingest(IngestCheck(made.package_id, [f"{n}"], None))) for n in range(50)
        ]
        await small_package(writer)
        refused = [task for task in late if task.done()]
        store.open.set()
        await finalizing
        answers = await asyncio.gather(*late, return_exceptions=True)
    assert 0 < len(refused) < len(late)
    kinds = {type(answer) for answer in answers}
    assert kinds == {PushBackError, IllegalPackageStateError}
    assert all(getattr(task.exception(), "retry_after", 0) > 0 for task in refused)


@pytest.mark.usefixtures("few_are_large")
async def test_large_packages_that_lie_in_the_file_are_read_back_and_go_on(settings: Settings, log: KafkaLog) -> None:
    store = Store()
    store.open.set()
    done: list[tuple[Command, Acknowledgement]] = []
    async with writer_on(settings, log, store) as writer:
        packages = [(await filled(writer))[0] for _ in range(6)]
        for turn in range(3):
            for made in packages:
                more = IngestFiles(made.package_id, uuid4(), "ada", (stored(f"later {turn}"), stored(f"and {turn}")))
                done.append((more, await writer.submit(more)))
                done += await small_package(writer)
        ends = [ending(made) for made in packages]
        done += zip(ends, await asyncio.gather(*(writer.submit(end) for end in ends)), strict=True)
        for command, answer in done:
            assert await writer.submit(command) == answer
    async with writer_on(settings, log, store) as writer:
        for command, answer in done:
            assert await writer.submit(command) == answer
    assert_recorded_once(await read_valid(log), done)


async def test_finalizations_that_are_more_than_a_transaction_takes_are_split(
    log: KafkaLog, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a finalization nobody knows beforehand how large its event is."""
    most = 3 * LIMITS.inline_manifest_bytes
    monkeypatch.setattr(writer_module, "MAX_BATCH_BYTES", most)
    transactions: list[int] = []
    commit = PartitionLease.commit

    def counted(self: PartitionLease, values: Sequence[bytes]) -> None:
        transactions.append(sum(map(len, values)))
        commit(self, values)

    async with writer_on(settings, log, Store()) as writer:
        packages = [(await filled(writer, files=30))[0] for _ in range(20)]
        monkeypatch.setattr(PartitionLease, "commit", counted)
        answers = await asyncio.gather(*(writer.submit(ending(made)) for made in packages))
    assert [answer.sequence for answer in answers] == [32] * len(packages)
    assert sum(transactions) > 2 * most, "all of it would have fitted into few transactions"
    assert max(transactions) <= most + LIMITS.inline_manifest_bytes + EVENT_OVERHEAD_BYTES
