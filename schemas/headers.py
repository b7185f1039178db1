"""Kafka record headers, by which a consumer can route, skip or recognise an event without decoding it.

`ce_*` and `content-type` are CloudEvents 1.0, Kafka protocol binding, binary mode; the rest are this project's own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice

from artifact_store.events import Event
from schemas.runs import FileRun, commands_of, first_of

CONTENT_TYPE = b"avro/binary"
SOURCE = b"artifact-store"


Headers = dict[str, str | bytes | None]
"""By name, in a fixed order; typed as the Kafka client has them, the values are bytes."""


def headers(event: Event, traceparent: str | None = None) -> Headers:
    """The headers of the event's record; `traceparent` as W3C Trace Context has it."""
    return next(headers_all([event], [traceparent]))


def headers_all(events: Sequence[Event], traceparents: Sequence[str | None]) -> Iterator[Headers]:
    """The headers of each event's record: one mapping, which changes with the next event. A trace for each command.

    The events are of one type, package and time.
    """
    shared = first_of(events)
    kind, version = split_type(shared.event_type)
    found: Headers = {
        "event_type": kind.encode(),
        "event_version": version.encode(),
        "command_id": None,
        "command_index": None,
        "command_count": None,
        "content-type": CONTENT_TYPE,
        "ce_specversion": b"1.0",
        "ce_id": None,
        "ce_source": SOURCE,
        "ce_type": shared.event_type.encode(),
        "ce_subject": str(shared.package_id).encode(),
        "ce_time": _rfc3339(shared.created_at),
    }
    event_ids = iter(events.event_ids if isinstance(events, FileRun) else [str(e.event_id).encode() for e in events])
    for command, traceparent in zip(commands_of(events), traceparents, strict=True):
        found["command_id"] = str(command.command_id).encode()
        found["command_count"] = b"%d" % command.command_count
        found.pop("traceparent", None)
        if traceparent is not None:
            found["traceparent"] = traceparent.encode()
        for index, event_id in enumerate(islice(event_ids, len(command)), command.command_index):
            found["command_index"], found["ce_id"] = b"%d" % index, event_id
            yield found


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
