"""The processes that load a view: their errors arrive in their own class, also if a process cannot be started."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from uuid import UUID

import pytest

from artifact_store.errors import ArtifactStoreError, CorruptError, UnavailableError
from artifact_store.position import Position
from projector import loading
from projector.loading import load_in_processes
from services.config import Settings
from services.views.database import DamagedDatabaseError, LockedError, TablesError
from services.views.engine.apply import TooManyParkedError
from services.views.engine.checkpoints import Checkpoint, StaleCheckpointError


async def load(settings: Settings) -> None:
    """Load one partition in one process."""
    await load_in_processes(
        settings,
        "registry",
        Checkpoint(UUID(int=1), Position(UUID(int=2), {})),
        {0: 1},
        processes=1,
        max_rate=None,
        max_parked=1,
        told=lambda _events, _offsets: None,
    )


@pytest.mark.parametrize(
    "kind",
    [
        ArtifactStoreError,
        CorruptError,
        DamagedDatabaseError,
        LockedError,
        StaleCheckpointError,
        TablesError,
        TooManyParkedError,
        UnavailableError,
    ],
)
async def test_an_error_of_a_process_keeps_its_class(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[ArtifactStoreError]
) -> None:
    said = json.dumps({"error": kind.__name__, "detail": "what it says"})
    script = tmp_path / "fails.py"
    script.write_text(f"import sys; sys.stdin.buffer.read(1); print({said!r}, flush=True)")
    monkeypatch.setattr(loading, "PYTHON", (sys.executable, str(script)))
    with pytest.raises(kind, match="what it says") as raised:
        await load(embedded_settings)
    assert raised.type is kind


async def test_a_process_that_cannot_be_started_may_be_later(
    embedded_settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "PYTHON", (str(tmp_path / "missing"),))
    with pytest.raises(UnavailableError, match="cannot be started: No such file"):
        await load(embedded_settings)
