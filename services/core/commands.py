"""Commands: requests that become events or a rejection, and the acknowledgement of what they became."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID


@dataclass(frozen=True, slots=True)
class CreatePackage:
    """Create a package. `metadata` is a JSON object in JCS form; `package_id` is derived from actor and command id."""

    package_id: UUID
    command_id: UUID
    actor: str
    name: str
    producer: str
    subject: str
    retention_class: str
    metadata: str


@dataclass(frozen=True, slots=True)
class StoredFile:
    """A file whose bytes are durable and verified: `length` bytes from `offset` of `key`, `stored_at` in µs since 1970.

    Digests are 32 raw bytes.
    """

    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    sha256: bytes
    backend_id: str
    key: str
    offset: int
    length: int
    stored_at: int


@dataclass(frozen=True, slots=True)
class IngestFiles:
    """Add files to a package, all or none, in this order."""

    package_id: UUID
    command_id: UUID
    actor: str
    files: tuple[StoredFile, ...]


@dataclass(frozen=True, slots=True)
class FinalizePackage:
    """Freeze a package under its manifest."""

    package_id: UUID
    command_id: UUID
    actor: str


Command = CreatePackage | IngestFiles | FinalizePackage
