"""The events of the log of record, as plain frozen dataclasses."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

from artifact_store.position import Position

PACKAGE_CREATED = "v1.package.created"
FILE_INGESTED = "v1.file.ingested"
PACKAGE_FINALIZED = "v1.package.finalized"
DELEGATED_PACKAGE_CREATED = "v2.package.created"
DELEGATED_FILE_INGESTED = "v2.file.ingested"
DELEGATED_PACKAGE_FINALIZED = "v2.package.finalized"
"""Version 2 of a type has a principal in addition to the actor, and is otherwise equal to version 1."""
LOG_SKIPPED = "v1.log.skipped"
LOSS_ACCEPTED = "v1.log.loss_accepted"

_DELEGATED = {
    PACKAGE_CREATED: DELEGATED_PACKAGE_CREATED,
    FILE_INGESTED: DELEGATED_FILE_INGESTED,
    PACKAGE_FINALIZED: DELEGATED_PACKAGE_FINALIZED,
}
_FIRST_VERSION = {second: first for first, second in _DELEGATED.items()}


def first_version(event_type: str) -> str:
    """The type in version 1, which is the same with and without a principal."""
    return _FIRST_VERSION.get(event_type, event_type)


def type_with(event_type: str, principal: str | None) -> str:
    """The type (given in any version) in the version of an event with this principal."""
    first = first_version(event_type)
    return first if principal is None else _DELEGATED[first]


NO_DIGEST = bytes(32)
"""`previous_digest` of a package's first event."""


@dataclass(frozen=True, slots=True)
class PackageCreated:
    """Payload of `v1.package.created`. `retention_days` None: for ever; `metadata` is a JSON object in JCS form."""

    name: str
    producer: str
    subject: str
    retention_class: str
    retention_days: int | None
    metadata: str


@dataclass(frozen=True, slots=True)
class StorageReceipt:
    """Proof that bytes were stored: `length` bytes from `offset` of `key`; `stored_at` in µs since 1970, UTC."""

    location_id: UUID
    backend_id: str
    key: str
    offset: int
    length: int
    stored_at: int


@dataclass(frozen=True, slots=True)
class FileIngested:
    """Payload of `v1.file.ingested`. Digests are 32 raw bytes."""

    file_id: UUID
    relative_path: str
    media_type: str
    size_bytes: int
    blake3: bytes
    sha256: bytes
    receipt: StorageReceipt


@dataclass(frozen=True, slots=True)
class PackageFinalized:
    """Payload of `v1.package.finalized`: the manifest in canonical CBOR, or the key of the blob that holds it."""

    manifest: bytes | None
    manifest_key: str | None
    file_count: int
    total_bytes: int


@dataclass(frozen=True, slots=True)
class LogSkipped:
    """Payload of `v1.log.skipped`: the record with this `digest` (see `digests.record_digest`) is passed over.

    `offset` is its offset in the log with this identity. `size_bytes` counts its key and value.
    """

    log: UUID
    partition: int
    offset: int
    digest: bytes
    size_bytes: int
    cause: str
    reason: str


@dataclass(frozen=True, slots=True)
class LossAccepted:
    """Payload of `v1.log.loss_accepted`: the log lacks the record at `expected_offset`, which was acknowledged.

    `evidence` says what proves it (`file` or `snapshot`); `previous_log` is the evidence's log if it is another one.
    The digests are BLAKE3 over the value of the record that was there, and of the one that is there now, if any.
    """

    log: UUID
    partition: int
    evidence: str
    previous_log: UUID | None
    expected_offset: int
    expected_digest: bytes
    found_digest: bytes | None
    end_offset: int
    reason: str


AdministrativePayload = LogSkipped | LossAccepted
"""Payloads that belong to a partition of the log, not to a package."""

Payload = PackageCreated | FileIngested | PackageFinalized | LogSkipped | LossAccepted


def payload_map(payload: Payload) -> dict[str, Any]:
    """The payload as a map of its fields by name. It is encoded in Avro and digested (except for the manifest).

    Identifiers are text, digests bytes, timestamps integer µs, absent optionals None. Keys are in canonical order, by
    the length of their text, then by its bytes (RFC 8949 §4.2.1).
    """
    match payload:
        case FileIngested():
            receipt = payload.receipt
            return {
                "blake3": payload.blake3,
                "sha256": payload.sha256,
                "file_id": str(payload.file_id),
                "receipt": {
                    "key": receipt.key,
                    "length": receipt.length,
                    "offset": receipt.offset,
                    "stored_at": receipt.stored_at,
                    "backend_id": receipt.backend_id,
                    "location_id": str(receipt.location_id),
                },
                "media_type": payload.media_type,
                "size_bytes": payload.size_bytes,
                "relative_path": payload.relative_path,
            }
        case PackageCreated():
            return {
                "name": payload.name,
                "subject": payload.subject,
                "metadata": payload.metadata,
                "producer": payload.producer,
                "retention_days": payload.retention_days,
                "retention_class": payload.retention_class,
            }
        case PackageFinalized():
            return {
                "manifest": payload.manifest,
                "file_count": payload.file_count,
                "total_bytes": payload.total_bytes,
                "manifest_key": payload.manifest_key,
            }
        case LogSkipped():
            return {
                "log": str(payload.log),
                "cause": payload.cause,
                "digest": payload.digest,
                "offset": payload.offset,
                "reason": payload.reason,
                "partition": payload.partition,
                "size_bytes": payload.size_bytes,
            }
        case LossAccepted():
            return {
                "log": str(payload.log),
                "reason": payload.reason,
                "evidence": payload.evidence,
                "partition": payload.partition,
                "end_offset": payload.end_offset,
                "found_digest": payload.found_digest,
                "previous_log": None if payload.previous_log is None else str(payload.previous_log),
                "expected_digest": payload.expected_digest,
                "expected_offset": payload.expected_offset,
            }


@dataclass(frozen=True, slots=True)
class Event:
    """A fact on the log.

    `created_at` is in µs since 1970-01-01T00:00Z; `command_index` counts from 0 to `command_count` - 1; digests are 32
    raw bytes. With an AdministrativePayload, `package_id` is the id of the partition (`identifiers.partition_id`), and
    `sequence` and `previous_digest` count and chain the partition's administrative records.

    `principal` is the sender who acted in the actor's name, by the right to delegate; None if the actor sent the
    command. Types of version 2 have one, those of version 1 do not.
    """

    event_id: UUID
    event_type: str
    package_id: UUID
    sequence: int
    created_at: int
    actor: str
    command_id: UUID
    command_index: int
    command_count: int
    payload_digest: bytes
    previous_digest: bytes
    payload: Payload
    principal: str | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class RecordedEvent(Event):
    """An event as read from the log. Reading continues from its `position`."""

    position: Position
