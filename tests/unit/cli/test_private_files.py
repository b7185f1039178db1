"""Modes of files: only their owner can read ours, whatever the umask; pulled files follow the umask."""

from __future__ import annotations

import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

from services.log.state.state_file import LogPartition, StateFile, copy_file
from tests.unit.cli.conftest import Run


@pytest.fixture(autouse=True)
def _no_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def open_to_others(folder: Path, *, but: frozenset[Path] = frozenset()) -> list[Path]:
    """What others could read, write or look into."""
    return [path for path in {*folder.rglob("*")} - but if stat.S_IMODE(path.stat().st_mode) & 0o077]


def test_everything_that_the_embedded_parts_make_is_private(run: Run, tmp_path: Path) -> None:
    source, target = tmp_path / "source", tmp_path / "target"
    source.mkdir()
    for number in range(3):
        (source / f"{number}.txt").write_bytes(b"x" * number)
    about = ("--name", "n", "--producer", "p", "--subject", "s", "--retention-class", "scratch")
    (tmp_path / "state home").mkdir()
    before = frozenset(tmp_path.rglob("*"))
    package = json.loads(run("push", source, *about, "--json").stdout)["package_id"]
    run("packages")
    assert {"log.db", "views.db", "blobs"} < {path.name for path in tmp_path.iterdir()}
    assert open_to_others(tmp_path, but=before) == []
    run("pull", package, target)
    assert {stat.S_IMODE(path.stat().st_mode) for path in target.iterdir()} == {0o666}


def test_the_state_of_a_writer_is_private(tmp_path: Path) -> None:
    origin = LogPartition(uuid4(), "t", 0)
    path = tmp_path / "state" / "0.db"
    state = StateFile.create(path, origin)
    try:
        copy_file(path, tmp_path / "state" / "copy.db")
        assert open_to_others(tmp_path) == []
    finally:
        state.close()
