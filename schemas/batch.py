"""A batch of events as a fold gets them: the events, and what is in them without making an object of every part.

`v1.file.ingested` is read field by field: nearly every event is one, and objects for each of its parts would take four
times as long. The order of the fields is that of the schema file; a property test holds this to the general codec.
"""

from __future__ import annotations

import struct
from binascii import unhexlify
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple, overload
from uuid import UUID

from artifact_store.canonical import is_jcs_object
from artifact_store.events import FILE_INGESTED, AdministrativePayload, Event, FileIngested, PackageCreated
from schemas.codec import UndecodableEventError, decode, framing


class FileFields(NamedTuple):
    """What a fold needs of a `v1.file.ingested`: its own identifiers are 16 bytes, texts UTF-8, digests 32 bytes."""

    package_id: UUID
    sequence: int
    created_at: int
    file_id: bytes
    relative_path: bytes
    media_type: bytes
    size_bytes: int
    blake3: bytes
    sha256: bytes
    location_id: bytes
    backend_id: bytes
    key: bytes
    offset: int
    length: int
    stored_at: int


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


_UUID = 36 << 1
"""The Avro length of a UUID's text."""

_TYPE = bytes([len(FILE_INGESTED) << 1]) + FILE_INGESTED.encode() + bytes([_UUID])
_FRAMING = framing(FILE_INGESTED) + bytes([_UUID])
"""What a value of this schema begins with, and the length of its first field, event_id."""

_NOT_SHORT = 0x81
"""Bits of a first byte that say: more bytes follow, or the number is negative."""

_ENDS, _END_OF_EIGHT = 0x8080_8080_8080_8081, 0x0080_8080_8080_8080
"""Bits of eight bytes, in little-endian order, that say where a number ends, and of one that has all eight and is not
negative.
"""

_eight_bytes = struct.Struct("<Q").unpack_from
_to_file_id = struct.Struct("B36sBB64xB36s").unpack_from
_to_backend = struct.Struct("32s32sB36sB").unpack_from

_LONGEST = 10
_LONG_VALUES = 1 << 64


def fields_of(event: Event, file: FileIngested) -> FileFields:
    """The fields of an event that was decoded; `file` is its payload."""
    receipt = file.receipt
    return FileFields(
        event.package_id,
        event.sequence,
        event.created_at,
        file.file_id.bytes,
        file.relative_path.encode(),
        file.media_type.encode(),
        file.size_bytes,
        file.blake3,
        file.sha256,
        receipt.location_id.bytes,
        receipt.backend_id.encode(),
        receipt.key.encode(),
        receipt.offset,
        receipt.length,
        receipt.stored_at,
    )


def read_fields(value: bytes, packages: dict[bytes, UUID]) -> FileFields | None:
    """The fields of a record value that is a `v1.file.ingested` in single-object encoding.

    None when anything about it is unusual, or it is another event: then the general codec finds out what it is. Never
    less strict than that codec, also in what no fold needs: whoever asks for the whole event afterwards must get it.
    `packages` keeps package ids by their texts, in lower case, so that all events of one package share one object.
    """
    try:
        return _read(value, packages)
    except (ValueError, IndexError, struct.error):
        return None


def _read(value: bytes, packages: dict[bytes, UUID]) -> FileFields | None:
    # Straight on and without calls where it can be: this runs for every event that is ever folded.
    if value[:11] != _FRAMING or value[47:65] != _TYPE:
        return None
    text = value[65:101]
    package_id = packages.get(text)
    if package_id is None:
        package_id = UUID(text.decode())
        if str(package_id).encode() == text:
            packages[text] = package_id
    sequence, at = _long(value, 101)
    created_at, at = _moment(value, at)
    size = value[at]
    at += 1
    if size & _NOT_SHORT:
        size, at = _size(value, at - 1)
        end = at + size
    else:
        end = at + (size >> 1)
    actor = value[at:end]
    at = end
    # command_id, command_index, command_count, payload_digest, previous_digest, file_id
    command, command_text, index, count, file, file_text = _to_file_id(value, at)
    if command != _UUID:
        return None
    if index < 128 and count < 128:
        at += 140
    else:
        at = _long(value, _long(value, at + 37)[1])[1] + 64
        file, file_text = value[at], value[at + 1 : at + 37]
        at += 37
    if file != _UUID:
        return None
    size = value[at]
    at += 1
    if size & _NOT_SHORT:
        size, at = _size(value, at - 1)
        end = at + size
    else:
        end = at + (size >> 1)
    relative_path = value[at:end]
    size = value[end]
    at = end + 1
    if size & _NOT_SHORT:
        size, at = _size(value, end)
        end = at + size
    else:
        end = at + (size >> 1)
    media_type = value[at:end]
    size_bytes, at = _long(value, end)
    size_text = value[end:at]
    blake3, sha256, location, location_text, size = _to_backend(value, at)
    if location != _UUID:
        return None
    at += 102
    if size & _NOT_SHORT:
        size, at = _size(value, at - 1)
        end = at + size
    else:
        end = at + (size >> 1)
    backend_id = value[at:end]
    size = value[end]
    at = end + 1
    if size & _NOT_SHORT:
        size, at = _size(value, end)
        end = at + size
    else:
        end = at + (size >> 1)
    key = value[at:end]
    offset = value[end]
    if offset & _NOT_SHORT:
        offset, at = _long(value, end)
    else:
        offset >>= 1
        at = end + 1
    end = at + len(size_text)
    if value[at:end] == size_text:  # a blob that is the whole of the file, as nearly all are
        length = size_bytes
    else:
        length, end = _long(value, at)
    stored_at, at = _moment(value, end)
    file_id, location_id = unhexlify(file_text.replace(b"-", b"")), unhexlify(location_text.replace(b"-", b""))
    event_id, command_id = unhexlify(value[11:47].replace(b"-", b"")), unhexlify(command_text.replace(b"-", b""))
    if at != len(value) or not len(file_id) == len(location_id) == len(event_id) == len(command_id) == 16:
        return None
    texts = actor + relative_path + media_type + backend_id + key
    if 0 in texts:  # a NUL
        return None
    if not texts.isascii():
        for part in (actor, relative_path, media_type, backend_id, key):
            part.decode()
    return _new(
        FileFields,
        (
            package_id,
            sequence,
            created_at,
            file_id,
            relative_path,
            media_type,
            size_bytes,
            blake3,
            sha256,
            location_id,
            backend_id,
            key,
            offset,
            length,
            stored_at,
        ),
    )


_new = tuple.__new__  # what a named tuple's own constructor calls, at half its cost


def _moment(value: bytes, at: int) -> tuple[int, int]:
    """As `_long`; quicker for eight bytes, which a time in µs has from 1978 to 3111."""
    try:
        (number,) = _eight_bytes(value, at)
    except struct.error:  # there are fewer up to the end
        return _long(value, at)
    if number & _ENDS != _END_OF_EIGHT:
        return _long(value, at)
    # Seven bits of each byte, put together by twos, fours and eights.
    number = number & 0x007F_007F_007F_007F | (number & 0x7F00_7F00_7F00_7F00) >> 1
    number = number & 0x0000_3FFF_0000_3FFF | (number & 0x3FFF_0000_3FFF_0000) >> 2
    return (number & 0x0FFF_FFFF | (number & 0x0FFF_FFFF_0000_0000) >> 4) >> 1, at + 8


def _size(value: bytes, at: int) -> tuple[int, int]:
    """The length of a text, and where the text begins. Raises ValueError for one that is negative."""
    size, at = _long(value, at)
    if size < 0:
        raise ValueError("a length is negative")
    return size, at


def _long(value: bytes, at: int) -> tuple[int, int]:
    """The number there, and where it ends (Avro 1.12 specification, "Primitive Types"). Raises ValueError."""
    byte = value[at]
    at += 1
    number = byte & 0x7F
    shift = 7
    while byte > 0x7F:
        byte = value[at]
        at += 1
        number |= (byte & 0x7F) << shift
        shift += 7
    if shift > 63 and (shift > 7 * _LONGEST or number >= _LONG_VALUES):
        raise ValueError("a number is no Avro long")
    return (~(number >> 1) if number & 1 else number >> 1), at
