"""Kafka record headers, by which a consumer can route, skip or recognise an event without decoding it.

`ce_*` and `content-type` are CloudEvents 1.0, Kafka protocol binding, binary mode; the rest are this project's own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache, lru_cache

from schemas.events import Event

CONTENT_TYPE = b"avro/binary"
SOURCE = b"artifact-store"


def headers(event: Event, traceparent: str | None = None) -> list[tuple[str, bytes]]:
    """The headers of the event's record, names in a fixed order; `traceparent` as W3C Trace Context has it."""
    found = [
        *_of_type(event.event_type),
        ("command_id", str(event.command_id).encode()),
        ("command_index", b"%d" % event.command_index),
        ("command_count", b"%d" % event.command_count),
        ("content-type", CONTENT_TYPE),
        ("ce_specversion", b"1.0"),
        ("ce_id", str(event.event_id).encode()),
        ("ce_source", SOURCE),
        ("ce_type", event.event_type.encode()),
        ("ce_subject", str(event.package_id).encode()),
        ("ce_time", _rfc3339(event.created_at).encode()),
    ]
    if traceparent is not None:
        found.append(("traceparent", traceparent.encode()))
    return found


def split_type(event_type: str) -> tuple[str, str]:
    """`v1.file.ingested` → (`file.ingested`, `1`)."""
    version, _, kind = event_type.partition(".")
    return kind, version.removeprefix("v")


@cache
def _of_type(event_type: str) -> tuple[tuple[str, bytes], ...]:
    kind, version = split_type(event_type)
    return ("event_type", kind.encode()), ("event_version", version.encode())


def _rfc3339(micros: int) -> str:
    """As `datetime.isoformat` has it: without a fraction in the whole second."""
    second, fraction = divmod(micros, 1_000_000)
    return f"{_whole_second(second)}.{fraction:06}Z" if fraction else f"{_whole_second(second)}Z"


@lru_cache(64)
def _whole_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()
