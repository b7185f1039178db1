"""The Avro encoding of `v1.file.ingested`, field by field: nearly every event is one, and this way takes less than half
of the general codec's time. The order is that of the schema file; a test holds both ways to the same bytes.
"""

from __future__ import annotations

from schemas.events import Event, FileIngested

_DIGEST_LENGTHS = {32}

_ONE_BYTE = tuple(bytes([number << 1]) for number in range(64))
"""The numbers whose encoding is one byte."""


def encode_ingested(event: Event, payload: FileIngested) -> bytes:
    """The event as an Avro record, without a framing; `payload` is the event's.

    Raises ValueError for a digest of another length, or a number that is no Avro long.
    """
    lengths = {len(event.payload_digest), len(event.previous_digest), len(payload.blake3), len(payload.sha256)}
    if lengths != _DIGEST_LENGTHS:
        raise ValueError("a digest has not 32 bytes")
    receipt = payload.receipt
    return b"".join(
        (
            _string(str(event.event_id)),
            _string(event.event_type),
            _string(str(event.package_id)),
            _long(event.sequence),
            _long(event.created_at),
            _string(event.actor),
            _string(str(event.command_id)),
            _long(event.command_index),
            _long(event.command_count),
            event.payload_digest,
            event.previous_digest,
            _string(str(payload.file_id)),
            _string(payload.relative_path),
            _string(payload.media_type),
            _long(payload.size_bytes),
            payload.blake3,
            payload.sha256,
            _string(str(receipt.location_id)),
            _string(receipt.backend_id),
            _string(receipt.key),
            _long(receipt.offset),
            _long(receipt.length),
            _long(receipt.stored_at),
        )
    )


def _string(text: str) -> bytes:
    """Length in bytes, then UTF-8 (Avro 1.12 specification, "Primitive Types")."""
    encoded = text.encode()
    return _long(len(encoded)) + encoded


def _long(number: int) -> bytes:
    """Zig-zag, then seven bits a byte, the lowest first (Avro 1.12 specification, "Primitive Types")."""
    if 0 <= number < 64:
        return _ONE_BYTE[number]
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("a number is no Avro long")
    left = number << 1 if number >= 0 else ~(number << 1)
    found = bytearray()
    while left > 0x7F:
        found.append(left & 0x7F | 0x80)
        left >>= 7
    found.append(left)
    return bytes(found)
