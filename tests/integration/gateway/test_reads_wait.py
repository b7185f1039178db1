"""Reads wait for the view, within bounds: for a sequence or, if they find nothing, for the log's end at the request."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Collection, Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast
from uuid import UUID, uuid4

import pytest

from artifact_store import pull
from artifact_store.errors import (
    CorruptError,
    FileNotFoundInRegistryError,
    IllegalPackageStateError,
    PackageNotFoundError,
    SequenceBeyondLogError,
    WaitTimeoutError,
)
from artifact_store.manifest import ContentAddress, content_key, manifest_digest
from artifact_store.models import PackageFilter, Parked
from artifact_store.position import Position
from services.blobs.local import LocalBlobStore
from services.core.access import Grant, Packages, Principal, Right
from services.core.decide import Limits
from services.log.port import CommandWriter
from services.registry.direct import DirectRegistry
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from services.views.queries import ManifestLocation, Progress, Queries
from tests.memory_log import MemoryLog
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]


class WatchedQueries(Queries):
    """Tells when a reader has looked in vain: then it is asked how far the view is, or whether it follows a package."""

    def __init__(self, views: Views) -> None:
        super().__init__(views)
        self.in_vain = asyncio.Event()
        self.looks = 0

    async def progress(self, package_ids: Set[UUID]) -> Progress:
        self.looks += 1
        found = await super().progress(package_ids)
        self.in_vain.set()
        return found

    async def parked(self, package_id: UUID) -> Parked | None:
        found = await super().parked(package_id)
        self.in_vain.set()
        return found


class Stage:
    """A registry that reads a view which is brought up to the log by somebody else."""

    def __init__(self, folder: Path, wait_seconds: float) -> None:
        self.log = MemoryLog(partitions=3)
        self.views = Views(f"sqlite+aiosqlite:///{folder}/views.db")
        self.history = History()
        self.queries = WatchedQueries(self.views)
        # Nothing is written through this registry.
        writer = cast("CommandWriter", SimpleNamespace(end=self.proven_end))
        self.registry = DirectRegistry(
            self.log,
            writer,
            LocalBlobStore(folder / "blobs"),
            self.queries,
            limits=Limits(),
            wait_seconds=wait_seconds,
        )

    async def proven_end(self, partitions: Collection[int]) -> Position:
        """As the partitions' writers prove it."""
        end = await self.log.end()
        return Position(end.log, {p: end.offsets[p] for p in partitions if p in end.offsets})

    async def fold(self) -> None:
        """Bring the view up to the log."""
        await catch_up(self.views, self.log, REGISTRY)

    async def later(self) -> None:
        """Bring the view up to the log after a reader has looked in vain."""
        self.queries.in_vain.clear()
        await self.queries.in_vain.wait()
        await self.fold()


@pytest.fixture
async def stage(tmp_path: Path) -> AsyncIterator[Stage]:
    opened = Stage(tmp_path, wait_seconds=10.0)
    await opened.views.migrate()
    yield opened
    await opened.views.close()


def a_package(stage: Stage) -> UUID:
    package_id = stage.history.create()
    stage.history.ingest(package_id, "a")
    stage.history.finalize(package_id)
    stage.log.append(*stage.history.events)
    return package_id


READS: dict[str, Any] = {
    "package": lambda registry, package_id, **wait: registry.get_package(package_id, **wait),
    "files": lambda registry, package_id, **wait: registry.list_files(package_id, **wait),
    "file": lambda registry, package_id, **wait: registry.get_file_at(package_id, "a", **wait),
    "manifest": lambda registry, package_id, **wait: registry.get_manifest_bytes(package_id, **wait),
}


@pytest.mark.parametrize("read", READS)
async def test_what_is_in_the_log_is_never_denied(stage: Stage, read: str) -> None:
    package_id = a_package(stage)
    found, _ = await asyncio.gather(READS[read](stage.registry, package_id), stage.later())
    assert found


async def test_what_is_in_the_log_is_not_denied_because_a_deposed_leader_names_an_older_end(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    await stage.fold()
    older = await stage.log.end()
    package_id = a_package(stage)
    true_end = await stage.log.end()

    async def deposed(_covering: Position | None = None) -> Position:
        return older

    async def proven(partitions: Collection[int]) -> Position:
        return true_end

    monkeypatch.setattr(stage, "proven_end", proven)
    monkeypatch.setattr(stage.registry._writer, "end", proven)

    async def later() -> None:
        while stage.queries.looks < 4:  # what the first ones find, with an end at hand, is enough for an answer
            stage.queries.in_vain.clear()
            await stage.queries.in_vain.wait()
        monkeypatch.setattr(stage.log, "end", end)
        await stage.fold()

    end = stage.log.end
    monkeypatch.setattr(stage.log, "end", deposed)
    found, _ = await asyncio.gather(stage.registry.get_package(package_id), later())
    assert found.package_id == package_id


async def test_a_sequence_that_the_view_reaches_is_found_although_the_partition_has_no_writer(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    package_id = a_package(stage)

    async def stopped(_: Collection[int]) -> Position:
        raise CorruptError("a record is no event")

    monkeypatch.setattr(stage.registry._writer, "end", stopped)
    with pytest.raises(CorruptError, match="a record is no event"):
        await stage.registry.get_package(package_id)
    found, _ = await asyncio.gather(stage.registry.get_package(package_id, wait_sequence=2), stage.later())
    assert found.package_id == package_id


async def test_a_file_by_its_id_is_waited_for_too(stage: Stage) -> None:
    a_package(stage)
    file_id = stage.history.events[1].payload.file_id  # type: ignore[union-attr]  # it is the file's
    found, _ = await asyncio.gather(stage.registry.get_file_record(file_id), stage.later())
    assert found.relative_path == "a"


async def test_what_is_nowhere_is_denied_once_the_view_has_what_the_log_had_and_not_later(stage: Stage) -> None:
    package_id = a_package(stage)
    await stage.fold()
    going_on = asyncio.Event()

    async def go_on() -> None:
        """The log grows all the time and the view stays behind its end, though never behind where it was."""
        while not going_on.is_set():
            stage.history.create()
            stage.log.append(stage.history.events[-1])
            await asyncio.sleep(0.01)
            await stage.fold()
            stage.history.create()
            stage.log.append(stage.history.events[-1])

    growing = asyncio.create_task(go_on())
    try:
        async with asyncio.timeout(60):
            with pytest.raises(PackageNotFoundError):
                await stage.registry.get_package(UUID(int=7))
            with pytest.raises(FileNotFoundInRegistryError):
                await stage.registry.get_file_at(package_id, "b")
            with pytest.raises(FileNotFoundInRegistryError):
                await stage.registry.get_file_record(UUID(int=7))
    finally:
        going_on.set()
        await growing


async def test_an_open_package_is_told_from_one_whose_finalization_the_view_has_not_seen(stage: Stage) -> None:
    package_id = stage.history.create()
    stage.log.append(*stage.history.events)
    await stage.fold()
    with pytest.raises(IllegalPackageStateError):
        await stage.registry.get_manifest_bytes(package_id)
    stage.history.finalize(package_id)
    stage.log.append(stage.history.events[-1])
    found, _ = await asyncio.gather(stage.registry.get_manifest_bytes(package_id), stage.later())
    assert found


@pytest.mark.parametrize("read", READS)
async def test_a_sequence_is_waited_for_also_of_a_package_that_is_not_known_yet(stage: Stage, read: str) -> None:
    package_id = a_package(stage)
    found, _ = await asyncio.gather(READS[read](stage.registry, package_id, wait_sequence=3), stage.later())
    assert found


async def test_waiting_has_an_end(tmp_path: Path) -> None:
    stage = Stage(tmp_path, wait_seconds=0.1)
    await stage.views.migrate()
    package_id = a_package(stage)  # nobody folds it
    for read in READS.values():
        with pytest.raises(WaitTimeoutError):
            await read(stage.registry, package_id)
    with pytest.raises(WaitTimeoutError):
        await stage.registry.get_file_record(UUID(int=7))
    await stage.fold()
    stage.log.append(*stage.history.events)  # or anything that the view does not have
    with pytest.raises(WaitTimeoutError):
        await stage.registry.get_package(package_id, wait_sequence=4)
    assert (await stage.registry.get_package(package_id, wait_sequence=3)).last_event_sequence == 3
    await stage.views.close()


@pytest.mark.parametrize("read", READS)
async def test_a_sequence_beyond_the_end_of_the_log_is_refused_at_once(stage: Stage, read: str) -> None:
    package_id = a_package(stage)
    await stage.fold()
    async with asyncio.timeout(5):
        with pytest.raises(SequenceBeyondLogError, match="last one in the log is 3"):
            await READS[read](stage.registry, package_id, wait_sequence=4)
        with pytest.raises(PackageNotFoundError):
            await READS[read](stage.registry, UUID(int=7), wait_sequence=1)


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("sequence", [1, 4])
async def test_waiting_for_a_package_that_one_may_not_read_tells_nothing_of_it(
    stage: Stage, read: str, sequence: int
) -> None:
    package_id = a_package(stage)
    await stage.fold()
    grant = Grant(frozenset({Right.READ}), Packages(("nobody's",)))
    stranger = stage.registry.for_principal(Principal("ci:stranger", (grant,)))
    denied = []
    for asked in (package_id, UUID(int=7)):
        with pytest.raises(PackageNotFoundError) as error:
            await READS[read](stranger, asked, wait_sequence=sequence)
        denied.append(error.value.detail.replace(str(asked), "it"))
    assert denied[0] == denied[1]


async def test_a_sequence_is_not_refused_before_the_view_holds_what_the_log_held(stage: Stage) -> None:
    package_id = a_package(stage)
    with pytest.raises(SequenceBeyondLogError):  # of a package that the view does not know when it is asked for
        await asyncio.gather(stage.registry.get_package(package_id, wait_sequence=4), stage.later())
    stage.history.create()
    stage.log.append(stage.history.events[-1])
    later = stage.history.events[-1].package_id
    found, _ = await asyncio.gather(stage.registry.get_package(later, wait_sequence=1), stage.later())
    assert found.package_id == later


async def test_while_the_log_is_away_a_sequence_is_waited_for_in_the_view(stage: Stage) -> None:
    package_id = a_package(stage)
    waiting = asyncio.create_task(stage.registry.get_package(package_id, wait_sequence=3))
    await stage.queries.in_vain.wait()
    stage.log.unavailable = True
    other = asyncio.create_task(stage.registry.get_package(package_id, wait_sequence=2))
    stage.queries.in_vain.clear()
    await stage.queries.in_vain.wait()
    stage.log.unavailable = False
    await stage.fold()
    assert {found.package_id for found in await asyncio.gather(waiting, other)} == {package_id}


async def test_all_who_wait_share_one_look_at_the_database(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("services.views.waiting.LOOK_SECONDS", 0.2)
    packages = [stage.history.create() for _ in range(20)]
    for package_id in packages:
        stage.history.ingest(package_id, "a")
        stage.history.finalize(package_id)
    stage.log.append(*stage.history.events)
    began = asyncio.get_running_loop().time()
    waiting = [
        asyncio.create_task(stage.registry.get_package(package_id, wait_sequence=3))
        for package_id in packages
        for _ in range(10)
    ]
    waiting += [asyncio.create_task(stage.registry.get_package(package_id)) for package_id in packages]
    await stage.queries.in_vain.wait()
    stage.queries.in_vain.clear()
    await stage.queries.in_vain.wait()
    await stage.fold()
    assert {found.status for found in await asyncio.gather(*waiting)} == {"finalized"}
    assert stage.queries.looks <= 2 + (asyncio.get_running_loop().time() - began) / 0.2


async def test_a_view_of_another_log_denies_nothing(tmp_path: Path) -> None:
    stage = Stage(tmp_path, wait_seconds=0.1)
    await stage.views.migrate()
    a_package(stage)
    await stage.fold()
    stage.log.id = uuid4()
    with pytest.raises(WaitTimeoutError):
        await stage.registry.get_package(UUID(int=7))
    await stage.views.close()


async def test_a_package_by_the_digest_of_its_manifest_is_waited_for(stage: Stage) -> None:
    package_id = a_package(stage)
    where = PackageFilter(manifest_digest=ContentAddress.of_digest(stage.history.events[-1].payload_digest))
    found, _ = await asyncio.gather(stage.registry.list_packages(where), stage.later())
    assert [package.package_id for package in found.items] == [package_id]
    unknown = PackageFilter(manifest_digest=ContentAddress.of_digest(bytes(32)))
    assert (await stage.registry.list_packages(unknown)).items == ()


async def test_a_package_whose_finalization_the_view_has_not_seen_is_pulled_all_the_same(
    stage: Stage, tmp_path: Path
) -> None:
    package_id = stage.history.create()
    stage.log.append(*stage.history.events)
    await stage.fold()
    stage.history.finalize(package_id)
    stage.log.append(stage.history.events[-1])
    pulled, _ = await asyncio.gather(pull(stage.registry, package_id, tmp_path / "out"), stage.later())
    assert (pulled.package_id, pulled.files) == (package_id, 0)


async def test_a_manifest_whose_blob_is_damaged_is_an_error_and_not_given(
    stage: Stage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is too large for an event, and lies in the blob store."""
    package_id = a_package(stage)
    await stage.fold()
    manifest = await stage.registry.get_manifest_bytes(package_id)
    digest = ContentAddress.of_digest(manifest_digest(manifest))
    key = content_key(digest.digest)
    path = tmp_path / "blobs" / key
    path.parent.mkdir(parents=True)

    async def claimed(_queries: Queries, _package_id: UUID) -> ManifestLocation:
        return ManifestLocation(digest, None, key)

    monkeypatch.setattr(Queries, "manifest", claimed)
    path.write_bytes(manifest)
    assert await stage.registry.get_manifest_bytes(package_id) == manifest
    for wrong in (manifest[:-1] + b"x", manifest + b"x", manifest[:-1]):
        path.write_bytes(wrong)
        with pytest.raises(CorruptError, match="does not hold the bytes"):
            await stage.registry.get_manifest_bytes(package_id)
