"""The event catalogue: `docs/events.md`, generated from the schema files (`python -m schemas.catalogue`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from schemas.codec import EVENT_TYPES, schema_fingerprint, schema_text
from schemas.headers import event_version

_INTRODUCTION = """# Event catalogue

Generated from `schemas/*.avsc` by `make docs`; do not edit. [Following packages from outside](subscribing.md) says how
to read the topic `PREFIX.events`: **with `isolation.level=read_committed`**, or you see events that never happened. It
also says what headers records have, how events may change, and how digests are computed.

## Schemas

A record's value is `C3 01`, the fingerprint of its schema, and the event in Avro. Fingerprints are CRC-64-AVRO,
little-endian, as they stand in the value.

| event type | version | fingerprint | file |
| --- | --- | --- | --- |
"""


def catalogue() -> str:
    """The text of docs/events.md."""
    events = (line for event_type in EVENT_TYPES for line in _event(event_type))
    return "\n".join([_INTRODUCTION + "\n".join(map(_fingerprint, EVENT_TYPES)), "", *events])


def _fingerprint(event_type: str) -> str:
    mark = schema_fingerprint(event_type).hex()
    return f"| `{event_type}` | {event_version(event_type)} | `{mark}` | `schemas/{event_type}.avsc` |"


def _event(event_type: str) -> Iterator[str]:
    schema = json.loads(schema_text(event_type))
    yield f"## `{event_type}`"
    yield ""
    yield f"{schema['doc']} Record `{schema['namespace']}.{schema['name']}`, file `schemas/{event_type}.avsc`."
    yield ""
    yield "| field | type | meaning |"
    yield "| --- | --- | --- |"
    yield from _fields(schema, "")
    yield ""


def _fields(record: dict[str, Any], prefix: str) -> Iterator[str]:
    for field in record["fields"]:
        kind = field["type"]
        yield f"| `{prefix}{field['name']}` | {_type(kind)} | {field.get('doc', '')} |"
        if isinstance(kind, dict) and kind["type"] == "record":
            yield from _fields(kind, f"{prefix}{field['name']}.")


def _type(kind: Any) -> str:
    match kind:
        case str():
            return "32 bytes" if kind == "Digest" else kind
        case list():
            return " or ".join(_type(part) for part in kind)
        case {"type": "fixed", "size": size}:
            return f"{size} bytes"
        case {"logicalType": logical, "type": base}:
            return f"{base} ({logical})"
    return str(kind["type"])


if __name__ == "__main__":
    sys.stdout.write(catalogue())
