"""An event as one line of JSON, in both directions.

Digests are hex, a manifest is base64, metadata is the JSON object of its JCS text, times are RFC 3339. Reading
continues from `position`.
"""

from __future__ import annotations

import base64
import json
from typing import Annotated, Any, Literal
from uuid import UUID

from pydantic import Base64Bytes, Field, TypeAdapter

from artifact_store.canonical import jcs
from artifact_store.documents import times
from artifact_store.documents.shapes import Answer, Hex32, SequenceNumber, Size, TimeText
from artifact_store.errors import CorruptError, InvalidPositionError
from artifact_store.events import (
    Event,
    FileIngested,
    LogSkipped,
    LossAccepted,
    PackageCreated,
    PackageFinalized,
    Payload,
    RecordedEvent,
    StorageReceipt,
    type_with,
)
from artifact_store.position import Position


class PackageCreatedPayload(Answer):
    """The payload of `v1.package.created`. `retention_days` null means for ever."""

    name: str
    producer: str
    subject: str
    retention_class: str
    retention_days: int | None
    metadata: dict[str, Any]

    def to_payload(self) -> Payload:
        """The event's own payload again."""
        return PackageCreated(
            self.name, self.producer, self.subject, self.retention_class, self.retention_days, jcs(self.metadata)
        )


class ReceiptShape(Answer):
    """Proof that a file's bytes were stored: `length` bytes from `offset` of `key`."""

    location_id: UUID
    backend_id: str
    key: str
    offset: Size
    length: Size
    stored_at: TimeText


class FileIngestedPayload(Answer):
    """The payload of `v1.file.ingested`."""

    file_id: UUID
    relative_path: str
    media_type: str
    size_bytes: Size
    blake3: Hex32
    sha256: Hex32
    receipt: ReceiptShape

    def to_payload(self) -> Payload:
        """The event's own payload again."""
        receipt = self.receipt
        return FileIngested(
            file_id=self.file_id,
            relative_path=self.relative_path,
            media_type=self.media_type,
            size_bytes=self.size_bytes,
            blake3=bytes.fromhex(self.blake3),
            sha256=bytes.fromhex(self.sha256),
            receipt=StorageReceipt(
                location_id=receipt.location_id,
                backend_id=receipt.backend_id,
                key=receipt.key,
                offset=receipt.offset,
                length=receipt.length,
                stored_at=times.from_text(receipt.stored_at),
            ),
        )


class PackageFinalizedPayload(Answer):
    """The payload of `v1.package.finalized`: the manifest in canonical CBOR, or the key of the blob that holds it."""

    manifest: Base64Bytes | None
    manifest_key: str | None
    file_count: Size
    total_bytes: Size

    def to_payload(self) -> Payload:
        """The event's own payload again."""
        return PackageFinalized(self.manifest, self.manifest_key, self.file_count, self.total_bytes)


class _EventShape(Answer):
    id: UUID
    package_id: UUID
    sequence: SequenceNumber
    created_at: TimeText
    actor: str
    principal: str | None = Field(
        default=None, description="Who sent the command in the actor's name; only in types of version 2"
    )
    command_id: UUID
    command_index: int = Field(ge=0)
    command_count: int = Field(ge=1)
    payload_digest: Hex32
    previous_digest: Hex32
    position: str = Field(description="Where reading continues after this event")


class PackageCreatedEvent(_EventShape):
    """A package was created."""

    type: Literal["v1.package.created", "v2.package.created"]
    payload: PackageCreatedPayload


class FileIngestedEvent(_EventShape):
    """A file was ingested."""

    type: Literal["v1.file.ingested", "v2.file.ingested"]
    payload: FileIngestedPayload


class PackageFinalizedEvent(_EventShape):
    """A package was finalized."""

    type: Literal["v1.package.finalized", "v2.package.finalized"]
    payload: PackageFinalizedPayload


EventShape = Annotated[PackageCreatedEvent | FileIngestedEvent | PackageFinalizedEvent, Field(discriminator="type")]

_ADAPTER: TypeAdapter[PackageCreatedEvent | FileIngestedEvent | PackageFinalizedEvent] = TypeAdapter(EventShape)


def event_line(event: RecordedEvent) -> bytes:
    """The event as one line of JSON, without the newline."""
    return line_of(event_head(event), str(event.position))


def line_of(head: bytes, position: str) -> bytes:
    """The event's line, made of its head and the text of the position after it."""
    return b'%b%b"}' % (head, position.encode())


_POSITION_LINE = b'{"type":"position","position":"'


def position_line(position: str) -> bytes:
    """The line for a position that a reader has reached without an event, without the newline."""
    return b'%b%b"}' % (_POSITION_LINE, position.encode())


def position_in(line: bytes) -> Position | None:
    """The position in such a line; None for the line of an event. Raises CorruptError if it cannot be read."""
    if not line.startswith(_POSITION_LINE):
        return None
    try:
        return Position.parse(json.loads(line)["position"])
    except (ValueError, KeyError, TypeError, InvalidPositionError) as error:
        raise CorruptError("this is not a readable position") from error


def event_head(event: Event, *, manifest: bool = True) -> bytes:
    """The line up to the position, which differs between followers. Uses plain dictionaries, which are fast.

    Without `manifest`, the event's manifest is left out.
    """
    shape = {
        "type": event.event_type,
        "id": str(event.event_id),
        "package_id": str(event.package_id),
        "sequence": event.sequence,
        "created_at": times.to_text(event.created_at),
        "actor": event.actor,
        **({} if event.principal is None else {"principal": event.principal}),
        "command_id": str(event.command_id),
        "command_index": event.command_index,
        "command_count": event.command_count,
        "payload_digest": event.payload_digest.hex(),
        "previous_digest": event.previous_digest.hex(),
        "payload": _payload(event.payload, manifest=manifest),
        "position": "",
    }
    return json.dumps(shape, ensure_ascii=False, separators=(",", ":"), allow_nan=False).encode()[:-2]


def event_heads(event: Event) -> tuple[bytes, bytes]:
    """The head with the event's manifest, and the head without it. The event is encoded once."""
    lean = event_head(event, manifest=False)
    payload = event.payload
    if not isinstance(payload, PackageFinalized) or payload.manifest is None:
        return lean, lean
    # No text in JSON contains this, because its quotation marks would be escaped.
    return lean.replace(b'"manifest":null', b'"manifest":"%b"' % base64.b64encode(payload.manifest), 1), lean


def parse_event(line: bytes | str) -> RecordedEvent:
    """Parse such a line. Raises CorruptError if it is not an event that this version knows."""
    try:
        shape = _ADAPTER.validate_json(line)
        if shape.type != type_with(shape.type, shape.principal):
            raise ValueError("version and principal do not belong together")
        return RecordedEvent(
            event_id=shape.id,
            event_type=shape.type,
            package_id=shape.package_id,
            sequence=shape.sequence,
            created_at=times.from_text(shape.created_at),
            actor=shape.actor,
            principal=shape.principal,
            command_id=shape.command_id,
            command_index=shape.command_index,
            command_count=shape.command_count,
            payload_digest=bytes.fromhex(shape.payload_digest),
            previous_digest=bytes.fromhex(shape.previous_digest),
            payload=shape.payload.to_payload(),
            position=Position.parse(shape.position),
        )
    except ValueError as error:
        raise CorruptError(f"this is not a readable event: {type(error).__name__}") from error


def _payload(payload: Payload, *, manifest: bool) -> dict[str, Any]:
    match payload:
        case PackageCreated():
            return {
                "name": payload.name,
                "producer": payload.producer,
                "subject": payload.subject,
                "retention_class": payload.retention_class,
                "retention_days": payload.retention_days,
                "metadata": json.loads(payload.metadata),
            }
        case FileIngested():
            receipt = payload.receipt
            return {
                "file_id": str(payload.file_id),
                "relative_path": payload.relative_path,
                "media_type": payload.media_type,
                "size_bytes": payload.size_bytes,
                "blake3": payload.blake3.hex(),
                "sha256": payload.sha256.hex(),
                "receipt": {
                    "location_id": str(receipt.location_id),
                    "backend_id": receipt.backend_id,
                    "key": receipt.key,
                    "offset": receipt.offset,
                    "length": receipt.length,
                    "stored_at": times.to_text(receipt.stored_at),
                },
            }
        case PackageFinalized():
            inline = payload.manifest if manifest else None
            return {
                "manifest": None if inline is None else base64.b64encode(inline).decode(),
                "manifest_key": payload.manifest_key,
                "file_count": payload.file_count,
                "total_bytes": payload.total_bytes,
            }
        case LogSkipped() | LossAccepted():
            raise CorruptError("an administrative record of the log belongs to no package and has no such form")
