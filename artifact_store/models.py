"""The objects that the registry accepts and returns: packages, files, pages and acknowledgements.

They are the same from the database and over HTTP.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Set
from dataclasses import dataclass, field
from typing import Any, Generic, NamedTuple, TypeVar
from uuid import UUID

from artifact_store.manifest import ContentAddress
from artifact_store.position import Position
from artifact_store.rules import PathPair

Item = TypeVar("Item")

DEFAULT_PAGE = 100
MAX_PAGE = 1000


@dataclass(frozen=True, slots=True)
class Parked:
    """Where and why a view stopped following a package. `events` counts the events that wait in the log since then."""

    partition: int
    offset: int
    events: int
    cause: str


@dataclass(frozen=True, slots=True)
class Package:
    """A package as the view has it; times in µs since 1970, UTC. If it is parked, its last events are not included."""

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
class EventFilter:
    """Which events to read: those that match one of the values of each field. An empty set matches all values.

    Producers, subjects and retention classes are those that packages were created with. The feed over HTTP, `Registry`
    and the command line filter by it.
    """

    package_id: UUID | None = None
    producers: Set[str] = frozenset()
    subjects: Set[str] = frozenset()
    retention_classes: Set[str] = frozenset()
    types: Set[str] = frozenset()
    """Types with their versions, such as `v1.package.finalized`."""

    @property
    def needs_origins(self) -> bool:
        """Whether the filter also needs the properties with which an event's package was created."""
        return bool(self.producers or self.subjects or self.retention_classes)

    def takes(self, package_id: UUID, event_type: str) -> bool:
        """Whether it lets through events of this type and package, as far as these two decide."""
        return self.package_id in (None, package_id) and (not self.types or event_type in self.types)

    def includes(self, producer: str, subject: str, retention_class: str) -> bool:
        """Whether it lets through events of packages that were created with these properties."""
        return (
            (not self.producers or producer in self.producers)
            and (not self.subjects or subject in self.subjects)
            and (not self.retention_classes or retention_class in self.retention_classes)
        )


@dataclass(frozen=True, slots=True)
class Page(Generic[Item]):
    """A page of a list; `next` is the cursor of the next page, or None on the last."""

    items: tuple[Item, ...]
    next: str | None


async def all_pages(read: Callable[[str | None], Awaitable[Page[Item]]]) -> AsyncIterator[Page[Item]]:
    """The pages of a list, one after the other. `read` is called with the cursor of each page; its errors propagate."""
    page = await read(None)
    yield page
    while page.next is not None:
        page = await read(page.next)
        yield page


@dataclass(frozen=True, slots=True)
class UsageTotal:
    """Totals of one producer, retention class and day. `day` counts from 1970-01-01, UTC."""

    producer: str
    retention_class: str
    day: int
    packages: int
    files: int
    bytes: int


@dataclass(frozen=True, slots=True)
class Declared:
    """The producer's declaration about bytes before they arrive; None: not declared. Digests are 32 raw bytes."""

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


@dataclass(slots=True, unsafe_hash=True)
class Acknowledgement:
    """The result of a command whose events are durable in the log. A retry gets an equal one.

    `sequence` and `event_digest` belong to the command's last event. `files` are the files that it ingested. The
    other fields are set when it finalized a package: `manifest_digest` (32 raw bytes), and how many paths differ from
    another one only by case or Unicode form, with the first ten of them. Some file systems cannot hold both.
    """

    package_id: UUID
    sequence: int
    event_digest: bytes
    files: tuple[IngestedFile, ...] = ()
    manifest_digest: bytes | None = None
    unportable_count: int = 0
    unportable_paths: tuple[PathPair, ...] = ()
    position: Position | None = field(default=None, compare=False)
    """Reading from here gives everything after the command, and none of the command's own events.

    Events of other packages from the second before may be read as well. None if it is not known: on Kafka, a retry of
    a command that was recorded before does not get it.
    """
