"""The mark of `catch-up` and `rebuild`: one asyncpg connection copies ready-made rows into the same indexed tables.

The rows are tuples made before the clock starts, those that the registry has of the same events. Nothing is read,
decoded, checked or remembered beside them. Each transaction is two `COPY`s, into `artifact_files` and
`storage_locations`; the packages are one more.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import asyncpg

from artifact_store.events import Event, FileIngested, PackageCreated
from benchmarks.file_events import Amount, file_events
from benchmarks.views_database import connect, fresh_views
from services.config import Settings
from services.core.state import CREATED
from services.views.tables import artifact_files, artifact_packages, storage_locations

PER_TRANSACTION = 20_000
_READY = 300_000
"""So many files' rows are made at a time, while the clock stands."""

Row = tuple[Any, ...]


async def copy_rate(settings: Settings, amount: Amount) -> float:
    """Events a second of COPYing what they become, into a fresh database."""
    events = file_events(amount)
    seconds = 0.0
    copied = 0
    async with fresh_views(settings) as fresh:
        connection = await connect(fresh)
        try:
            while block := list(islice(events, _READY)):
                ready = list(_transactions(block))
                copied += len(block)
                del block
                gc.freeze()  # the collector would walk the rows again and again
                began = time.perf_counter()
                for rows in ready:
                    await _copy(connection, *rows)
                seconds += time.perf_counter() - began
                del ready, rows
                gc.unfreeze()
            last = amount.files + 1
            await connection.execute("update artifact_packages set last_event_sequence = $1", last)
            assert await connection.fetchval("select count(*) from artifact_files") == amount.file_events
        finally:
            await connection.close()
    assert copied == amount.events
    return copied / seconds


def _transactions(events: Sequence[Event]) -> Iterator[tuple[list[Row], list[Row], list[Row]]]:
    rest: Iterable[Event] = iter(events)
    while some := list(islice(rest, PER_TRANSACTION)):
        packages: list[Row] = []
        files: list[Row] = []
        locations: list[Row] = []
        for event in some:
            match event.payload:
                case PackageCreated():
                    packages.append(_package(event, event.payload))
                case FileIngested():
                    files.append(_file(event, event.payload))
                    locations.append(_location(event.payload))
        yield packages, files, locations


async def _copy(
    connection: asyncpg.Connection, packages: Sequence[Row], files: Sequence[Row], locations: Sequence[Row]
) -> None:
    async with connection.transaction():
        for table, rows in ((artifact_packages, packages), (artifact_files, files), (storage_locations, locations)):
            if rows:
                await connection.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())


def _package(event: Event, created: PackageCreated) -> Row:
    texts = (created.name, created.producer, created.subject, created.retention_class, CREATED, created.metadata)
    return (event.package_id, *texts, None, 1, event.actor, event.created_at, None)


def _file(event: Event, file: FileIngested) -> Row:
    described = (file.relative_path, file.media_type, file.size_bytes, file.blake3, file.sha256)
    return (file.file_id, event.package_id, *described, event.created_at)


def _location(file: FileIngested) -> Row:
    kept = file.receipt
    where = (kept.backend_id, f"blake3:{file.blake3.hex()}", kept.key, kept.offset, kept.length)
    return (kept.location_id, file.file_id, *where, kept.stored_at)
