"""From records to a batch of events; what cannot be read is named by its place in the log."""

from __future__ import annotations

from collections.abc import Iterable

from schemas.batch import EventBatch
from schemas.codec import UndecodableEventError
from services.errors import CorruptError
from services.log.port import Record


def decode_records(records: Iterable[Record]) -> EventBatch:
    """The events in the records. Blocks for some µs an event. Raises CorruptError."""
    events = EventBatch()
    for record in records:
        try:
            events.append(record.value)
        except UndecodableEventError as error:
            raise CorruptError(
                f"the record at offset {record.offset} of partition {record.partition} cannot be read: {error}"
            ) from error
    return events
