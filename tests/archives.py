"""Shared by the tests of archives and copies: digests of a log's views, logs in files, and fillers that end early."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

from blake3 import blake3

from artifact_store.errors import UnavailableError
from artifact_store.events import Event, PackageCreated
from artifact_store.manifest import content_key
from schemas.codec import encode
from schemas.headers import headers
from schemas.runs import StoredFile
from services.archive import Archive, Loaded, import_archive
from services.archive.chains import scanned
from services.log.port import Log, LogFiller, Record
from services.log.sqlite import SqliteFiller, SqliteLog
from services.views.database import Views
from services.views.digest import digest_view
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from tests.views_history import START, History


async def digests_of(log: Log, folder: Path) -> Mapping[str, str]:
    """The digest of each view of the log, folded from its start into a new database in the folder."""
    views = Views(f"sqlite+aiosqlite:///{folder}/{await log.identity()}.views.db")
    try:
        await views.migrate()
        for projection in PROJECTIONS.values():
            await catch_up(views, log, projection)
        return await view_digests(views)
    finally:
        await views.close()


async def view_digests(views: Views) -> Mapping[str, str]:
    """The digest of every view as it is."""
    return {name: str((await digest_view(views, projection)).digest) for name, projection in PROJECTIONS.items()}


async def records_of(log: Log) -> dict[int, list[Record]]:
    """All records by partition."""
    found: dict[int, list[Record]] = {partition: [] for partition in range(await log.partitions())}
    async for record in scanned(log, (await log.end()).offsets, headers=True):
        found[record.partition].append(record)
    return found


@asynccontextmanager
async def sqlite_log(path: Path) -> AsyncIterator[SqliteLog]:
    """The log at the path, made if it is not there."""
    log = SqliteLog(path)
    try:
        await log.migrate()
        yield log
    finally:
        await log.close()


async def imported(archive: Path, path: Path) -> Loaded:
    """Import an archive into the log at the path."""
    log = SqliteLog(path)
    try:
        with Archive(archive) as opened:
            return await import_archive(opened, log, SqliteFiller(path))
    finally:
        await log.close()


class EndsEarly:
    """A filler that fails after this many transactions: before the next one, or after it, as if its answer was lost."""

    def __init__(self, filler: LogFiller, transactions: int, *, answer_lost: bool) -> None:
        self._filler = filler
        self._left = transactions
        self._answer_lost = answer_lost

    async def begin(self) -> None:
        await self._filler.begin()

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        self._left -= 1
        if self._left >= 0 or self._answer_lost:
            await self._filler.append(partition, records)
        if self._left < 0:
            raise UnavailableError("ended early")

    async def settle(self) -> None:
        await self._filler.settle()

    async def close(self) -> None:
        await self._filler.close()


FILES = 98
"""How many files a package of a long history has: with its creation and finalization, it has 100 events."""


def long_history(packages: int, backend_id: str = "local") -> Iterator[tuple[Sequence[Event], bytes]]:
    """Package after package, each finalized: its events, and the pack that its files lie in. Nothing is kept."""
    history, draw = History(17), random.Random(17)
    for number in range(packages):
        package_id = history.create(f"package {number}", ("report", "scratch")[number % 2], producer=f"p{number % 7}")
        contents = [draw.randbytes(300 + i) for i in range(FILES)]
        pack, at, files = b"".join(contents), 0, []
        key = content_key(blake3(pack).digest())
        for i, content in enumerate(contents):
            size, digest, sha256 = len(content), blake3(content).digest(), hashlib.sha256(content).digest()
            name = f"run/{i:03}.csv"
            files.append(StoredFile(name, "text/csv", size, digest, sha256, backend_id, key, at, size, START))
            at += len(content)
        history.ingest_stored(package_id, files)
        history.finalize(package_id)
        yield history.take(), pack


async def as_records(log: Log, events: Sequence[Event]) -> dict[int, list[Record]]:
    """The records of whole packages by partition, as gateways write them to the log."""
    created = {event.package_id: event.payload for event in events if isinstance(event.payload, PackageCreated)}
    identity, found = await log.identity(), dict[int, list[Record]]()
    for event in events:
        partition, key = log.partition_of(event.package_id), str(event.package_id).encode()
        about = tuple(headers(event, identity, created[event.package_id]).items())
        record = Record(partition, 0, key, encode(event), None, event.created_at // 1000, about)
        found.setdefault(partition, []).append(record)
    return found
