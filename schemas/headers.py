"""Kafka record headers, by which a consumer can route, skip or recognise an event without decoding it.

`ce_*` and `content-type` follow CloudEvents 1.0 (Kafka protocol binding, binary mode); the others are this project's.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import islice
from uuid import UUID

from artifact_store.events import Event, PackageCreated, type_with
from schemas.codec import schema_fingerprint
from schemas.digests import event_digest
from schemas.runs import FileRun, commands_of, first_of

CONTENT_TYPE = b"avro/binary"

_SOURCE = "urn:artifact-store:log:"
_SCHEMA = "urn:artifact-store:schema:"


Headers = dict[str, str | bytes | None]
"""Headers by name, in a fixed order. The type is the Kafka client's; the values are always bytes."""


def headers(event: Event, log: UUID, created: PackageCreated | None, traceparent: str | None = None) -> Headers:
    """The headers of the event's record. `traceparent` is in the form of W3C Trace Context. See `headers_all`."""
    return next(headers_all([event], log, created, [traceparent]))


def headers_all(
    events: Sequence[Event], log: UUID, created: PackageCreated | None, traceparents: Sequence[str | None]
) -> Iterator[Headers]:
    """The headers of each event's record. The same mapping is yielded each time, and changes with the next event.

    The events must have one package, one time, and one type in any version. `log` is the log's identity. `created` is
    the payload of the package's creation; None for administrative events, which have no package. `traceparents` has an
    entry for each command.
    """
    shared = first_of(events)
    found: Headers = {
        "event_type": None,
        "event_version": None,
        "command_id": None,
        "command_index": None,
        "command_count": None,
        "content-type": CONTENT_TYPE,
        "ce_specversion": b"1.0",
        "ce_id": None,
        "ce_source": source(log).encode(),
        "ce_type": None,
        "ce_subject": str(shared.package_id).encode(),
        "ce_time": _rfc3339(shared.created_at),
        "ce_dataschema": None,
    }
    if created is not None:
        found["producer"] = created.producer.encode()
        found["subject"] = created.subject.encode()
        found["retention_class"] = created.retention_class.encode()
    digests = iter(events.digests if isinstance(events, FileRun) else map(event_digest, events))
    for command, traceparent in zip(commands_of(events), traceparents, strict=True):
        found |= _of_type(shared.event_type, command.principal)
        found["command_id"] = str(command.command_id).encode()
        found["command_count"] = b"%d" % command.command_count
        found.pop("traceparent", None)
        if traceparent is not None:
            found["traceparent"] = traceparent.encode()
        for index, digest in enumerate(islice(digests, len(command)), command.command_index):
            found["command_index"], found["ce_id"] = b"%d" % index, digest.hex().encode()
            yield found


def source(log: UUID) -> str:
    """The URN of the log with this identity, which distinguishes events of different installations."""
    return f"{_SOURCE}{log}"


def event_version(event_type: str) -> str:
    """`v1.file.ingested` → `1`."""
    return event_type.partition(".")[0].removeprefix("v")


@lru_cache(64)
def dataschema(event_type: str) -> str:
    """The URN of this event type's schema, which ends with its fingerprint in hex."""
    return f"{_SCHEMA}{schema_fingerprint(event_type).hex()}"


@lru_cache(64)
def _of_type(event_type: str, principal: str | None) -> Headers:
    """The headers that follow from the type of an event with this principal. Do not change the cached mapping."""
    event_type = type_with(event_type, principal)
    return {
        "event_type": event_type.encode(),
        "event_version": event_version(event_type).encode(),
        "ce_type": event_type.encode(),
        "ce_dataschema": dataschema(event_type).encode(),
    }


@lru_cache(8)
def _rfc3339(micros: int) -> bytes:
    """As `datetime.isoformat`, without a fraction for a whole second. Cached, because a batch has one time."""
    second, fraction = divmod(micros, 1_000_000)
    return (f"{_whole_second(second)}.{fraction:06}Z" if fraction else f"{_whole_second(second)}Z").encode()


@lru_cache(64)
def _whole_second(second: int) -> str:
    return datetime.fromtimestamp(second, UTC).replace(tzinfo=None).isoformat()
