"""A state file keeps its position and the time that no later event may precede, and a changed bit is noticed."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from uuid import UUID

import pytest

from services.log.state.state_file import Anchor, LogPartition, StateFile, UnusableStateError

PLACE = LogPartition(UUID(int=7), "t.events", 3)
STANDING = Anchor(12, bytes(range(32)), 1_700_000_000_000_000)


def body(path: Path, changed: bytes | None = None) -> bytes:
    """What it says, which is `changed` then."""
    connection = sqlite3.connect(path)
    found: bytes = connection.execute("SELECT body FROM about").fetchone()[0]
    if changed is not None:
        with connection:
            connection.execute("UPDATE about SET body = ?", (changed,))
    connection.close()
    return found


def test_a_state_stands_where_it_was_saved_and_no_bit_of_that_is_changed_unnoticed(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    file = StateFile.create(path, PLACE)
    assert file.anchor == Anchor()
    file.save([], STANDING, 0)
    file.close()
    file = StateFile.open(path, PLACE)
    assert file.anchor == STANDING
    file.close()
    whole = body(path)
    for at in range(len(whole)):
        body(path, whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
        with pytest.raises(UnusableStateError):
            StateFile.open(path, PLACE)
    body(path, whole)
    StateFile.open(path, PLACE).close()


def test_a_state_that_does_not_say_what_it_is_cannot_be_used(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    StateFile.create(path, PLACE).close()
    connection = sqlite3.connect(path)
    with connection:
        connection.execute("DELETE FROM about")
    connection.close()
    with pytest.raises(UnusableStateError):
        StateFile.open(path, PLACE)


def test_whatever_is_lost_of_a_file_it_is_no_state_or_a_whole_one(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    StateFile.create(path, PLACE).close()
    whole = path.read_bytes()
    found = set()
    for at in range(0, len(whole), 64):
        path.write_bytes(whole[:at] + bytes(64) + whole[at + 64 :])
        try:
            file = StateFile.open(path, PLACE)
        except UnusableStateError:
            found.add(False)
        else:
            assert file.anchor == Anchor()
            file.close()
            found.add(True)
    assert found == {False, True}
