"""Fixtures of the tests on Kafka: a separate log there, a blob store in a folder, and snapshots at every close."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from services.blobs.local import LocalBlobStore
from services.blobs.port import BlobStore
from services.log.state import snapshots


@pytest.fixture
async def store(tmp_path: Path) -> AsyncIterator[BlobStore]:
    found = LocalBlobStore(tmp_path / "blobs")
    await found.migrate()
    yield found
    await found.close()


@pytest.fixture
def every_close_makes_a_snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(snapshots, "CLOSING_OFFSETS", 1)
