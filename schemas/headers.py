"""Kafka record headers, by which a consumer can route, skip or recognise an event without decoding it.

`ce_*` and `content-type` are CloudEvents 1.0, Kafka protocol binding, binary mode; the rest are this project's own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import lru_cache

from artifact_store.events import Event

CONTENT_TYPE = b"avro/binary"
SOURCE = b"artifact-store"


Headers = dict[str, str | bytes | None]
"""By name, in a fixed order; typed as the Kafka client has them, the values are bytes."""


def headers(event: Event, traceparent: str | None = None) -> Headers:
    """The headers of the event's record; `traceparent` as W3C Trace Context has it."""
    found = RecordHeaders(event.event_type, str(event.package_id).encode(), event.created_at)
    found.begin_command(str(event.command_id).encode(), event.command_count, traceparent)
    return found.of(event.command_index, str(event.event_id).encode())


class RecordHeaders:
    """The headers of events of one type, package and time, one after the other. Identifiers are text."""

    __slots__ = ("_headers",)

    def __init__(self, event_type: str, package_id: bytes, created_at: int) -> None:
        kind, version = split_type(event_type)
        self._headers: Headers = {
            "event_type": kind.encode(),
            "event_version": version.encode(),
            "command_id": None,
            "command_index": None,
            "command_count": None,
            "content-type": CONTENT_TYPE,
            "ce_specversion": b"1.0",
            "ce_id": None,
            "ce_source": SOURCE,
            "ce_type": event_type.encode(),
            "ce_subject": package_id,
            "ce_time": _rfc3339(created_at),
        }

    def begin_command(self, command_id: bytes, command_count: int, traceparent: str | None = None) -> None:
        """The events of this command are next."""
        found = self._headers
        found["command_id"], found["command_count"] = command_id, b"%d" % command_count
        if traceparent is not None:
            found["traceparent"] = traceparent.encode()
        elif "traceparent" in found:
            del found["traceparent"]

    def of(self, command_index: int, event_id: bytes) -> Headers:
        """The headers of one event, which change with the next call."""
        found = self._headers
        found["command_index"], found["ce_id"] = b"%d" % command_index, event_id
        return found


def split_type(event_type: str) -> tuple[str, str]:
    """`v1.file.ingested` → (`file.ingested`, `1`)."""
    version, _, kind = event_type.partition(".")
    return kind, version.removeprefix("v")


@lru_cache(8)
def _rfc3339(micros: int) -> bytes:
    """As `datetime.isoformat` has it: without a fraction in the whole second. Events of one batch have one time."""
    second, fraction = divmod(micros, 1_000_000)
    return (f"{_whole_second(second)}.{fraction:06}Z" if fraction else f"{_whole_second(second)}Z").encode()


@lru_cache(64)
def _whole_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()
