"""What the registry takes and returns: packages, files, pages and acknowledgements.

They are the same from the database and over HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from artifact_store.manifest import ContentAddress
from artifact_store.rules import PathPair

Item = TypeVar("Item")

DEFAULT_PAGE = 100
MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Parked:
    """Where and why a view stopped following a package; from that record on, `events` of its events wait in the log."""

    partition: int
    offset: int
    events: int
    cause: str


@dataclass(frozen=True, slots=True)
class Package:
    """A package as the view has it; times in µs since 1970, UTC. A parked one has events that it does not show."""

    package_id: UUID
    name: str
    producer: str
    subject: str
    retention_class: str
    status: str
    metadata: dict[str, Any]
    manifest_digest: ContentAddress | None
    last_event_sequence: int
    created_at: int
    finalized_at: int | None
    parked: Parked | None = None


@dataclass(frozen=True, slots=True)
class File:
    """A file as the view has it; digests raw, `created_at` in µs since 1970."""

    file_id: UUID
    package_id: UUID
    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    sha256: bytes
    created_at: int


@dataclass(frozen=True, slots=True)
class PackageFilter:
    """Which packages to list; None means any."""

    producer: str | None = None
    subject: str | None = None
    status: str | None = None
    retention_class: str | None = None
    manifest_digest: ContentAddress | None = None


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A page of a listing; `next` is the cursor of the following one, None on the last."""

    items: tuple[Item, ...]
    next: str | None


async def all_pages(read: Callable[[str | None], Awaitable[Page[Item]]]) -> AsyncIterator[Page[Item]]:
    """The pages of a listing, one after the other; `read` is given the cursor of each. Raises as it does."""
    page = await read(None)
    yield page
    while page.next is not None:
        page = await read(page.next)
        yield page


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """What came in from one producer under one retention class on one day; `day` counts from 1970-01-01, UTC."""

    producer: str
    retention_class: str
    day: int
    packages: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Declared:
    """What a producer says the bytes are, before they arrive. None means: not said. Digests are raw 32 bytes."""

    size_bytes: int | None = None
    blake3: bytes | None = None
    sha256: bytes | None = None


class IngestedFile(NamedTuple):
    """One file of an acknowledgement. `event_digest` is the producer's proof against a truncated log."""

    file_id: UUID
    relative_path: str
    size_bytes: int
    blake3: bytes
    sha256: bytes
    sequence: int
    event_digest: bytes


class Acknowledgement(NamedTuple):
    """The answer to a command whose events are in the log for good; a retry gets the same one.

    `sequence` and `event_digest` are those of the command's last event; `files` is for `IngestFiles`. The others are
    for `FinalizePackage`: `manifest_digest` (32 raw bytes), and the paths that cannot be unpacked everywhere because
    they differ only by case or Unicode form, by their number and the first ten.
    """

    package_id: UUID
    sequence: int
    event_digest: bytes
    files: tuple[IngestedFile, ...] = ()
    manifest_digest: bytes | None = None
    unportable_count: int = 0
    unportable_paths: tuple[PathPair, ...] = ()
