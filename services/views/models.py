"""What the registry view answers: packages, files, pages; the same from the database and through HTTP."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import UUID

from services.core.content_address import ContentAddress

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
class Location:
    """Where one file's bytes lie."""

    backend_id: str
    content_address: ContentAddress
    key: str
    offset: int
    length: int


@dataclass(frozen=True, slots=True)
class PlacedFile:
    """A file and where its bytes lie: `size_bytes` from `offset` of `key`; `blake3` is its own (32 raw bytes)."""

    file_id: UUID
    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    key: str
    offset: int


@dataclass(frozen=True, slots=True)
class ManifestLocation:
    """The manifest of a finalized package: inline bytes, or the key of the blob that holds them."""

    digest: ContentAddress
    inline: bytes | None
    key: str | None


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
class Retention:
    """How long a package is kept: `retention_days` after `counted_from`; None in either form means for ever.

    Times in µs since 1970, UTC.
    """

    package_id: UUID
    retention_class: str
    retention_days: int | None
    counted_from: int
    retain_until: int | None
