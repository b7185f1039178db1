"""What a projector holds at a time: bounded by bytes, whatever the size of the events."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from artifact_store.events import PackageFinalized
from projector.runner import Assignment
from services.views.database import Views
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
    while (found := await assignment.next_batch(0.01)) is not None:
        batch, _ = found
        sizes.append((len(batch.records), sum(len(record.value) for record in batch.records)))
    await assignment.leave()
    assert sum(events for events, _ in sizes) == len(small) + len(large)
    assert max(events for events, _ in sizes) > 100
    assert max(size for _, size in sizes) <= 4 * MIB + 2 * 3 * MIB  # a full batch, and what one poll may bring of each
