"""The event catalogue: `docs/events.md`, generated from the schema files (`python -m schemas.catalogue`)."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

from schemas.codec import EVENT_TYPES, schema_text

_INTRODUCTION = """# Event catalogue

Generated from `schemas/*.avsc` by `make docs`; do not edit. Every record value is an event in Avro single-object
encoding: `C3 01`, the eight-byte little-endian CRC-64-AVRO fingerprint of the schema, the datum. The key is the package
id as text. Headers repeat type and version (`event_type`, `event_version`), the command (`command_id`, `command_index`,
`command_count`) and the CloudEvents attributes (`ce_*`, `content-type`), so that a consumer can route without decoding;
`traceparent` (W3C Trace Context) is there where the request carried one.

Read with `isolation.level=read_committed`. Most consumers default to `read_uncommitted`, which also shows events that
were never recorded, and records without key and value that writers append in aborted transactions: skip what has no
value.

Events of the types `v1.log.*` belong to no package. They record what an operator confirmed about one partition of the
log, lie in that partition whatever their key, and carry the id of the partition in place of a package's. A consumer of
packages ignores them; one that meets a record that it cannot read finds in the partition, further on, the
`v1.log.skipped` with its digest, once an operator has confirmed it.

Digests are recomputed like this:

- `payload_digest` is BLAKE3 over the payload as a canonical CBOR map (RFC 8949 §4.2) of its fields by name: identifiers
  and metadata as text, digests as byte strings, timestamps as integer microseconds, absent values as null. In
  `v1.package.finalized` it is BLAKE3 over the manifest, which makes it the package's content address.
- `previous_digest` is BLAKE3 over the canonical CBOR array of the preceding event's `event_type`, `package_id`,
  `sequence`, `created_at`, `actor`, `command_id`, `payload_digest`, `previous_digest`; 32 zero bytes in the first.
"""


def catalogue() -> str:
    """The whole document."""
    return "\n".join([_INTRODUCTION, *(line for event_type in EVENT_TYPES for line in _event(event_type))])


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
