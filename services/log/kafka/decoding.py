"""From a record to the event in it; what cannot be read is named by its place in the log."""

from __future__ import annotations

from dataclasses import fields

from schemas.codec import UndecodableEventError, decode
from schemas.events import Event
from services.errors import CorruptError
from services.log.port import Record, RecordedEvent
from services.log.position import Position

_FIELDS = tuple(field.name for field in fields(Event))


def event_of(record: Record) -> Event:
    """Raises CorruptError, which names partition and offset."""
    try:
        return decode(record.value)
    except UndecodableEventError as error:
        raise CorruptError(
            f"the record at offset {record.offset} of partition {record.partition} cannot be read: {error}"
        ) from error


def recorded(event: Event, position: Position) -> RecordedEvent:
    """The event with the position behind it."""
    return RecordedEvent(**{name: getattr(event, name) for name in _FIELDS}, position=position)
