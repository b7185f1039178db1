"""Reading a tar archive strictly while it streams: regular files and folders, and nothing that two readers could
understand differently. Whatever is refused is refused with the entry's number and name.

Understood are ustar, pax and GNU long names (POSIX.1-2017 pax, "ustar Interchange Format"; GNU tar manual, "Basic Tar
Format"). Own code, because `tarfile` follows links, unpacks sparse files, goes on behind damage and takes an archive
that was cut off for a whole one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from services.core.paths import check_path
from services.errors import DuplicateRelativePathError, InvalidArchiveError, InvalidPathError, TooLargeError
from services.tar.blocks import BLOCK, OCTAL_LIMIT, ZERO_BLOCK, Header, parse_header, parse_pax, shown

MAX_EXTENSION_BYTES = 64 * 1024
"""Most bytes of one extension header: names and attributes."""

MAX_TRAILING_BYTES = 1 << 20
"""Most bytes of zeros behind an archive's end; writers fill their last record up, mostly to 10 KiB."""

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


@dataclass(frozen=True, slots=True)
class ArchiveLimits:
    """What an archive may hold: files and, apart from them, folders; bytes of one file; bytes that come whole."""

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
    """A larger file begins; its `size_bytes` follow as pieces, before anything else does."""

    relative_path: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class EntryPiece:
    """The next bytes of the file that has begun."""

    data: bytes


Found = WholeEntry | EntryBegin | EntryPiece


@dataclass(slots=True)
class _Extension:
    """What extension headers say of the entry that follows them."""

    path: str | None = None
    size: int | None = None
    count: int = 0


class TarReader:
    """One archive. `feed` it its bytes in order, then `close`. Used by one thread at a time; holds one small file."""

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
        """How many files were found so far."""
        return len(self._seen)

    def feed(self, data: bytes) -> list[Found]:
        """What these bytes complete.

        Raises:
            InvalidArchiveError: the archive is malformed, or holds what is no regular file and no folder.
            InvalidPathError, DuplicateRelativePathError: a file's path. TooLargeError: a limit.
        """
        return list(self._parse(data))

    def close(self) -> None:
        """Raises InvalidArchiveError: the archive was cut off."""
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
                raise InvalidArchiveError(f"behind entry {self._number} something follows a block of zeros")
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
            raise InvalidArchiveError(f"behind entry {self._number} the archive ends after an extension header")
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
        """Path and size of a file; no path for a folder, which is passed over."""
        extension = self._extension
        raw = header.name if extension.path is None else extension.path
        name = raw if isinstance(raw, str) else self._text(header, raw)
        if header.kind not in _FILES and header.kind != _FOLDER:
            what = _REFUSED.get(header.kind, f"of an unknown kind {header.kind!r}")
            raise InvalidArchiveError(f"{self._where(name)} is {what}; files and folders are taken")
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
            raise InvalidArchiveError(f"{self._where(name)} is a folder and has {size:,} bytes")
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
        """The size that every reader takes it to have: a pax size counts only where the header cannot say it."""
        said = self._extension.size
        if said is None or said == header.size:
            return header.size
        if header.size == 0 and said >= OCTAL_LIMIT:
            return said
        raise InvalidArchiveError(
            f"{self._where(name)} has {header.size:,} bytes by its header and {said:,} by its pax header"
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
