"""The oracle's notes can hold any values of events, and report when there is no room for them."""

from __future__ import annotations

import sqlite3
from uuid import UUID

import pytest

from artifact_store.errors import UnavailableError
from services.verify.notes import Claim, Notes


def test_claims_of_more_bytes_than_a_number_of_sqlite_can_hold_are_counted() -> None:
    most = (1 << 63) - 1
    with Notes() as notes:
        for start in range(3):
            notes.note_claim(Claim("key", start, most, bytes(32), bytes(32), False, UUID(int=1), 1, "a"))
        keys, size = notes.totals()
    assert keys == 1
    assert size == pytest.approx(3 * most)


def test_a_file_of_notes_that_there_is_no_room_for_is_told_with_what_says_where_it_lies() -> None:
    with pytest.raises(UnavailableError, match="disk is full; TMPDIR"), Notes():
        raise sqlite3.OperationalError("database or disk is full")
