"""Histories for tests of the views: valid events, made by the core itself, and the views' rows as plain values."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from uuid import UUID

from blake3 import blake3
from sqlalchemy import select

from artifact_store.events import Event
from artifact_store.manifest import content_key
from schemas import identifiers
from schemas.codec import encode
from schemas.runs import StoredFile, entry_of
from services.core.decide import Command, CreatePackage, FinalizePackage, IngestFiles, Limits, decide
from services.core.lifecycle import RETENTION_CLASSES
from services.core.state import PackageState, evolve
from services.log.port import Record
from services.views.database import Views
from services.views.engine.apply import apply_within
from services.views.engine.checkpoints import Checkpoint
from services.views.engine.source import EventBatch
from services.views.projections import PROJECTIONS, Projection

START = 1_750_000_000_000_000
"""The time of the first event, in µs since 1970."""


def stored_file(path: str, content: bytes, stored_at: int = START) -> StoredFile:
    """A file of this content, as a local store would have kept it."""
    digest = blake3(content).digest()
    sha256 = hashlib.sha256(content).digest()
    key = content_key(digest)
    return StoredFile(path, "text/plain", len(content), digest, sha256, "local", key, 0, len(content), stored_at)


class History:
    """A log's worth of events in the order in which they were decided; the same for the same seed."""

    def __init__(self, seed: int = 0) -> None:
        self.events: list[Event] = []
        self._states: dict[UUID, PackageState] = {}
        self._random = random.Random(seed)
        self._now = START

    def create(self, name: str = "package", retention_class: str = "report", **more: Any) -> UUID:
        """Create a package; `more` are further fields of the command."""
        command_id = self._draw()
        package_id = identifiers.package_id("tester", command_id)
        command = CreatePackage(package_id, command_id, "tester", name, "build", "main", retention_class, "{}")
        self._decide(replace(command, **more))
        return package_id

    def ingest(self, package_id: UUID, *paths: str) -> None:
        """Ingest files of these paths in one command; their content is drawn."""
        files = tuple(stored_file(path, self._random.randbytes(8), self._now) for path in paths)
        self._decide(IngestFiles(package_id, self._draw(), "tester", files))

    def ingest_stored(self, package_id: UUID, files: Sequence[StoredFile]) -> None:
        """Ingest files that are stored, in one command."""
        self._decide(IngestFiles(package_id, self._draw(), "tester", tuple(files)))

    def take(self) -> Sequence[Event]:
        """All events so far; they and their packages are forgotten."""
        taken, self.events, self._states = self.events, [], {}
        return taken

    def finalize(self, package_id: UUID, *, inline: bool = True) -> None:
        """Finalize the package; with `inline` False its manifest is a claim check."""
        limits = Limits() if inline else Limits(inline_manifest_bytes=0)
        self._decide(FinalizePackage(package_id, self._draw(), "tester"), limits)

    def fill(self, packages: int, files: int) -> History:
        """Packages of every kind, their commands interleaved; two of three are finalized."""
        classes = [c.name for c in RETENTION_CLASSES]
        opened: list[tuple[UUID, int]] = []
        for number in range(packages):
            metadata = f'{{"n":{number},"é":"ü"}}'
            kind = classes[number % len(classes)]
            opened.append(
                (self.create(f"package {number}", kind, metadata=metadata, producer=f"p{number % 3}"), number)
            )
        for round_ in range(files):
            self._random.shuffle(opened)
            for package_id, number in opened:
                self.ingest(package_id, *(f"dir/ü{number}-{round_}-{i}" for i in range(1 + number % 3)))
        for package_id, number in opened:
            if number % 3:
                self.finalize(package_id, inline=number % 2 == 0)
        return self

    def _decide(self, command: Command, limits: Limits | None = None) -> None:
        self._now += self._random.randrange(1, 1000)
        state = self._states.get(command.package_id)
        for event in decide(state, command, self._now, limits or Limits()):
            state = evolve(state, event)
            self.events.append(event)
        assert state is not None
        self._states[command.package_id] = state

    def _draw(self) -> UUID:
        return UUID(int=self._random.getrandbits(128), version=4)


def batches(events: Sequence[Event], size: int) -> Iterator[Sequence[Event]]:
    """The events in runs of `size`."""
    for start in range(0, len(events), size):
        yield events[start : start + size]


async def apply_whole(
    views: Views, projection: Projection, events: Sequence[Event], ends: Mapping[int, int], *, since: Checkpoint
) -> Checkpoint:
    """Apply the events as one batch of the first of these partitions; an event that is refused parks no package.

    Raises as `apply`; CorruptError, which says why an event is refused.
    """
    partition = next(iter(ends))
    first = since.position.offsets.get(partition, 0)
    records = [
        Record(partition, first + i, str(event.package_id).encode(), encode(event)) for i, event in enumerate(events)
    ]
    batch = EventBatch(since, ends, records, [entry_of(event) for event in events])
    async with views.writing() as connection:
        return await apply_within(connection, projection, batch, max_parked=0, whole=True)


async def view_rows(views: Views) -> Mapping[str, list[tuple[Any, ...]]]:
    """Every row of every projection's tables, by table name, in the order of the primary key."""
    found: dict[str, list[tuple[Any, ...]]] = {}
    async with views.reading(snapshot=True) as connection:
        for projection in PROJECTIONS.values():
            for table in projection.tables:
                rows = await connection.execute(select(table).order_by(*table.primary_key.columns))
                found[table.name] = [tuple(row) for row in rows]
    return found
