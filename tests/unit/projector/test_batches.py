"""How much a projector holds at a time: bounded by bytes, whatever the size of the events."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest

from artifact_store.errors import CorruptError
from artifact_store.events import PackageFinalized
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.engine.source import Assignment
from services.views.projections import PROJECTIONS
from tests.memory_log import MemoryLog
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]
MIB = 1 << 20


@pytest.fixture
def views_url(tmp_path: Path) -> str:
    return f"sqlite+aiosqlite:///{tmp_path}/views.db"


async def settled() -> None:
    """Nothing is on its way into the view here."""


async def test_a_batch_ends_by_its_bytes_when_manifests_are_large(views: Views) -> None:
    log, history = MemoryLog(partitions=2), History()
    small = History(1).fill(packages=40, files=10).events
    log.append(*small)
    for number in range(80):
        history.finalize(history.create(f"package {number}"))
    manifest = PackageFinalized(manifest=bytes(MIB // 2), manifest_key=None, file_count=1, total_bytes=1)
    large = [replace(e, payload=manifest) if isinstance(e.payload, PackageFinalized) else e for e in history.events]
    log.append(*large)
    assignment = Assignment(views, log, REGISTRY, settled)
    await assignment.join()
    sizes: list[tuple[int, int]] = []
    while len(batch := await assignment.next_batch(0.01)):
        sizes.append((len(batch), sum(len(record.value) for record in batch.records)))
    await assignment.leave()
    assert sum(events for events, _ in sizes) == len(small) + len(large)
    assert max(events for events, _ in sizes) > 100
    assert max(size for _, size in sizes) <= 4 * MIB + 2 * 3 * MIB  # a full batch, and what one poll may bring of each


async def test_progress_that_is_made_while_other_progress_is_shown_is_shown_next(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    log, history = MemoryLog(partitions=1, every=1000), History().fill(packages=4, files=2)
    assignment = Assignment(views, log, REGISTRY, settled)
    await assignment.join()
    batches = []
    for events in (history.events[:5], history.events[5:9]):
        log.append(*events)
        batches.append(await assignment.next_batch(1.0))
    first, second = batches
    (member,) = log.members
    commit = member.commit

    async def slow(next_offsets: Mapping[int, int], metadata: str) -> None:
        assignment.applied(second)
        await commit(next_offsets, metadata)

    assignment.applied(first)
    with monkeypatch.context() as patch:
        patch.setattr(member, "commit", slow)
        await assignment.show()
    assert [offset for offset, _ in log.groups["registry"].values()] == [5]
    await assignment.show()
    assert [offset for offset, _ in log.groups["registry"].values()] == [9]
    await assignment.leave()


async def test_a_log_that_loses_its_tail_and_grows_before_the_first_batch_is_refused(views: Views) -> None:
    # The assignment's check came too early, and the place has no leader epoch yet by which a client would notice.
    log, history = MemoryLog(partitions=1, every=1000), History().fill(packages=2, files=4)
    log.append(*history.events[:5])
    await catch_up(views, log, REGISTRY)
    assignment = Assignment(views, log, REGISTRY, settled)
    await assignment.join()
    assert len(await assignment.next_batch(0.01)) == 0
    log.truncate(0, end=3)
    log.append(*History(1).fill(packages=2, files=4).events[:5])
    with pytest.raises(CorruptError, match="folded a record at offset 4 of partition 0 that the log no longer holds"):
        await assignment.next_batch(1.0)
    await assignment.leave()
