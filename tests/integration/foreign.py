"""A reader of the log that knows docs/events.md and the `.avsc` files, but none of this project's code.

Everything here is implemented a second time on purpose: framing, fingerprints, canonical CBOR, digests, identifiers and
the partitioner. If it and the product disagree, one of them is wrong about the log.
"""

from __future__ import annotations

import io
import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from uuid import UUID

import cbor2
import fastavro
from blake3 import blake3
from confluent_kafka import TIMESTAMP_CREATE_TIME, Consumer, KafkaError, Message, TopicPartition
from fastavro.schema import to_parsing_canonical_form

SCHEMAS = Path(__file__).resolve().parents[2] / "schemas"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_READ_SECONDS = 60.0


@dataclass(frozen=True)
class ForeignEvent:
    """A record as it was found: `value` decoded with logical types, timestamps in µs since 1970 and ids as text."""

    partition: int
    key: str
    headers: Mapping[str, str]
    timestamp_ms: int
    value: dict[str, Any]

    @property
    def payload(self) -> dict[str, Any]:
        found: dict[str, Any] = self.value["payload"]
        return found


def rabin(text: str) -> bytes:
    """CRC-64-AVRO of a schema in Parsing Canonical Form, little-endian (Avro 1.12, "Schema Fingerprints")."""
    empty = 0xC15D213AA4D7A795
    crc = empty
    for byte in text.encode():
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (empty if crc & 1 else 0)
    return crc.to_bytes(8, "little")


def fingerprint_of(event_type: str) -> str:
    """The fingerprint of an event type's `.avsc` file, in hex."""
    schema = json.loads((SCHEMAS / f"{event_type}.avsc").read_text(encoding="utf-8"))
    return rabin(to_parsing_canonical_form(schema)).hex()


def load_schemas() -> dict[bytes, tuple[str, Any]]:
    """Event type and parsed schema of every `.avsc` file, by fingerprint; each file is complete in itself."""
    found = {}
    for path in sorted(SCHEMAS.glob("*.avsc")):
        schema = json.loads(path.read_text(encoding="utf-8"))
        found[rabin(to_parsing_canonical_form(schema))] = (path.stem, fastavro.parse_schema(schema))
    return found


def murmur2(data: bytes) -> int:
    """MurmurHash2 with the seed of Kafka's own partitioner (org.apache.kafka.common.utils.Utils.murmur2)."""
    length, mask, m = len(data), 0xFFFFFFFF, 0x5BD1E995
    h = 0x9747B28C ^ length
    for at in range(0, length - length % 4, 4):
        k = int.from_bytes(data[at : at + 4], "little") * m & mask
        k ^= k >> 24
        h = h * m & mask ^ (k * m & mask)
    tail = data[length - length % 4 :]
    if tail:
        h = (h ^ int.from_bytes(tail, "little")) * m & mask
    h = (h ^ h >> 13) * m & mask
    return h ^ h >> 15


def partition_of(key: str, partitions: int) -> int:
    """Where a Java producer would put a record of this key."""
    return (murmur2(key.encode()) & 0x7FFFFFFF) % partitions


def canonical(value: Any) -> bytes:
    """RFC 8949 §4.2.1: shortest heads, definite lengths, keys in bytewise order of their encodings."""
    if isinstance(value, dict):
        pairs = sorted((canonical(key), canonical(item)) for key, item in value.items())
        return _head(0xA0, len(pairs)) + b"".join(key + item for key, item in pairs)
    if isinstance(value, list):
        return _head(0x80, len(value)) + b"".join(map(canonical, value))
    if isinstance(value, str):
        return _head(0x60, len(value.encode())) + value.encode()
    if isinstance(value, bytes):
        return _head(0x40, len(value)) + value
    if value is None:
        return b"\xf6"
    if isinstance(value, bool) or not isinstance(value, int):
        return bytes(cbor2.dumps(value, canonical=True))
    return _head(0x00, value) if value >= 0 else _head(0x20, -1 - value)


def _head(major: int, number: int) -> bytes:
    if number < 24:
        return bytes([major + number])
    for mark, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if number < 1 << 8 * width:
            return bytes([major + mark]) + number.to_bytes(width)
    raise OverflowError(number)


def digest(data: bytes) -> bytes:
    """BLAKE3, 32 bytes."""
    return bytes(blake3(data).digest())


def chain_digest(value: Mapping[str, Any]) -> bytes:
    """What the next event of the package must carry as `previous_digest`."""
    names = "event_type package_id sequence created_at actor principal command_id payload_digest previous_digest"
    return digest(canonical([value[name] for name in names.split() if name in value]))


def rebuilt_manifest(events: list[ForeignEvent]) -> bytes:
    """The manifest of a finalized package, from nothing but its events."""
    created, *ingested, finalized = events
    said = created.payload
    files = sorted((event.payload for event in ingested), key=lambda payload: payload["relative_path"].encode())
    return canonical(
        {
            "manifest_version": 1,
            "package": {
                "id": created.value["package_id"],
                "name": said["name"],
                "producer": said["producer"],
                "subject": said["subject"],
                "retention_class": said["retention_class"],
                "metadata": json.loads(said["metadata"]),
                "status": "finalized",
                "created_at": created.value["created_at"],
                "finalized_at": finalized.value["created_at"],
            },
            "files": [
                {
                    "file_id": file["file_id"],
                    "relative_path": file["relative_path"],
                    "media_type": file["media_type"],
                    "size_bytes": file["size_bytes"],
                    "blake3": file["blake3"].hex(),
                    "sha256": file["sha256"].hex(),
                }
                for file in files
            ],
            "storage_receipts": [{"file_id": file["file_id"], **file["receipt"]} for file in files],
        }
    )


def read_topic(servers: str, topic: str) -> list[ForeignEvent]:
    """Every committed event of a topic, by package and in the order of the log. Blocks, a minute at most."""
    schemas = load_schemas()
    return [_event(message, schemas) for message in _messages(servers, topic)]


def _messages(servers: str, topic: str) -> Iterator[Message]:
    consumer = Consumer(
        {
            "bootstrap.servers": servers,
            "group.id": "a-foreign-reader",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    try:
        partitions = sorted(consumer.list_topics(topic, timeout=30).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, number, 0) for number in partitions])
        unread = set(partitions)
        deadline = time.monotonic() + _READ_SECONDS
        while unread:
            assert time.monotonic() < deadline, f"the ends of partitions {unread} were not reached"
            message = consumer.poll(1.0)
            if message is None:
                continue
            error = message.error()
            if error is None:
                yield message
            elif error.code() == KafkaError._PARTITION_EOF:
                unread.discard(message.partition())
            else:
                raise AssertionError(str(error))
    finally:
        consumer.close()


def _event(message: Message, schemas: Mapping[bytes, tuple[str, Any]]) -> ForeignEvent:
    value, key = message.value(), message.key()
    assert value is not None
    assert key is not None
    assert value[:2] == b"\xc3\x01", "Avro single-object encoding begins with C3 01"
    event_type, schema = schemas[value[2:10]]
    body = io.BytesIO(value[10:])
    record = _plain(fastavro.schemaless_reader(body, schema, None))
    assert body.read() == b""
    assert record["event_type"] == event_type
    kind, timestamp = message.timestamp()
    assert kind == TIMESTAMP_CREATE_TIME
    headers = cast("list[tuple[str, bytes]]", message.headers() or [])
    assert len(dict(headers)) == len(headers), "a header comes twice"
    return ForeignEvent(
        message.partition() or 0,
        key.decode(),
        {name: text.decode() for name, text in headers},
        timestamp,
        record,
    )


def _plain(value: Any) -> Any:
    """Identifiers as text and timestamps as integer µs, as the digests have them."""
    match value:
        case dict():
            return {name: _plain(item) for name, item in value.items()}
        case UUID():
            return str(value)
        case datetime():
            return (value - _EPOCH) // timedelta(microseconds=1)
    return value
