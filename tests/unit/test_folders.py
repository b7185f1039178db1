"""The folders of log, blobs and views have durable names before any append, so that a power cut cannot lose a log."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from services.config import Settings
from services.log.sqlite import file
from services.runtime.file_system import secure_folder
from services.wiring import open_blobs, open_views, parts

Steps = list[Path | int]
"""A folder that was made, or the inode of one that was synced."""


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Steps:
    """What was made and what was synced, in this order."""
    found: Steps = []
    mkdir, fsync = os.mkdir, os.fsync

    def make(path: Any, *arguments: Any, **named: Any) -> None:
        mkdir(path, *arguments, **named)
        found.append(Path(path).resolve())

    def sync(descriptor: int) -> None:
        fsync(descriptor)
        found.append(os.fstat(descriptor).st_ino)

    monkeypatch.setattr(os, "mkdir", make)
    monkeypatch.setattr(os, "fsync", sync)
    return found


def made(steps: Steps) -> list[Path]:
    return [step for step in steps if isinstance(step, Path)]


def not_durable(steps: Steps) -> list[Path]:
    """The folders whose names a power cut could take, as what they lie in was not synced since."""
    return [path for path in made(steps) if path.parent.stat().st_ino not in steps[steps.index(path) :]]


async def test_every_folder_of_the_default_settings_is_durable_once_the_parts_are_open(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    monkeypatch.chdir(tmp_path)
    async with parts(Settings()):
        assert {tmp_path / "var", tmp_path / "var" / "blobs"} <= set(made(steps))
        assert not_durable(steps) == []


def test_the_folder_of_views_is_durable_when_it_was_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, steps: Steps
) -> None:
    monkeypatch.chdir(tmp_path)
    open_views(Settings(views_url="sqlite+aiosqlite:///./new/folder/views.db"))
    assert made(steps) == [tmp_path / "new", tmp_path / "new" / "folder"]
    assert not_durable(steps) == []


def test_a_log_is_none_before_the_folders_that_another_process_has_just_made_are_durable(
    tmp_path: Path, steps: Steps, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "made by" / "another" / "log.db"
    path.parent.mkdir(parents=True)
    there: list[int] = []

    def secure(folder: Path) -> None:
        secure_folder(folder)
        with closing(sqlite3.connect(path)) as connection:
            there.extend(connection.execute("SELECT count(*) FROM sqlite_master").fetchone())

    monkeypatch.setattr(file, "secure_folder", secure)
    file.create_file(path)
    assert (not_durable(steps), there) == ([], [0])


async def test_the_name_of_a_blob_folder_that_another_process_has_just_made_is_durable(
    tmp_path: Path, steps: Steps
) -> None:
    root = tmp_path / "new" / "blobs"
    root.mkdir(parents=True)
    store = open_blobs(Settings(blobs_url=f"file:{root}"))
    await store.migrate()
    await store.close()
    assert not_durable(steps) == []
