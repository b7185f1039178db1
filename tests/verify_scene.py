"""A small, undamaged registry for tests of the oracle: a log in memory, blobs in a folder and views in a file.

Its events are made by the core. Tests then damage log, blobs or views on purpose; `chained` makes an event that was
tampered with fit its neighbours again, as a careful forger would, so that only one check can find it.
"""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any
from uuid import UUID

from blake3 import blake3

from artifact_store.events import NO_DIGEST, Event, FileIngested, PackageFinalized
from artifact_store.manifest import content_key
from schemas import identifiers
from schemas.codec import encode
from schemas.digests import event_digest, payload_digest
from schemas.runs import StoredFile
from services.blobs.local import LocalBlobStore
from services.core.decide import Command, IngestFiles, Limits, decide
from services.core.state import PackageState, evolve
from services.log.sqlite import SqliteLog
from services.verify import Report, verify
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.projections import PROJECTIONS
from tests.commands import command_id, create, finalize
from tests.memory_log import MemoryLog

CONTENT = {"a": b"first", "b": b"second", "c": b"the third"}


@dataclass
class Scene:
    """A package of three files: `a` by a command of its own, `b` and `c` by one command; then it is finalized."""

    folder: Path
    events: list[Event]
    log: MemoryLog = field(default_factory=MemoryLog)
    file: SqliteLog | None = None
    """The log that the oracle reads in place of the one in memory."""
    misplaced: list[Event] = field(default_factory=list)
    """Events that go to a partition that is not theirs."""
    again: list[Event] = field(default_factory=list)
    """Events that follow all others, in the partition that is theirs."""
    keys: dict[UUID, bytes] = field(default_factory=dict)
    """Keys of events, by their ids, that are not those of their packages."""

    @property
    def package_id(self) -> UUID:
        return self.events[0].package_id

    @property
    def open(self) -> list[Event]:
        """The events before the finalization."""
        return self.events[:4]

    def blob(self, name: str) -> Path:
        """The file of the blob that holds the bytes of file `name`."""
        return self.folder / "blobs" / content_key(blake3(CONTENT[name]).digest())

    def views(self) -> Views:
        return Views(f"sqlite+aiosqlite:///{self.folder / 'views.db'}")

    def append(self) -> None:
        """Put the events into the log. Once."""
        for event in self.events:
            key = self.keys.get(event.event_id, str(event.package_id).encode())
            self.log.append_raw(self.log.partition_of(event.package_id), encode(event), key)
        self.log.append(*self.again)
        for event in self.misplaced:
            partition = self.log.partition_of(event.package_id) + 1
            self.log.append_raw(partition % 3, encode(event), str(event.package_id).encode())

    async def fold(self) -> None:
        """Bring the views up to the log."""
        views = self.views()
        try:
            for projection in PROJECTIONS.values():
                await catch_up(views, self.log, projection)
        finally:
            await views.close()

    async def verify(self, *, check_bytes: bool = False) -> Report:
        """Let the oracle judge."""
        blobs, views = LocalBlobStore(self.folder / "blobs"), self.views()
        await blobs.migrate()
        try:
            return await verify(self.file or self.log, blobs, views, check_bytes=check_bytes)
        finally:
            await views.close()
            await blobs.close()
            if self.file is not None:
                await self.file.close()


async def whole_scene(folder: Path) -> Scene:
    """A registry in which nothing is broken; nothing is in its log yet."""
    for content in CONTENT.values():
        put_blob(folder, content_key(blake3(content).digest()), content)
    views = Views(f"sqlite+aiosqlite:///{folder / 'views.db'}")
    await views.migrate()
    await views.close()
    made = create()
    commands = (
        made,
        IngestFiles(made.package_id, command_id("one"), "ada", (stored("a"),)),
        IngestFiles(made.package_id, command_id("two"), "ada", (stored("b"), stored("c"))),
        finalize(made.package_id),
    )
    return Scene(folder, await asyncio.to_thread(history, commands))


def put_blob(folder: Path, key: str, content: bytes) -> None:
    """Write a blob as if it had been stored."""
    path = folder / "blobs" / key
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def stored(path: str, content: bytes | None = None) -> StoredFile:
    """A file whose bytes lie at their content-addressed key."""
    data = CONTENT[path] if content is None else content
    digest = blake3(data).digest()
    sha256 = hashlib.sha256(data).digest()
    return StoredFile(
        path, "text/plain", len(data), digest, sha256, "local", content_key(digest), 0, len(data), 1_000_000
    )


def history(commands: Iterable[Command], limits: Limits | None = None) -> list[Event]:
    """What the core makes of one package's commands, one every millisecond."""
    state: PackageState | None = None
    events: list[Event] = []
    for now, command in enumerate(commands, 1):
        for event in decide(state, command, now * 1000, limits or Limits()):
            state = evolve(state, event)
            events.append(event)
    return events


def changed(event: Event, **fields: Any) -> Event:
    """The event with other fields in its payload, or in its receipt, and every identifier and digest to match."""
    payload: Any = event.payload
    receipt = {
        name: fields.pop(name)
        for name in ("backend_id", "key", "offset", "length", "location_id", "stored_at")
        if name in fields
    }
    payload = replace(payload, **fields)
    if isinstance(payload, FileIngested):
        file_id = fields.get("file_id") or identifiers.file_id(event.package_id, payload.relative_path)
        at = replace(payload.receipt, **receipt)
        location = identifiers.location_id(file_id, at.backend_id, at.key, at.offset, at.length)
        at = replace(at, location_id=receipt.get("location_id") or location)
        payload = replace(payload, file_id=file_id, receipt=at)
    digest = event.payload_digest if isinstance(payload, PackageFinalized) else payload_digest(payload)
    return replace(event, payload=payload, payload_digest=digest)


def chained(events: Iterable[Event], *, numbered: bool = True) -> list[Event]:
    """The events with every link of the chain to match and, if they are to be numbered, as 1, 2, 3 …"""
    found: list[Event] = []
    digest = NO_DIGEST
    for number, event in enumerate(events, 1):
        sequence = number if numbered else event.sequence
        event_id = identifiers.event_id(event.package_id, sequence)
        linked = replace(event, sequence=sequence, event_id=event_id, previous_digest=digest)
        digest = event_digest(linked)
        found.append(linked)
    return found
