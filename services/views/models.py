"""What the view holds and only the registry itself needs: where bytes lie, and how long a package is kept."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

from artifact_store.manifest import ContentAddress
from artifact_store.models import *  # noqa: F403 - until every importer names its new place


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
class Retention:
    """How long a package is kept: `retention_days` after `counted_from`; None in either form means for ever.

    Times in µs since 1970, UTC.
    """

    package_id: UUID
    retention_class: str
    retention_days: int | None
    counted_from: int
    retain_until: int | None
