"""Queries on the file's events; every answer is bounded in rows and bytes. All of them block."""

from __future__ import annotations

import itertools
import sqlite3
from collections.abc import Iterable, Mapping
from uuid import UUID

from schemas.codec import UndecodableEventError, decode
from schemas.events import Event
from services.errors import CorruptError
from services.log.port import Record
from services.log.sqlite.file import PARTITION

BATCH_RECORDS = 500
_BATCH_BYTES = 4 << 20
"""Manifests make records of half a megabyte: a batch ends early when it holds so much."""

_COLUMNS = "offset, CAST(package_id AS BLOB), CAST(sequence AS INTEGER), CAST(value AS BLOB)"
"""Whatever a damaged row holds comes as one of these types, for its readers to tell what it is not."""

_NO_END = (1 << 63) - 1


def end_offset(connection: sqlite3.Connection) -> int:
    """The offset behind the last event."""
    (last,) = connection.execute("SELECT max(offset) FROM events").fetchone()
    return 0 if last is None else last + 1


def records_from(connection: sqlite3.Connection, offset: int, end: int | None, limit: int) -> list[Record]:
    """The records from `offset` on, below `end` if there is one. Raises CorruptError when one between them is gone."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events WHERE offset >= ? AND offset < ? ORDER BY offset LIMIT ?",  # noqa: S608 - ours
        (offset, _NO_END if end is None else end, limit),
    )
    found = _bounded(rows)
    if found and found[-1].offset != offset + len(found) - 1:  # they are numbered without gaps
        there = {record.offset for record in found}
        gap = next(expected for expected in itertools.count(offset) if expected not in there)
        raise CorruptError(f"the log's record at offset {gap} is gone, and those behind it are there")
    return found


def package_records_from(
    connection: sqlite3.Connection, package_id: UUID, sequence: int, end: int | None, limit: int
) -> list[Record]:
    """The package's records behind event number `sequence`, below offset `end` if there is one."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events"  # noqa: S608 - our own
        " WHERE package_id = ? AND sequence > ? AND offset < ? ORDER BY sequence LIMIT ?",
        (package_id.bytes, sequence, _NO_END if end is None else end, limit),
    )
    return _bounded(rows)


def sequence_before(connection: sqlite3.Connection, package_id: UUID, offset: int) -> int:
    """The number of the package's last event below `offset`, 0 if there is none. Raises as `numbered`."""
    if not offset:
        return 0
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events"  # noqa: S608 - our own
        " WHERE package_id = ? AND offset < ? ORDER BY sequence DESC LIMIT 1",
        (package_id.bytes, offset),
    )
    return max((numbered(record).sequence for record in _bounded(rows)), default=0)


def progress_of(connection: sqlite3.Connection, projection: str) -> Mapping[int, tuple[int, str]]:
    """What the projection has committed: per partition the next offset and the metadata."""
    rows = connection.execute(
        "SELECT partition, next_offset, metadata FROM progress WHERE projection = ?", (projection,)
    ).fetchall()
    return {partition: (offset, metadata) for partition, offset, metadata in rows}


def store_progress(connection: sqlite3.Connection, projection: str, next_offset: int, metadata: str) -> None:
    """Write what `progress_of` reads."""
    connection.execute(
        "INSERT INTO progress VALUES (?, ?, ?, ?) ON CONFLICT (projection, partition)"
        " DO UPDATE SET next_offset = excluded.next_offset, metadata = excluded.metadata",
        (projection, PARTITION, next_offset, metadata),
    )


def decoded(record: Record) -> Event:
    """The record's event. Raises CorruptError, which names partition and offset."""
    try:
        return decode(record.value)
    except UndecodableEventError as error:
        raise CorruptError(
            f"the log's record at partition {record.partition}, offset {record.offset}: {error}"
        ) from None


def numbered(record: Record) -> Event:
    """As `decoded`, of a record that was found by its number. Raises CorruptError also if its event has another one.

    Whoever reads on behind the event's number would be given the same record again, or miss others.
    """
    event = decoded(record)
    if record.sequence != event.sequence:
        raise CorruptError(
            f"the log's record at offset {record.offset} is listed as event {record.sequence} of its package, and is"
            f" event {event.sequence}"
        )
    return event


def _bounded(rows: Iterable[tuple[int, bytes | None, int | None, bytes | None]]) -> list[Record]:
    found: list[Record] = []
    size = 0
    for offset, package_id, sequence, value in rows:
        key = str(UUID(bytes=package_id)).encode() if package_id and len(package_id) == 16 else b""
        found.append(Record(PARTITION, offset, key, value or b"", sequence))
        size += len(found[-1].value)
        if size >= _BATCH_BYTES:
            break
    return found
