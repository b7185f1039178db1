"""The codec: events to bytes and back, in Avro single-object encoding.

A record's value begins with C3 01 and the little-endian CRC-64-AVRO fingerprint of the writer's schema in Parsing
Canonical Form (Avro 1.12 specification, "Single-object encoding"). A topic may have another framing, which is converted
to this one where its records are read (`services.log.kafka.schema_registry`).

A new version of an event is a new schema file with an entry in `_DECODERS` and one in `UPCASTERS`; old bytes are never
rewritten. Version 2 of a type adds the principal to the actor; version 1 is read as an event without a principal.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from importlib.resources import files
from io import BytesIO
from typing import Any, cast
from uuid import UUID

import fastavro
from fastavro.schema import fingerprint, to_parsing_canonical_form

from artifact_store.events import (
    DELEGATED_FILE_INGESTED,
    DELEGATED_PACKAGE_CREATED,
    DELEGATED_PACKAGE_FINALIZED,
    FILE_INGESTED,
    LOG_SKIPPED,
    LOSS_ACCEPTED,
    PACKAGE_CREATED,
    PACKAGE_FINALIZED,
    Event,
    FileIngested,
    LogSkipped,
    LossAccepted,
    PackageCreated,
    PackageFinalized,
    Payload,
    StorageReceipt,
    payload_map,
)

SINGLE_OBJECT = b"\xc3\x01"
"""The first bytes of every record value; the fingerprint of its schema follows."""

HEAD_BYTES = 10
"""The length of both together; the Avro record follows."""


class UndecodableEventError(ValueError):
    """The bytes are not an event that this version can read. The text says why, and does not contain the bytes."""


def schema_text(event_type: str) -> str:
    """The text of the released `.avsc` file of an event type."""
    return files("schemas").joinpath(f"{event_type}.avsc").read_text(encoding="utf-8")


def encode(event: Event) -> bytes:
    """The event as a record value."""
    schema, head = _WRITERS[event.event_type]
    out = BytesIO()
    out.write(head)
    fastavro.schemaless_writer(out, schema, _to_record(event))
    return out.getvalue()


def framing(event_type: str) -> bytes:
    """The first HEAD_BYTES of the record values of this event type, before the Avro record."""
    return _WRITERS[event_type][1]


def schema_fingerprint(event_type: str) -> bytes:
    """The 8-byte fingerprint of this event type's schema, in the byte order of record values."""
    return fingerprint_of(framing(event_type))


def fingerprint_of(value: bytes) -> bytes:
    """The 8-byte fingerprint in a record value, which names the schema that it was written with."""
    return value[len(SINGLE_OBJECT) : HEAD_BYTES]


def decode(value: bytes) -> Event:
    """Read a record value.

    Raises:
        UndecodableEventError: an unknown framing or schema, bytes that do not fit the schema, or a text with a NUL.
    """
    if not value.startswith(SINGLE_OBJECT):
        raise UndecodableEventError("the value is not in the framing of this log")
    mark = fingerprint_of(value)
    found = _READERS.get(mark)
    if found is None:
        raise UndecodableEventError(f"no schema has the fingerprint {mark.hex()}")
    event_type, schema, decoder = found
    source = BytesIO(value)
    source.seek(HEAD_BYTES)
    try:
        record = cast("dict[str, Any]", fastavro.schemaless_reader(source, schema, None))
        for path, stands_for in _UPCASTS[event_type]:
            _add(record, path, stands_for)
        event = _to_event(record, decoder(record["payload"]))
    except (EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UndecodableEventError(f"the value does not fit its schema: {type(error).__name__}") from error
    if source.read(1):
        raise UndecodableEventError("bytes follow the event")
    if event.event_type != event_type:
        raise UndecodableEventError(f"the event does not have the type {event_type} of its schema")
    if _holds_nul(record):  # writers never accept one; PostgreSQL would refuse it, SQLite would store it
        raise UndecodableEventError("a text holds a NUL character")
    return event


def _to_record(event: Event) -> dict[str, Any]:
    return {
        "event_id": str(event.event_id),
        "event_type": event.event_type,
        "package_id": str(event.package_id),
        "sequence": event.sequence,
        "created_at": event.created_at,
        "actor": event.actor,
        "principal": event.principal,
        "command_id": str(event.command_id),
        "command_index": event.command_index,
        "command_count": event.command_count,
        "payload_digest": event.payload_digest,
        "previous_digest": event.previous_digest,
        "payload": payload_map(event.payload),
    }


def _add(record: dict[str, Any], path: str, value: Any) -> None:
    """Add a field of a later version to an event of an earlier one; `path` is as in `UPCASTERS`."""
    *outer, name = path.split(".")
    for part in outer:
        record = record[part]
    record.setdefault(name, value)


def _to_event(record: Mapping[str, Any], payload: Payload) -> Event:
    return Event(
        event_id=UUID(record["event_id"]),
        event_type=record["event_type"],
        package_id=UUID(record["package_id"]),
        sequence=record["sequence"],
        created_at=record["created_at"],
        actor=record["actor"],
        principal=record.get("principal"),  # administrative events have none
        command_id=UUID(record["command_id"]),
        command_index=record["command_index"],
        command_count=record["command_count"],
        payload_digest=record["payload_digest"],
        previous_digest=record["previous_digest"],
        payload=payload,
    )


def _holds_nul(record: Mapping[str, Any]) -> bool:
    """Whether a text in the record, or in a nested record, contains NUL."""
    for value in record.values():
        kind = type(value)
        if (kind is str and "\0" in value) or (kind is dict and _holds_nul(value)):
            return True
    return False


def _created(record: Mapping[str, Any]) -> Payload:
    return PackageCreated(**record)


def _finalized(record: Mapping[str, Any]) -> Payload:
    return PackageFinalized(**record)


def _ingested(record: Mapping[str, Any]) -> Payload:
    receipt = record["receipt"]
    return FileIngested(
        file_id=UUID(record["file_id"]),
        relative_path=record["relative_path"],
        media_type=record["media_type"],
        size_bytes=record["size_bytes"],
        blake3=record["blake3"],
        sha256=record["sha256"],
        receipt=StorageReceipt(
            location_id=UUID(receipt["location_id"]),
            backend_id=receipt["backend_id"],
            key=receipt["key"],
            offset=receipt["offset"],
            length=receipt["length"],
            stored_at=receipt["stored_at"],
        ),
    )


def _skipped(record: Mapping[str, Any]) -> Payload:
    return LogSkipped(**{**record, "log": UUID(record["log"])})


def _loss_accepted(record: Mapping[str, Any]) -> Payload:
    previous = record["previous_log"]
    logs = {"log": UUID(record["log"]), "previous_log": None if previous is None else UUID(previous)}
    return LossAccepted(**{**record, **logs})


def _without_logical_types(schema: Any) -> Any:
    """The schema without logical types. The bytes are the same, but coding plain text and integers is twice as fast."""
    match schema:
        case dict():
            return {k: _without_logical_types(v) for k, v in schema.items() if k != "logicalType"}
        case list():
            return [_without_logical_types(v) for v in schema]
    return schema


_DECODERS: dict[str, Callable[[Mapping[str, Any]], Payload]] = {
    PACKAGE_CREATED: _created,
    FILE_INGESTED: _ingested,
    PACKAGE_FINALIZED: _finalized,
    DELEGATED_PACKAGE_CREATED: _created,
    DELEGATED_FILE_INGESTED: _ingested,
    DELEGATED_PACKAGE_FINALIZED: _finalized,
    LOG_SKIPPED: _skipped,
    LOSS_ACCEPTED: _loss_accepted,
}

UPCASTERS: dict[str, dict[str, Any]] = {
    DELEGATED_PACKAGE_CREATED: {"principal": None},
    DELEGATED_FILE_INGESTED: {"principal": None},
    DELEGATED_PACKAGE_FINALIZED: {"principal": None},
}
"""By type, the fields that this version added to the previous one (`payload.NAME` for one of the payload), each with
the value that an event of an earlier version gets.
"""

EVENT_TYPES = tuple(_DECODERS)
"""Every event type that this version reads."""


def kind_and_version(event_type: str) -> tuple[str, int]:
    """`v2.file.ingested` → `file.ingested`, 2. Raises ValueError."""
    version, _, kind = event_type.partition(".")
    return kind, int(version.removeprefix("v"))


def _later(event_type: str) -> list[tuple[str, Any]]:
    """The fields that `UPCASTERS` adds in the versions after this one, next version first."""
    kind, version = kind_and_version(event_type)
    later = sorted((v, t) for t in UPCASTERS for k, v in [kind_and_version(t)] if k == kind and v > version)
    return [field for _, each in later for field in UPCASTERS[each].items()]


_UPCASTS = {_type: _later(_type) for _type in _DECODERS}
_WRITERS: dict[str, tuple[Any, bytes]] = {}
_READERS: dict[bytes, tuple[str, Any, Callable[[Mapping[str, Any]], Payload]]] = {}

for _type, _decoder in _DECODERS.items():
    _schema = json.loads(schema_text(_type))
    _mark = bytes.fromhex(fingerprint(to_parsing_canonical_form(_schema), "CRC-64-AVRO"))
    _parsed = fastavro.parse_schema(_without_logical_types(_schema))
    _WRITERS[_type] = (_parsed, SINGLE_OBJECT + _mark)
    _READERS[_mark] = (_type, _parsed, _decoder)
