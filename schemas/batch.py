"""A batch of events as a fold gets them: the events, and what is in them without making an object of every part."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import overload
from uuid import UUID

from artifact_store.canonical import is_jcs_object
from artifact_store.events import AdministrativePayload, Event, FileIngested, PackageCreated
from schemas.codec import UndecodableEventError, decode
from schemas.file_fields import FileFields, fields_of, read_fields

Entry = FileFields | Event
"""An event: of an ingested file the fields, of any other type all of it."""


class EventBatch(Sequence[Event]):
    """Events that were read, in log order. Going over them decodes those of files in full, one at a time; `entries` has
    them at a quarter of the cost.
    """

    __slots__ = ("_packages", "_values", "entries")

    entries: list[Entry]

    def __init__(self, values: Iterable[bytes] = ()) -> None:
        """From record values. Raises UndecodableEventError."""
        self.entries = []
        self._values: list[bytes] = []
        self._packages: dict[bytes, UUID] = {}
        for value in values:
            self.append(value)

    def append(self, value: bytes, key: bytes | None = None) -> Entry:
        """Read one more record value, and keep it unless it is an administrative record, which is no package's.

        Raises UndecodableEventError, after which the batch is as it was. Also when `key`, the record's, is not its
        package's id, and for what no writer writes and nobody could be shown.
        """
        fields = read_fields(value, self._packages)
        entry = entry_of(decode(value)) if fields is None else fields
        if entry.created_at < 0:
            raise UndecodableEventError("its time lies before 1970")
        created = entry.payload if isinstance(entry, Event) and isinstance(entry.payload, PackageCreated) else None
        if created is not None and not is_jcs_object(created.metadata):
            raise UndecodableEventError("its metadata is not a JSON object that has a JCS form")
        # The quick reader keeps packages by their ids as they are written.
        known = key is None or self._packages.get(key) is entry.package_id
        if not known and key != str(entry.package_id).encode():
            raise UndecodableEventError("its key is not its package's id")
        if not (isinstance(entry, Event) and isinstance(entry.payload, AdministrativePayload)):
            self.entries.append(entry)
            self._values.append(value)
        return entry

    def drop_last(self) -> None:
        """Forget what was appended last."""
        del self.entries[-1], self._values[-1]

    def select(self, indexes: Iterable[int]) -> EventBatch:
        """A batch of the events at these indexes, in this order."""
        part = EventBatch()
        for i in indexes:
            part.entries.append(self.entries[i])
            part._values.append(self._values[i])
        return part

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Event]:
        for entry, value in zip(self.entries, self._values, strict=True):
            yield entry if isinstance(entry, Event) else decode(value)

    @overload
    def __getitem__(self, index: int) -> Event: ...
    @overload
    def __getitem__(self, index: slice) -> EventBatch: ...
    def __getitem__(self, index: int | slice) -> Event | EventBatch:
        if isinstance(index, slice):
            return self.select(range(len(self))[index])
        entry = self.entries[index]
        return entry if isinstance(entry, Event) else decode(self._values[index])


def entry_of(event: Event) -> Entry:
    """The event as an entry."""
    return fields_of(event, event.payload) if isinstance(event.payload, FileIngested) else event


def entries_of(events: Sequence[Event]) -> Sequence[Entry]:
    """The events as entries, in their order."""
    return events.entries if isinstance(events, EventBatch) else [entry_of(event) for event in events]
