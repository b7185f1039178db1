"""Kafka record headers, by which a consumer can route, skip or recognise an event without decoding it.

`ce_*` and `content-type` are CloudEvents 1.0, Kafka protocol binding, binary mode; the rest are this project's own.
"""

from __future__ import annotations

from datetime import UTC, datetime
from functools import cache, lru_cache

from schemas.events import Event

CONTENT_TYPE = b"avro/binary"
SOURCE = b"artifact-store"

_CONTENT_TYPE = ("content-type", CONTENT_TYPE)
_SPECVERSION = ("ce_specversion", b"1.0")
_SOURCE = ("ce_source", SOURCE)


Headers = list[tuple[str, str | bytes | None]]
"""As the Kafka client wants them to be typed; the values are bytes."""


def headers(event: Event, traceparent: str | None = None) -> Headers:
    """The headers of the event's record, names in a fixed order; `traceparent` as W3C Trace Context has it."""
    shared = CommandHeaders(
        event.event_type,
        str(event.package_id).encode(),
        str(event.command_id).encode(),
        event.command_count,
        event.created_at,
        traceparent,
    )
    return shared.of(event.command_index, str(event.event_id).encode())


class CommandHeaders:
    """The headers of all events of one command, in which two values differ. Identifiers are text."""

    __slots__ = ("_before", "_behind", "_between")

    def __init__(
        self,
        event_type: str,
        package_id: bytes,
        command_id: bytes,
        command_count: int,
        created_at: int,
        traceparent: str | None = None,
    ) -> None:
        kind, version, type_ = _of_type(event_type)
        self._before = kind, version, ("command_id", command_id)
        self._between = ("command_count", b"%d" % command_count), _CONTENT_TYPE, _SPECVERSION
        self._behind: Headers = [_SOURCE, type_, ("ce_subject", package_id), ("ce_time", _rfc3339(created_at))]
        if traceparent is not None:
            self._behind.append(("traceparent", traceparent.encode()))

    def of(self, command_index: int, event_id: bytes) -> Headers:
        """The headers of one of them."""
        return [
            *self._before,
            ("command_index", b"%d" % command_index),
            *self._between,
            ("ce_id", event_id),
            *self._behind,
        ]


def split_type(event_type: str) -> tuple[str, str]:
    """`v1.file.ingested` → (`file.ingested`, `1`)."""
    version, _, kind = event_type.partition(".")
    return kind, version.removeprefix("v")


@cache
def _of_type(event_type: str) -> tuple[tuple[str, bytes], tuple[str, bytes], tuple[str, bytes]]:
    kind, version = split_type(event_type)
    return ("event_type", kind.encode()), ("event_version", version.encode()), ("ce_type", event_type.encode())


@lru_cache(8)
def _rfc3339(micros: int) -> bytes:
    """As `datetime.isoformat` has it: without a fraction in the whole second. Events of one batch have one time."""
    second, fraction = divmod(micros, 1_000_000)
    return (f"{_whole_second(second)}.{fraction:06}Z" if fraction else f"{_whole_second(second)}Z").encode()


@lru_cache(64)
def _whole_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()
