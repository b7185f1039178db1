"""Commands: requests that become events or a rejection, and the acknowledgement of what they became."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

from services.core.paths import PathPair


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
