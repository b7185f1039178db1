"""File locks exclude each other, and are free after their holder has released them."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from artifact_store.errors import PushBackError
from services.config import Settings
from services.log.sqlite import file
from services.runtime.file_system import FileLock
from services.wiring import open_log, open_writer
from tests.commands import create
from tests.contract.log_stage import Projection, no_manifest

_FORKED = """
import os, sys
from pathlib import Path
from services.runtime.file_system import FileLock

path = Path(sys.argv[1])
held = FileLock(path)
assert held.take()
reading, writing = os.pipe()
if child := os.fork():
    os.close(reading)
    held.release()
    free = FileLock(path).take()
    os.close(writing)
    os.waitpid(child, 0)
    sys.exit(not free)
os.close(writing)
os.read(reading, 1)
os._exit(0)
"""


def test_one_instance_holds_a_lock_at_a_time(tmp_path: Path) -> None:
    one, two = FileLock(tmp_path / "lock"), FileLock(tmp_path / "lock")
    assert one.take()
    assert not two.take()
    assert (one.held, two.held) == (True, False)
    one.release()
    one.release()
    assert two.take()
    two.release()


def test_a_lock_that_is_given_back_is_free_although_a_process_that_was_forked_meanwhile_lives(tmp_path: Path) -> None:
    subprocess.run([sys.executable, "-c", _FORKED, str(tmp_path / "lock")], check=True, timeout=60)


async def test_a_log_has_one_set_of_locks_by_whatever_link_it_is_reached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(file, "LOCK_SECONDS", 0.05)
    links = tmp_path / "links"
    links.mkdir()
    (links / "log.db").symlink_to(tmp_path / "real.db")
    settings = Settings(log_url=f"sqlite:///{links}/log.db")
    log = open_log(settings)
    await log.migrate()
    held = [FileLock(tmp_path / f"real.db{name}.lock") for name in ("", ".registry")]
    assert all(lock.take() for lock in held)
    async with open_writer(settings, log, no_manifest) as writer:
        with pytest.raises(PushBackError):
            await writer.submit(create())
    projection = Projection(log)
    waiting = await projection.subscribe()
    await projection.poll(waiting)
    assert waiting.assigned == frozenset()
    await waiting.close()
    await log.close()
    for lock in held:
        lock.release()
    assert [path.name for path in links.iterdir()] == ["log.db"]
