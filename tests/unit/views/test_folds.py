"""The folds and their guard on SQLite: the effect of a batch, refusals, and that nothing else changes."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from uuid import UUID

import pytest

from artifact_store.errors import CorruptError, InvalidRequestError, LogIdentityError
from artifact_store.events import Event
from artifact_store.manifest import content_key
from artifact_store.position import Position
from services.core.lifecycle import MICROS_PER_DAY
from services.views.database import Views
from services.views.engine.checkpoints import Checkpoint, StaleCheckpointError, load_checkpoint
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS, projection_named
from services.views.queries import FoundFile, ManifestLocation, Queries
from tests.views_history import History, apply_whole, view_rows

LOG = UUID(int=7)
REGISTRY = PROJECTIONS["registry"]
RETENTION = PROJECTIONS["retention"]


@pytest.fixture
async def views(tmp_path: Path) -> AsyncIterator[Views]:
    opened = Views(f"sqlite+aiosqlite:///{tmp_path}/folder/views.db")
    await opened.migrate()
    yield opened
    await opened.close()


async def fold(views: Views, events: list[Event], name: str = "registry") -> Checkpoint:
    """Apply the events as the next ones of partition 0."""
    at = await load_checkpoint(views, PROJECTIONS[name], LOG)
    behind = {0: at.position.offsets.get(0, 0) + len(events)}
    return await apply_whole(views, PROJECTIONS[name], events, behind, since=at)


async def test_a_package_appears_as_its_events_tell(views: Views) -> None:
    history = History()
    package_id = history.create("name", metadata='{"a":1}')
    history.ingest(package_id, "b.txt", "a.txt")
    history.finalize(package_id)
    await fold(views, history.events)
    queries = Queries(views)
    package = await queries.package(package_id)
    assert package is not None
    assert (package.name, package.status, package.last_event_sequence) == ("name", "finalized", 4)
    assert package.metadata == {"a": 1}
    assert (package.created_at, package.finalized_at) == (history.events[0].created_at, history.events[-1].created_at)
    files = await queries.files(package_id)
    assert [file.relative_path for file in files.items] == ["a.txt", "b.txt"]
    assert await queries.file_at(package_id, "a.txt") == files.items[0]
    found = await queries.found_file(files.items[0].file_id)
    assert found == FoundFile(files.items[0], ((content_key(files.items[0].blake3), 0),))
    manifest = await queries.manifest(package_id)
    assert manifest is not None
    assert manifest.inline is not None
    assert manifest.digest == package.manifest_digest


async def test_a_manifest_by_claim_check_keeps_its_key_alone(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.finalize(package_id, inline=False)
    await fold(views, history.events)
    found = await Queries(views).manifest(package_id)
    assert found is not None
    digest = history.events[-1].payload_digest.hex()
    key = f"blobs/blake3/{digest[:2]}/{digest[2:4]}/{digest}"
    assert found == ManifestLocation(found.digest, None, key)


async def test_what_is_not_there_is_none_or_empty(views: Views) -> None:
    queries, nobody = Queries(views), UUID(int=1)
    assert await queries.package(nobody) is None
    assert await queries.found_file(nobody) is None
    assert await queries.file_at(nobody, "a") is None
    assert await queries.manifest(nobody) is None
    assert await queries.retention(nobody) is None
    assert (await queries.files(nobody)).items == ()
    assert await queries.checkpoint("registry") is None


async def test_retention_counts_from_creation_until_the_package_is_finalized(views: Views) -> None:
    history = History()
    package_id = history.create(retention_class="scratch")
    await fold(views, history.events, "retention")
    created_at = history.events[0].created_at
    found = await Queries(views).retention(package_id)
    assert found is not None
    assert (found.counted_from, found.retain_until) == (created_at, created_at + 7 * MICROS_PER_DAY)
    history.ingest(package_id, "a")
    history.finalize(package_id)
    await fold(views, history.events[1:], "retention")
    finalized_at = history.events[-1].created_at
    found = await Queries(views).retention(package_id)
    assert found is not None
    assert (found.counted_from, found.retain_until) == (finalized_at, finalized_at + 7 * MICROS_PER_DAY)


async def test_a_permanent_package_has_no_end(views: Views) -> None:
    history = History()
    package_id = history.create(retention_class="permanent")
    history.finalize(package_id)
    await fold(views, history.events, "retention")
    found = await Queries(views).retention(package_id)
    assert found is not None
    assert (found.retention_days, found.retain_until) == (None, None)


@pytest.mark.parametrize("name", PROJECTIONS)
@pytest.mark.parametrize("left_out", [0, 1, 2])
@pytest.mark.parametrize("apart", [False, True])
async def test_a_gap_is_refused_and_nothing_of_its_batch_stays(
    views: Views, name: str, left_out: int, apart: bool
) -> None:
    history = History()
    package_id = history.create()
    for path in ("a", "b", "c"):
        history.ingest(package_id, path)
    if apart:
        await fold(views, history.events[:left_out], name)
    before = await view_rows(views)
    rest = history.events[left_out + 1 :] if apart else [e for e in history.events if e.sequence != left_out + 1]
    with pytest.raises(CorruptError, match=f"{package_id}: event .* does not follow event {left_out}"):
        await fold(views, rest, name)
    assert await view_rows(views) == before


@pytest.mark.parametrize("name", PROJECTIONS)
async def test_an_event_that_comes_again_is_passed_over(views: Views, name: str) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a")
    await fold(views, history.events, name)
    before = await view_rows(views)
    for again in (history.events[:1], history.events[1:], [history.events[1], history.events[1]]):
        await fold(views, again, name)
    assert await view_rows(views) == before


async def test_what_follows_a_finalization_is_refused(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a")
    history.finalize(package_id)
    late = replace(history.events[1], sequence=4)
    for events in ([*history.events, late], [late]):
        with pytest.raises(CorruptError, match=r"follows its finalization"):
            await fold(views, events)
        if len(events) > 1:
            await fold(views, history.events)


async def test_a_path_that_is_ingested_twice_is_refused(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a")
    await fold(views, history.events)
    with pytest.raises(CorruptError, match=r"artifact_files"):
        await fold(views, [replace(history.events[1], sequence=3)])


async def test_only_the_first_event_creates(views: Views) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a")
    created, ingested = history.events
    for name in PROJECTIONS:
        with pytest.raises(CorruptError, match=r"creates a package"):
            await fold(views, [replace(ingested, sequence=1)], name)
        with pytest.raises(CorruptError, match=r"creates a package"):
            await fold(views, [created, replace(created, sequence=2)], name)


@pytest.mark.parametrize("expected", [0, 1, 3, 4])
async def test_a_batch_from_another_place_than_the_checkpoint_changes_nothing(views: Views, expected: int) -> None:
    history = History()
    package_id = history.create()
    history.ingest(package_id, "a", "b")
    at = await fold(views, history.events[:2])
    before = await view_rows(views)
    elsewhere = Checkpoint(at.generation, Position(LOG, {0: expected}))
    with pytest.raises(StaleCheckpointError):
        await apply_whole(views, REGISTRY, history.events[2:], {0: 3}, since=elsewhere)
    assert await view_rows(views) == before
    assert (await load_checkpoint(views, REGISTRY, LOG)).position == at.position


async def test_one_stale_partition_refuses_the_batch_of_all(views: Views) -> None:
    history = History()
    history.create()
    history.create()
    at = await load_checkpoint(views, REGISTRY, LOG)
    await apply_whole(views, REGISTRY, history.events[:1], {1: 1}, since=at)
    with pytest.raises(StaleCheckpointError):
        await apply_whole(views, REGISTRY, history.events[1:], {0: 1, 1: 2}, since=at)
    assert (await load_checkpoint(views, REGISTRY, LOG)).position.offsets == {1: 1}
    assert len((await view_rows(views))["artifact_packages"]) == 1


async def test_a_batch_that_was_applied_is_not_applied_again(views: Views) -> None:
    history = History()
    history.create()
    at = await load_checkpoint(views, REGISTRY, LOG)
    after = await apply_whole(views, REGISTRY, history.events, {0: 1}, since=at)
    rows = await view_rows(views)
    with pytest.raises(StaleCheckpointError):
        await apply_whole(views, REGISTRY, history.events, {0: 1}, since=at)
    assert await view_rows(views) == rows
    assert (await load_checkpoint(views, REGISTRY, LOG)).position == after.position


async def test_a_fold_that_began_before_a_reset_is_refused(views: Views) -> None:
    history = History()
    history.create()
    at = await load_checkpoint(views, REGISTRY, LOG)
    await reset(views, REGISTRY)
    with pytest.raises(StaleCheckpointError, match=r"older generation"):
        await apply_whole(views, REGISTRY, history.events, {0: 1}, since=at)
    assert (await view_rows(views))["artifact_packages"] == []
    assert (await load_checkpoint(views, REGISTRY, LOG)).position.offsets == {}


async def test_a_reset_leaves_the_other_projection_alone(views: Views) -> None:
    history = History().fill(4, 2)
    await fold(views, history.events, "registry")
    await fold(views, history.events, "retention")
    before = await view_rows(views)
    await reset(views, REGISTRY)
    after = await view_rows(views)
    assert after["retention_state"] == before["retention_state"]
    assert [name for name in after if after[name]] == ["retention_state"]
    assert (await load_checkpoint(views, RETENTION, LOG)).position.offsets == {0: len(history.events)}


async def test_a_checkpoint_moves_over_offsets_without_events(views: Views) -> None:
    at = await load_checkpoint(views, REGISTRY, LOG)
    for offset in (0, 5, 9):
        at = await apply_whole(views, REGISTRY, [], {0: offset, 2: offset}, since=at)
    assert (await load_checkpoint(views, REGISTRY, LOG)).position == at.position
    assert await Queries(views).checkpoint("registry") == Position(LOG, {0: 9, 2: 9})


async def test_a_view_of_another_log_is_refused(views: Views) -> None:
    history = History()
    history.create()
    await fold(views, history.events)
    with pytest.raises(LogIdentityError, match=r"replay registry"):
        await load_checkpoint(views, REGISTRY, UUID(int=8))
    await reset(views, REGISTRY)
    assert (await load_checkpoint(views, REGISTRY, UUID(int=8))).position == Position(UUID(int=8), {})


def test_an_unknown_projection_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(InvalidRequestError, match=r"'search'; known: registry, retention, usage"):
        projection_named("search")
