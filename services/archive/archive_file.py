"""The archive's format: a header, blocks of records and of blobs, a footer (docs/log-archive.md).

    file    = MAGIC block* trailer
    block   = kind (1 byte) | stored length | plain length (both u32, little-endian) | Zstandard frame | digest
    digest  = BLAKE3 of the digest before it (32 zero bytes at first), the block's first 9 bytes and the frame
    trailer = where the footer begins (u64, little-endian) | END

Each block is an array or map in CBOR. The chain of digests ends in the footer's, which is the digest of the archive: it
proves every byte before it. Partitions follow one another, and a reader that merges them by time keeps one block of
each in memory.
"""

from __future__ import annotations

import fcntl
import os
import sys
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from struct import Struct
from types import TracebackType
from typing import Any, BinaryIO, NamedTuple, Self, TypeVar
from uuid import UUID

import cbor2
from blake3 import blake3

from artifact_store.errors import ConflictError, CorruptError
from artifact_store.user_files import sync_folder
from services.runtime.file_system import PRIVATE_FILE

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

MAGIC = b"\x89ASLOG\r\n\x1a\n"
END = b"ASLOGEND"
FORMAT = 1

BLOCK_BYTES = 256 * 1024
"""A block is written once it holds this many bytes."""

_MOST_BYTES = 16 << 20
"""Maximum size of a block: a reader refuses a larger one before it allocates memory for it."""

_LEVEL = 3
_HEAD = Struct("<cII")
_TRAILER = Struct("<Q8s")
_DIGEST_BYTES = 32
_START = bytes(_DIGEST_BYTES)

_HEADER, _RECORDS, _BLOBS, _FOOTER = b"H", b"R", b"B", b"F"

_Item = TypeVar("_Item")


class ArchivedRecord(NamedTuple):
    """One event as it was in the archived log. `time` is the event's, in µs since 1970."""

    partition: int
    offset: int
    time: int
    key: bytes
    value: bytes
    headers: Sequence[tuple[str, str | bytes | None]]


class BlobPiece(NamedTuple):
    """Some bytes of the blob with this BLAKE3 digest. The whole blob has `length` bytes; these begin at `start`."""

    digest: bytes
    length: int
    start: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive blocks of one kind: the records of one partition, or the pieces of all blobs."""

    offset: int
    """Where the first block begins."""
    before: bytes
    """The chain's digest before the first block."""
    count: int = 0
    """The number of records, or of pieces of blobs."""

    def extended(self, more: int) -> Section:
        """The section after one further block, which has `more` records or pieces."""
        return Section(self.offset, self.before, self.count + more)


@dataclass(slots=True)
class Contents:
    """What an archive holds, from its header and footer."""

    log: UUID
    partitions: int
    end: Mapping[int, int]
    """The end of the archived log when it was exported, by partition."""
    packages: Sequence[UUID] | None = None
    """The requested packages; None for a whole log."""
    backend: str | None = None
    """The storage backend that the blobs come from; None for an archive without blobs."""
    schemas: Mapping[bytes, tuple[str, int]] = field(default_factory=dict)
    """The schemas of the records by fingerprint: the event type, and the number of records with it."""
    sections: dict[int, Section] = field(default_factory=dict)
    blobs: Section | None = None
    events: int = 0
    package_count: int = 0
    blob_count: int = 0
    blob_bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)
    """How many records of the log were left out, by reason: `skipped`, `repeated`, `administrative`."""
    digest: bytes = b""
    """The digest of the archive, which proves all of it."""

    def as_json(self) -> dict[str, Any]:
        """The contents as JSON, for programs and people."""
        return {
            "log": str(self.log),
            "partitions": self.partitions,
            "events": self.events,
            "packages": self.package_count,
            "only_packages": None if self.packages is None else [str(package) for package in self.packages],
            "blobs": self.blob_count if self.backend is not None else None,
            "blob_bytes": self.blob_bytes if self.backend is not None else None,
            "left_out": self.left_out,
            "digest": self.digest.hex(),
        }


class ArchiveWriter:
    """Writes an archive. The file gets its name only in `finish`. Memory is bounded by a block. Blocks the thread. As a
    context manager it removes an unfinished file.
    """

    def __init__(self, path: Path, contents: Contents, schemas: Mapping[bytes, str]) -> None:
        """`schemas`: the Avro schemas by fingerprint, for those who read the archive years later.

        Raises ConflictError if a file of this name exists, and OSError.
        """
        if path.exists():
            raise ConflictError(f"{path} exists: name another file, or remove it")
        self._path = path
        self._draft = path.with_name(f"{path.name}.part")
        self._contents = contents
        self._file: BinaryIO = os.fdopen(
            os.open(self._draft, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, PRIVATE_FILE), "wb"
        )
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise ConflictError(f"another export is writing {self._draft}") from None
        self._file.truncate(0)  # left by a killed export
        os.fchmod(self._file.fileno(), PRIVATE_FILE)
        self._at = self._file.write(MAGIC)
        self._digest = _START
        self._records: list[ArchivedRecord] = []
        self._pieces: list[BlobPiece] = []
        self._held = 0
        header = {
            "format": FORMAT,
            "log": contents.log.bytes,
            "partitions": contents.partitions,
            "end": dict(contents.end),
            "packages": None if contents.packages is None else [package.bytes for package in contents.packages],
            "backend": contents.backend,
            "schemas": dict(schemas),
        }
        self._write(_HEADER, header)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        with suppress(FileNotFoundError):
            self._draft.unlink()
        self._file.close()

    def add(self, record: ArchivedRecord) -> None:
        """Add a record. The records of one partition must follow one another, in its order."""
        if self._records and self._records[0].partition != record.partition:
            self._flush()
        self._records.append(record)
        self._contents.events += 1
        self._held += len(record.value) + len(record.key)
        if self._held >= BLOCK_BYTES:
            self._flush()

    def add_piece(self, piece: BlobPiece) -> None:
        """Add a piece of a blob, after all records. The pieces of a blob must follow one another, in order."""
        if self._records:
            self._flush()
        if piece.start == 0:
            self._contents.blob_count += 1
            self._contents.blob_bytes += piece.length
        self._pieces.append(piece)
        self._held += len(piece.data)
        if self._held >= BLOCK_BYTES:
            self._flush()

    def finish(self) -> Contents:
        """Write the footer, make the file durable and give it its name. Raises ConflictError, OSError."""
        self._flush()
        contents = self._contents
        footer = {
            "sections": {p: _packed(section) for p, section in contents.sections.items()},
            "blobs": None if contents.blobs is None else _packed(contents.blobs),
            "events": contents.events,
            "packages": contents.package_count,
            "blob_count": contents.blob_count,
            "blob_bytes": contents.blob_bytes,
            "schemas": {mark: list(about) for mark, about in contents.schemas.items()},
            "left_out": contents.left_out,
        }
        footer_at = self._at
        self._write(_FOOTER, footer)
        contents.digest = self._digest
        self._file.write(_TRAILER.pack(footer_at, END))
        self._file.flush()
        os.fsync(self._file.fileno())
        try:
            os.link(self._draft, self._path)  # unlike a rename, it replaces nothing
        except FileExistsError:
            raise ConflictError(f"{self._path} exists: name another file, or remove it") from None
        sync_folder(self._path.parent)
        return contents

    def _flush(self) -> None:
        contents = self._contents
        if self._records:
            partition = self._records[0].partition
            section = contents.sections.get(partition) or Section(self._at, self._digest)
            contents.sections[partition] = section.extended(len(self._records))
            self._write(_RECORDS, _packed_records(self._records))
        if self._pieces:
            section = contents.blobs or Section(self._at, self._digest)
            contents.blobs = section.extended(len(self._pieces))
            self._write(_BLOBS, [list(piece) for piece in self._pieces])
        self._records, self._pieces, self._held = [], [], 0

    def _write(self, kind: bytes, value: object) -> None:
        plain = cbor2.dumps(value)
        stored = zstd.compress(plain, _LEVEL)
        head = _HEAD.pack(kind, len(stored), len(plain))
        self._digest = _chained(self._digest, head, stored)
        self._file.write(head + stored + self._digest)
        self._at += len(head) + len(stored) + len(self._digest)


class Archive:
    """An archive that is open for reading: a context manager. Memory is bounded by a block. Blocks the thread.

    Raises CorruptError if bytes differ from those that were written, and OSError.
    """

    def __init__(self, path: Path) -> None:
        """Reads header and footer."""
        self.path = path
        self._file: BinaryIO = path.open("rb")
        try:
            self.contents, self._first = self._open()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            self._file.close()
            raise CorruptError(f"{path} is damaged: its header or footer cannot be understood") from error
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()

    def prove(self) -> Iterator[list[ArchivedRecord] | list[BlobPiece]]:
        """Every block in order, proved by the chain of digests up to the footer.

        Header and footer are proved only after all blocks were read. If they are damaged, CorruptError comes then.
        """
        digest, at = self._first
        contents = self.contents
        sections: dict[int, Section] = {}
        blobs: Section | None = None
        while True:
            before, place = digest, at
            kind, value, digest, at = self._block(at, digest)
            if kind == _FOOTER:
                break
            if kind == _RECORDS:
                records = self._read_records(value, place)
                partition = records[0].partition
                section = sections.get(partition) or Section(place, before)
                sections[partition] = section.extended(len(records))
                yield records
            elif kind == _BLOBS:
                pieces = self._read_pieces(value, place)
                blobs = (blobs or Section(place, before)).extended(len(pieces))
                yield pieces
            else:
                raise self._damaged(place, "has a kind that this release does not know")
        if digest != contents.digest or sections != contents.sections or blobs != contents.blobs:
            raise CorruptError(f"{self.path} is damaged: its footer is not that of its blocks")

    def records(self, partition: int) -> Generator[ArchivedRecord]:
        """The records of one partition in order. Readers of several partitions may take turns."""
        yield from self._items(self.contents.sections[partition], self._read_records)

    def pieces(self) -> Generator[BlobPiece]:
        """The pieces of all blobs in order."""
        if self.contents.blobs is not None:
            yield from self._items(self.contents.blobs, self._read_pieces)

    def _items(self, section: Section, read: Callable[[Any, int], list[_Item]]) -> Iterator[_Item]:
        at, digest, left = section.offset, section.before, section.count
        while left > 0:
            place = at
            _, value, digest, at = self._block(at, digest)
            found = read(value, place)
            left -= len(found)
            yield from found

    def _open(self) -> tuple[Contents, tuple[bytes, int]]:
        """The contents, and where the blocks after the header begin."""
        if self._file.read(len(MAGIC)) != MAGIC:
            raise CorruptError(f"{self.path} is no archive of a log")
        self._file.seek(0, os.SEEK_END)
        size = self._file.tell()
        self._file.seek(max(0, size - _TRAILER.size))
        tail = self._file.read(_TRAILER.size)
        if len(tail) < _TRAILER.size or (trailer := _TRAILER.unpack(tail))[1] != END:
            raise CorruptError(f"{self.path} is cut off: it does not end as an archive does")
        kind, header, digest, at = self._block(len(MAGIC), _START)
        if kind != _HEADER:
            raise self._damaged(len(MAGIC), "is no header")
        if header.get("format") != FORMAT:
            raise CorruptError(
                f"{self.path} has format {header.get('format')}, this release reads {FORMAT}: use a newer release"
            )
        if trailer[0] >= size:
            raise CorruptError(f"{self.path} is damaged: its last bytes point to a place outside it")
        kind, footer, last, _ = self._block(trailer[0], None)
        if kind != _FOOTER:
            raise self._damaged(trailer[0], "is no footer")
        packages = header["packages"]
        contents = Contents(
            log=UUID(bytes=header["log"]),
            partitions=header["partitions"],
            end=header["end"],
            packages=None if packages is None else [UUID(bytes=package) for package in packages],
            backend=header["backend"],
            schemas={mark: (about[0], about[1]) for mark, about in footer["schemas"].items()},
            sections={p: Section(*section) for p, section in footer["sections"].items()},
            blobs=None if footer["blobs"] is None else Section(*footer["blobs"]),
            events=footer["events"],
            package_count=footer["packages"],
            blob_count=footer["blob_count"],
            blob_bytes=footer["blob_bytes"],
            left_out=footer["left_out"],
            digest=last,
        )
        sections = [*contents.sections.values(), *([] if contents.blobs is None else [contents.blobs])]
        numbers = [contents.partitions, *contents.end, *contents.end.values(), *contents.sections]
        numbers += [number for section in sections for number in (section.offset, section.count)]
        numbers += [count for _, count in contents.schemas.values()]
        marks = [*contents.schemas, *(section.before for section in sections)]
        if not all(map(_is_number, numbers)) or not all(type(mark) is bytes for mark in marks):
            raise ValueError("a value has another type")
        return contents, (digest, at)

    def _block(self, at: int, before: bytes | None) -> tuple[bytes, Any, bytes, int]:
        """Kind, value and digest of the block, and where the next begins. With `before` None the digest is not
        checked."""
        self._file.seek(at)
        head = self._file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise self._damaged(at, "is cut off")
        kind, stored_bytes, plain_bytes = _HEAD.unpack(head)
        if max(stored_bytes, plain_bytes) > _MOST_BYTES:
            raise self._damaged(at, "claims to be larger than any block may be")
        stored = self._file.read(stored_bytes)
        digest = self._file.read(_DIGEST_BYTES)
        if before is not None and _chained(before, head, stored) != digest:
            raise self._damaged(at, "does not have the digest that the chain gives it")
        try:
            plain = zstd.ZstdDecompressor().decompress(stored, plain_bytes)
            if len(plain) != plain_bytes:
                raise ValueError("another length")
            value = cbor2.loads(plain)
        except (zstd.ZstdError, EOFError, ValueError, TypeError, RecursionError, cbor2.CBORDecodeError) as error:
            raise self._damaged(at, "cannot be read") from error
        return kind, value, digest, at + _HEAD.size + stored_bytes + _DIGEST_BYTES

    def _read_records(self, value: Any, at: int) -> list[ArchivedRecord]:
        try:
            partition, shapes, rows = value
            found = [
                ArchivedRecord(partition, offset, time, key, record, tuple(zip(shapes[shape], texts, strict=True)))
                for offset, time, key, record, shape, texts in rows
            ]
        except (ValueError, TypeError, IndexError) as error:
            raise self._damaged(at, "holds no records") from error
        if not found or not all(map(_is_record, found)):
            raise self._damaged(at, "holds no records")
        return found

    def _read_pieces(self, value: Any, at: int) -> list[BlobPiece]:
        try:
            found = [BlobPiece(*piece) for piece in value]
        except TypeError as error:
            raise self._damaged(at, "holds no pieces of blobs") from error
        if not found or not all(map(_is_piece, found)):
            raise self._damaged(at, "holds no pieces of blobs")
        return found

    def _damaged(self, at: int, what: str) -> CorruptError:
        return CorruptError(f"{self.path} is damaged: the block at byte {at} {what}")


def _is_number(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _is_record(record: ArchivedRecord) -> bool:
    return (
        _is_number(record.partition)
        and _is_number(record.offset)
        and _is_number(record.time)
        and type(record.key) is bytes
        and type(record.value) is bytes
        and all(type(name) is str and (value is None or type(value) is bytes) for name, value in record.headers)
    )


def _is_piece(piece: BlobPiece) -> bool:
    numbers = _is_number(piece.length) and _is_number(piece.start)
    return numbers and type(piece.digest) is bytes and len(piece.digest) == _DIGEST_BYTES and type(piece.data) is bytes


def _chained(before: bytes, head: bytes, stored: bytes) -> bytes:
    return blake3(before + head + stored).digest()


def _packed(section: Section) -> list[object]:
    return [section.offset, section.before, section.count]


def _packed_records(records: Sequence[ArchivedRecord]) -> list[object]:
    """Records of one partition. Those whose headers have the same names share the list of names."""
    shapes: dict[tuple[str, ...], int] = {}
    rows = []
    for record in records:
        shape = shapes.setdefault(tuple(name for name, _ in record.headers), len(shapes))
        values = [value for _, value in record.headers]
        rows.append([record.offset, record.time, record.key, record.value, shape, values])
    return [records[0].partition, [list(names) for names in shapes], rows]
