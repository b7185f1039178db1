"""Tar archives (POSIX.1-2017 pax, "pax Interchange Format"): read strictly while they stream, and written plainly.

The reader takes ustar, pax and GNU long names (POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar
Format"): regular files and folders, and nothing that two readers could understand differently. It refuses everything
else with the entry's number and name. `tarfile` is not suitable: it follows links, unpacks sparse files, continues
after damage, and accepts a truncated archive as complete.
"""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Iterator, Sequence
from dataclasses import dataclass

from artifact_store.archives.bundle import Bundle, Group, SmallFile, StreamedFile
from artifact_store.errors import DuplicateRelativePathError, InvalidArchiveError, InvalidPathError, TooLargeError
from artifact_store.media_types import guess_media_type
from artifact_store.rules import check_path

BLOCK = 512
ZERO_BLOCK = bytes(BLOCK)

OCTAL_LIMIT = 8 << 30
"""Sizes from here on do not fit into the header's twelve octal digits."""

_FIELDS = struct.Struct("100s 24x 12s 12x 8s c 100x 8s 80x 155s 12x")
_USTAR = b"ustar\x00"
_GNU = b"ustar  \x00"
_MAX_SHOWN = 200

END = bytes(2 * BLOCK)
"""The end of an archive."""

_NAME_BYTES = 100

MAX_EXTENSION_BYTES = 64 * 1024
"""The most bytes of one extension header, with names and attributes."""

MAX_TRAILING_BYTES = 1 << 20
"""The most bytes of zeros after an archive's end. Writers pad their last record, usually to 10 KiB."""

_FILES = frozenset({b"0", b"\0", b"7"})

_FOLDER = b"5"

_REFUSED = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"3": "a character device",
    b"4": "a block device",
    b"6": "a pipe",
    b"D": "a folder's listing (GNU dump)",
    b"K": "a long link name",
    b"M": "a continuation from another volume",
    b"S": "a sparse file",
    b"V": "a volume label",
}

_MAX_GLOBAL_HEADERS = 16

FED_BYTES = 512 * 1024
"""About this many bytes of an archive are parsed at a time, in a thread."""


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of a header that are used: the name with its prefix, the size in bytes, the kind of entry."""

    name: bytes
    size: int
    kind: bytes


def parse_header(block: bytes, number: int) -> Header:
    """Parse a header; `number` is the entry's, for messages. Raises InvalidArchiveError."""
    name, size, checksum, kind, magic, prefix = _FIELDS.unpack(block)
    name = name.partition(b"\0")[0]
    # The checksum treats its own field as blanks (POSIX.1-2017 pax, "ustar Interchange Format").
    if number_of(checksum) != sum(block) - sum(checksum) + 8 * 0x20:
        raise InvalidArchiveError(
            f"entry {number} has a header with a wrong checksum: this is not a tar archive, or it is damaged"
        )
    if magic.startswith(_USTAR):
        if prefix[0]:
            name = prefix.partition(b"\0")[0] + b"/" + name
    elif magic != _GNU and magic.strip(b"\0"):
        raise InvalidArchiveError(f"entry {number} has a header of an unknown format {magic!r}")
    found = number_of(size)
    if found is None:
        raise InvalidArchiveError(f"entry {number}, {shown(name.decode('utf-8', 'backslashreplace'))}, has no size")
    return Header(name, found, kind)


def number_of(field: bytes) -> int | None:
    """The number in a field: octal digits, or binary with the highest bit set (GNU); None for anything else."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not digits.isdigit():  # which also has no sign and no underscore in it
        return None
    try:
        return int(digits, 8)
    except ValueError:
        return None


def parse_pax(body: bytes, number: int) -> list[tuple[str, bytes]]:
    """The records `LENGTH KEY=VALUE\\n` of a pax header. Raises InvalidArchiveError."""
    found: list[tuple[str, bytes]] = []
    at = 0
    while at < len(body):
        blank = body.find(b" ", at, at + 8)
        digits = body[at:blank] if blank > 0 else b""
        end = at + int(digits) if digits.isdigit() else 0
        key, equals, value = body[blank + 1 : end - 1].partition(b"=")
        if end <= blank or end > len(body) or body[end - 1 : end] != b"\n" or not equals or not key:
            raise InvalidArchiveError(f"entry {number} has a pax header that is malformed")
        found.append((key.decode("utf-8", "backslashreplace"), value))
        at = end
    return found


def _tail(kind: bytes) -> tuple[bytes, int]:
    tail = (kind + bytes(100) + _USTAR + b"00").ljust(BLOCK - _AT_KIND, b"\0")
    return tail, sum(tail)


_AT_KIND = 156
_TAILS = {kind: _tail(kind) for kind in (b"0", b"x")}
"""What stands in a header from the entry's kind on, and its sum."""


def file_header(name: bytes, size: int, modified: int) -> bytes:
    """The header of a regular file whose name has at most 100 bytes and whose size is below 8 GiB."""
    return _header(name, size, modified, b"0")


def pax_header(records: dict[str, str]) -> bytes:
    """A pax header for the entry that follows, padded to whole blocks."""
    body = b"".join(_pax_record(key, value) for key, value in records.items())
    return _header(b"PaxHeaders/entry", len(body), 0, b"x") + body + bytes(-len(body) % BLOCK)


def _header(name: bytes, size: int, modified: int, kind: bytes) -> bytes:
    head = b"%s0000644\x000000000\x000000000\x00%011o\x00%011o\x00" % (name.ljust(100, b"\0"), size, modified)
    tail, sum_of_tail = _TAILS[kind]
    return b"%s%06o\x00 %s" % (head, sum(head) + sum_of_tail + 8 * 0x20, tail)


def _pax_record(key: str, value: str) -> bytes:
    text = f" {key}={value}\n".encode()
    length = len(text)
    while (total := len(text) + len(str(length))) != length:
        length = total
    return str(length).encode() + text


def shown(name: str) -> str:
    """The name of an entry for a message: escaped and bounded."""
    text = ascii(name) if not name.isprintable() else f"'{name}'"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "…"


def entry_header(relative_path: str, size_bytes: int, modified: int = 0) -> bytes:
    """The headers before a file's bytes; `modified` is in seconds since 1970."""
    name = relative_path.encode()
    records = {}
    if len(name) > _NAME_BYTES:
        records["path"] = relative_path
        name = b"long-name"
    if size_bytes >= OCTAL_LIMIT:
        records["size"] = str(size_bytes)
    extension = pax_header(records) if records else b""
    return extension + file_header(name, 0 if "size" in records else size_bytes, modified)


def padding(size_bytes: int) -> bytes:
    """The padding after a file's bytes."""
    return bytes(-size_bytes % BLOCK)


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """The limits of an archive: its files, and as many folders; the bytes of one file; the bytes of a small file."""

    max_files: int
    max_file_bytes: int
    whole_bytes: int


@dataclass(frozen=True, slots=True)
class WholeEntry:
    """A small file with all its bytes."""

    relative_path: str
    data: bytes


@dataclass(frozen=True, slots=True)
class EntryBegin:
    """A larger file begins; its `size_bytes` bytes follow as pieces, before anything else."""

    relative_path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EntryPiece:
    """The next bytes of the file that has begun."""

    data: bytes


Found = WholeEntry | EntryBegin | EntryPiece


@dataclass(slots=True)
class _Extension:
    """The values of extension headers for the next entry."""

    path: str | None = None
    size: int | None = None
    count: int = 0


class TarReader:
    """Reads one archive: `feed` it the bytes in order, then `close`. For one thread at a time. Holds one small file."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self._limits = limits
        self._rest = b""
        self._skip = 0
        self._streaming = 0
        self._padding = 0
        self._number = 0
        self._folders = 0
        self._globals = 0
        self._seen: set[str] = set()
        self._extension = _Extension()
        self._zeros = 0
        self._trailing = 0

    @property
    def files(self) -> int:
        """The number of files found so far."""
        return len(self._seen)

    def feed(self, data: bytes) -> list[Found]:
        """Take the next bytes, and return what they complete.

        Raises:
            InvalidArchiveError: the archive is malformed, or has something other than files and folders.
            InvalidPathError, DuplicateRelativePathError: a file's path. TooLargeError: a limit.
        """
        return list(self._parse(data))

    def close(self) -> None:
        """End the archive. Raises InvalidArchiveError: it was cut off."""
        if self._zeros < 2:
            where = f"in entry {self._number}" if self._number and self._unfinished else "before its end marker"
            raise InvalidArchiveError(f"the archive is cut off {where}")

    @property
    def _unfinished(self) -> bool:
        return bool(self._rest or self._skip or self._streaming)

    def _parse(self, data: bytes) -> Iterator[Found]:
        buffer = self._rest + data if self._rest else data
        at, end = 0, len(buffer)
        while True:
            if self._streaming:
                take = min(self._streaming, end - at)
                if take:
                    yield EntryPiece(buffer[at : at + take])
                at += take
                self._streaming -= take
                if self._streaming:
                    break
                self._skip, self._padding = self._padding, 0
            if self._skip:
                take = min(self._skip, end - at)
                at += take
                self._skip -= take
                if self._skip:
                    break
            if self._zeros >= 2:
                self._check_trailing(buffer[at:])
                at = end
                break
            if end - at < BLOCK:
                break
            block = buffer[at : at + BLOCK]
            if block == ZERO_BLOCK:
                self._end_block()
                at += BLOCK
                continue
            if self._zeros:
                raise InvalidArchiveError(f"after entry {self._number}, something follows a block of zeros")
            header = parse_header(block, self._number + 1)
            body = at + BLOCK
            size = header.size
            if header.kind in (b"x", b"g", b"L"):
                if size > MAX_EXTENSION_BYTES:
                    raise self._wrong(header, f"an extension header of {size:,} bytes")
                if end - body < size + -size % BLOCK:
                    break
                self._extend(header, buffer[body : body + size])
                at = body + size + -size % BLOCK
                continue
            path, size = self._admit(header)
            if path is None:
                at = body
                continue
            padding = -size % BLOCK
            if size > self._limits.whole_bytes:
                yield EntryBegin(path, size)
                self._streaming, self._padding = size, padding
                at = body
                self._accepted(path)
                continue
            if end - body < size + padding:
                break
            yield WholeEntry(path, buffer[body : body + size])
            self._accepted(path)
            at = body + size + padding
        self._rest = buffer[at:]

    def _accepted(self, path: str | None) -> None:
        self._number += 1
        self._extension = _Extension()
        if path is not None:
            self._seen.add(path)

    def _end_block(self) -> None:
        if self._extension.count:
            raise InvalidArchiveError(f"after entry {self._number}, the archive ends with an extension header")
        self._zeros += 1

    def _check_trailing(self, trailing: bytes) -> None:
        if trailing.strip(b"\0"):
            raise InvalidArchiveError("bytes follow the archive's end")
        self._trailing += len(trailing)
        if self._trailing > MAX_TRAILING_BYTES:
            raise TooLargeError(f"more than {MAX_TRAILING_BYTES:,} bytes of zeros follow the archive's end")

    def _extend(self, header: Header, body: bytes) -> None:
        extension = self._extension
        extension.count += 1
        if extension.count > 2:
            raise self._wrong(header, "more than two extension headers in a row")
        if header.kind == b"L":
            if extension.path is not None:
                raise self._wrong(header, "two long names")
            extension.path = self._text(header, body.partition(b"\0")[0])
            return
        records = parse_pax(body, self._number + 1)
        for key, value in records:
            if key.startswith("GNU.sparse"):
                raise self._wrong(header, "a sparse file")
            if key == "hdrcharset" and value != b"ISO-IR 10646 2000 UTF-8":
                raise self._wrong(header, "names that are not UTF-8 (hdrcharset)")
            if key not in ("path", "size"):
                continue
            if header.kind == b"g":
                raise self._wrong(header, f"a global header that names a {key}")
            if key == "path":
                if extension.path is not None:
                    raise self._wrong(header, "two long names")
                extension.path = self._text(header, value)
            else:
                if extension.size is not None or not value.isdigit() or len(value) > 19:
                    raise self._wrong(header, "a pax size that is no number, or two of them")
                extension.size = int(value)
        if header.kind == b"g":
            extension.count -= 1
            self._globals += 1
            if self._globals > _MAX_GLOBAL_HEADERS:
                raise self._wrong(header, "one global header too many")

    def _admit(self, header: Header) -> tuple[str | None, int]:
        """Path and size of a file. A folder has no path here and is skipped."""
        extension = self._extension
        raw = header.name if extension.path is None else extension.path
        name = raw if isinstance(raw, str) else self._text(header, raw)
        if header.kind not in _FILES and header.kind != _FOLDER:
            what = _REFUSED.get(header.kind, f"of an unknown kind {header.kind!r}")
            raise InvalidArchiveError(f"{self._where(name)} is {what}; only files and folders are accepted")
        size = self._size(header, name)
        path = name
        while path.startswith("./"):
            path = path[2:]
        if header.kind == _FOLDER or path.endswith("/"):
            self._admit_folder(path.removesuffix("/"), size, name)
            return None, 0
        self._check(path, name)
        if path in self._seen:
            raise DuplicateRelativePathError(f"{self._where(name)} is in the archive twice")
        if len(self._seen) == self._limits.max_files:
            raise TooLargeError(
                f"{self._where(name)} is one file too many: an archive may hold {self._limits.max_files:,}"
            )
        if size > self._limits.max_file_bytes:
            raise TooLargeError(f"{self._where(name)} has {size:,} bytes; the limit is {self._limits.max_file_bytes:,}")
        return path, size

    def _where(self, name: str) -> str:
        return f"entry {self._number + 1}, {shown(name)}"

    def _admit_folder(self, path: str, size: int, name: str) -> None:
        if size:
            raise InvalidArchiveError(f"{self._where(name)} is a folder, but has {size:,} bytes")
        if path not in ("", "."):
            self._check(path, name)
        if self._folders == self._limits.max_files:
            raise TooLargeError(
                f"{self._where(name)} is one folder too many: an archive may hold {self._limits.max_files:,}"
            )
        self._folders += 1
        self._accepted(None)

    def _check(self, path: str, name: str) -> None:
        try:
            check_path(path)
        except InvalidPathError as error:
            raise InvalidPathError(f"{self._where(name)}: {error.detail}") from None

    def _size(self, header: Header, name: str) -> int:
        """The size on which all readers agree: a pax size counts only if the header's field cannot hold it."""
        said = self._extension.size
        if said is None or said == header.size:
            return header.size
        if header.size == 0 and said >= OCTAL_LIMIT:
            return said
        raise InvalidArchiveError(
            f"{self._where(name)} has {header.size:,} bytes by its header, but {said:,} by its pax header"
        )

    def _text(self, header: Header, raw: bytes) -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            name = shown(raw.decode("utf-8", "backslashreplace"))
            raise InvalidArchiveError(f"entry {self._number + 1}, {name}, has a name that is not UTF-8") from None

    def _wrong(self, header: Header, what: str) -> InvalidArchiveError:
        name = shown(header.name.decode("utf-8", "backslashreplace"))
        return InvalidArchiveError(f"entry {self._number + 1}, {name}, has {what}")


async def entries_of(reader: TarReader, body: AsyncIterable[bytes]) -> AsyncIterator[Group]:
    """The files of the archive in `body`, with media types guessed from their names.

    Iterating raises whatever `TarReader` and reading the body raise.
    """
    steps = _steps(reader, body)
    group: list[SmallFile] = []
    async for found in steps:
        rest = list(reversed(found))
        while rest:
            match rest.pop():
                case WholeEntry(path, data):
                    group.append(SmallFile(path, guess_media_type(path), data))
                case EntryBegin(path, size):
                    if group:
                        yield group
                        group = []
                    pieces = _pieces(size, rest, steps)
                    yield StreamedFile(path, guess_media_type(path), size, pieces)
                    async for _ in pieces:  # skip what the caller did not read
                        pass
        if group:
            yield group
            group = []


async def _pieces(size: int, rest: list[Found], steps: AsyncIterator[list[Found]]) -> AsyncIterator[bytes]:
    left = size
    while left:
        while not rest:
            rest.extend(reversed(await anext(steps)))
        match rest.pop():
            case EntryPiece(data):
                left -= len(data)
                yield data


async def _steps(reader: TarReader, body: AsyncIterable[bytes]) -> AsyncIterator[list[Found]]:
    """The contents of the archive, step by step. At the end, check that it was complete."""
    waiting: list[bytes] = []
    size = 0
    async for chunk in body:
        waiting.append(chunk)
        size += len(chunk)
        if size >= FED_BYTES:
            yield await asyncio.to_thread(reader.feed, b"".join(waiting))
            waiting, size = [], 0
    yield await asyncio.to_thread(reader.feed, b"".join(waiting))
    reader.close()


async def tar_of(bundle: Bundle, modified: int = 0) -> AsyncGenerator[bytes, None]:
    """The bundle as an archive. `modified`, in seconds since 1970, is the time of every entry."""
    async for group in bundle:
        if isinstance(group, StreamedFile):
            yield entry_header(group.relative_path, group.size_bytes, modified)
            async for piece in group.body:
                yield piece
            yield padding(group.size_bytes)
        else:
            yield tar_of_small(group, modified)
    yield END


def tar_of_small(files: Sequence[SmallFile], modified: int = 0) -> bytes:
    """The entries of small files, without the archive's end."""
    return b"".join(pieces_of_small(files, modified))


def pieces_of_small(files: Sequence[SmallFile], modified: int = 0) -> list[bytes]:
    """As `tar_of_small`, in pieces, among them the files' own bytes."""
    pieces: list[bytes] = []
    for file in files:
        size = len(file.data)
        pieces += (entry_header(file.relative_path, size, modified), file.data, padding(size))
    return pieces
