"""The oracle's notes: what it must remember while it reads the log, in a temporary file, so that memory does not grow.

The file is SQLite's private temporary database. It has no name once it is open, so nothing is left of it however the
process ends. It lies where SQLite puts temporary files (`SQLITE_TMPDIR`, then `TMPDIR`), and needs about 1.5 KB for
each file of an open package, 300 bytes for each blob and 400 bytes for each package.
"""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import astuple, dataclass
from types import TracebackType
from typing import Self
from uuid import UUID

import cbor2

from artifact_store.errors import UnavailableError
from artifact_store.events import NO_DIGEST, Event, FileIngested, PackageCreated
from artifact_store.manifest import content_key
from schemas.digests import record_digest
from services.log.port import Record

_CACHED_HEADS = 4096
_CACHE_KIB = 16 * 1024
_SCHEMA = """
CREATE TABLE packages (package BLOB PRIMARY KEY, head BLOB NOT NULL, open_command BLOB, created BLOB) WITHOUT ROWID;
CREATE TABLE files (package BLOB, path BLOB, entry BLOB NOT NULL, receipt BLOB NOT NULL, PRIMARY KEY (package, path))
    WITHOUT ROWID;
CREATE TABLE commands (package BLOB, command BLOB, PRIMARY KEY (package, command)) WITHOUT ROWID;
CREATE TABLE claims (
    key TEXT, start INTEGER, length INTEGER, blake3 BLOB, sha256 BLOB, whole INTEGER NOT NULL,
    package BLOB NOT NULL, sequence INTEGER NOT NULL, path TEXT NOT NULL,
    PRIMARY KEY (key, start, length, blake3, sha256)
) WITHOUT ROWID;
CREATE TABLE repeats (
    package BLOB, sequence INTEGER, partition INTEGER, offset INTEGER, digest BLOB NOT NULL,
    PRIMARY KEY (package, sequence, partition, offset)
) WITHOUT ROWID;
"""


@dataclass(slots=True)
class OpenCommand:
    """A command of which only some events were read so far."""

    command_id: UUID
    actor: str
    event_type: str
    count: int
    done: int = 0
    principal: str | None = None


@dataclass(slots=True)
class Head:
    """The state of a package, open or finalized, that is needed to check its next event."""

    sequence: int = 0
    digest: bytes = NO_DIGEST
    last_at: int = 0
    created_at: int = 0
    finalized: bool = False
    files: int = 0
    total_bytes: int = 0
    command: OpenCommand | None = None


@dataclass(frozen=True, slots=True)
class Claim:
    """An event's claim about a blob: the `length` bytes at `start` of `key` have these digests.

    Digests are 32 raw bytes; `sha256` is empty for a manifest, which has none. `whole`: the object has no other bytes.
    """

    key: str
    start: int
    length: int
    blake3: bytes
    sha256: bytes
    whole: bool
    package_id: UUID
    sequence: int
    path: str

    @classmethod
    def of_file(cls, event: Event, file: FileIngested) -> Self:
        """The claim of this file's event."""
        at = file.receipt
        whole = at.offset == 0 and at.key == content_key(file.blake3)
        place, digests = (at.key, at.offset, at.length), (file.blake3, file.sha256)
        return cls(*place, *digests, whole, event.package_id, event.sequence, file.relative_path)

    @property
    def place(self) -> str:
        """The event, for people."""
        return f"package {self.package_id} event {self.sequence}"

    @property
    def what(self) -> str:
        """What the bytes are, for people."""
        return f"file {self.path!r}" if self.sha256 else "its manifest"


class Notes:
    """The notes of one verification. A context manager, at whose end the file is gone. Used by one thread; blocks.

    An SQLite error that leaves the context becomes UnavailableError: the temporary file cannot be used.
    """

    def __init__(self, cached_heads: int = _CACHED_HEADS) -> None:
        """`cached_heads` packages are kept in memory, the others in the file."""
        self._db = sqlite3.connect("", isolation_level=None)
        # Nothing needs to survive, so there is one transaction that never ends, without a journal.
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        self._db.executescript(_SCHEMA)
        self._db.execute("BEGIN")
        self._heads: OrderedDict[bytes, Head] = OrderedDict()
        self._cached_heads = cached_heads

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._db.close()
        if isinstance(error, sqlite3.Error):
            raise UnavailableError(
                f"the temporary file of the verification cannot be used: {error}; TMPDIR sets its folder"
            ) from error

    def head(self, package_id: UUID) -> tuple[Head, bool]:
        """The package's head, and whether it is new. Change it in place, before the next call."""
        package = package_id.bytes
        head = self._heads.get(package)
        if head is not None:
            self._heads.move_to_end(package)
            return head, False
        row = self._db.execute("SELECT head, open_command FROM packages WHERE package = ?", (package,)).fetchone()
        head = Head() if row is None else _head(*row)
        if len(self._heads) >= self._cached_heads:
            self._write(*self._heads.popitem(last=False))
        self._heads[package] = head
        return head, row is None

    def note_creation(self, package_id: UUID, created: PackageCreated) -> None:
        """Keep the first creation of a package."""
        fields = cbor2.dumps(list(astuple(created)))
        empty = cbor2.dumps(_packed(Head()))
        self._db.execute(
            "INSERT INTO packages VALUES (?, ?, NULL, ?) ON CONFLICT DO UPDATE SET created = coalesce(created, ?)",
            (package_id.bytes, empty, fields, fields),
        )

    def creation(self, package_id: UUID) -> PackageCreated | None:
        """The package's creation; None if it was not noted, or forgotten."""
        row = self._db.execute("SELECT created FROM packages WHERE package = ?", (package_id.bytes,)).fetchone()
        return None if row is None or row[0] is None else PackageCreated(*cbor2.loads(row[0]))

    def note_file(self, package_id: UUID, path: str, entry: bytes, receipt: bytes) -> bool:
        """Keep a file's two manifest items. Returns False, and changes nothing, if its path is already known."""
        row = (package_id.bytes, _path(path), entry, receipt)
        return self._db.execute("INSERT OR IGNORE INTO files VALUES (?, ?, ?, ?)", row).rowcount > 0

    def entries(self, package_id: UUID) -> Iterator[bytes]:
        """The files' entries, sorted by the bytes of their paths."""
        yield from self._items(package_id, "entry")

    def receipts(self, package_id: UUID) -> Iterator[bytes]:
        """The files' receipts, in the same order."""
        yield from self._items(package_id, "receipt")

    def note_command(self, package_id: UUID, command_id: UUID) -> bool:
        """Keep that a command began. Returns False if it was noted before."""
        row = (package_id.bytes, command_id.bytes)
        return self._db.execute("INSERT OR IGNORE INTO commands VALUES (?, ?)", row).rowcount > 0

    def forget(self, package_id: UUID) -> None:
        """Drop what only an open package needs."""
        for table in ("files", "commands"):
            self._db.execute(f"DELETE FROM {table} WHERE package = ?", (package_id.bytes,))  # noqa: S608 - our names
        self._db.execute("UPDATE packages SET created = NULL WHERE package = ?", (package_id.bytes,))

    def unfinished(self) -> Iterator[tuple[UUID, UUID]]:
        """The unfinished commands, as pairs of package id and command id."""
        for package, head in self._heads.items():
            self._write(package, head)
        query = "SELECT package, open_command FROM packages WHERE open_command IS NOT NULL ORDER BY package"
        for package, command in self._db.execute(query):
            yield UUID(bytes=package), UUID(bytes=cbor2.loads(command)[0])

    def note_repeat(self, record: Record, event: Event) -> None:
        """Keep a record whose event repeats a sequence of its package."""
        digest = record_digest(record.key, record.value)
        row = (event.package_id.bytes, event.sequence, record.partition, record.offset, digest)
        self._db.execute("INSERT INTO repeats VALUES (?, ?, ?, ?, ?)", row)

    def repeats_end(self) -> dict[int, int]:
        """By partition, the offset after the last repeated event."""
        return dict(self._db.execute("SELECT partition, max(offset) + 1 FROM repeats GROUP BY partition").fetchall())

    def take_repeats(self, event: Event) -> list[tuple[int, bytes]]:
        """Offset and record digest of all repeats of the event's sequence. Forgets them."""
        key = (event.package_id.bytes, event.sequence)
        return self._db.execute(
            "DELETE FROM repeats WHERE package = ? AND sequence = ? RETURNING offset, digest", key
        ).fetchall()

    def note_claim(self, claim: Claim) -> None:
        """Keep a claim; of equal claims, only the first."""
        self._db.execute(
            "INSERT OR IGNORE INTO claims VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(claim.key, claim.start, claim.length, claim.blake3, claim.sha256, claim.whole),
                *(claim.package_id.bytes, claim.sequence, claim.path.encode(errors="replace").decode()),
            ),
        )

    def is_claimed(self, key: str) -> bool:
        """Whether any event names the key."""
        return self._db.execute("SELECT 1 FROM claims WHERE key = ? LIMIT 1", (key,)).fetchone() is not None

    def claimed_keys(self) -> Iterator[str]:
        """Every claimed key, once."""
        for (key,) in self._db.execute("SELECT DISTINCT key FROM claims ORDER BY key"):
            yield key

    def claims(self, key: str) -> list[Claim]:
        """The claims about a key, sorted by start: one for each packed file in the object, otherwise one."""
        found = self._db.execute("SELECT * FROM claims WHERE key = ? ORDER BY start, length", (key,))
        return [
            Claim(key, start, length, b3, sha, bool(whole), UUID(bytes=package), sequence, path)
            for key, start, length, b3, sha, whole, package, sequence, path in found
        ]

    def totals(self) -> tuple[int, int]:
        """The number of claimed keys and of claimed bytes. Bytes that are claimed twice count twice.

        Above 2^53, the number of bytes is not exact.
        """
        keys = self._db.execute("SELECT count(*) FROM (SELECT DISTINCT key FROM claims)").fetchone()
        size = self._db.execute("SELECT total(length) FROM claims").fetchone()
        return int(keys[0]), int(size[0])

    def _write(self, package: bytes, head: Head) -> None:
        command = None if head.command is None else cbor2.dumps([head.command.command_id.bytes, *_fields(head.command)])
        packed = cbor2.dumps(_packed(head))
        self._db.execute(
            "INSERT INTO packages VALUES (?, ?, ?, NULL) ON CONFLICT DO UPDATE SET head = ?, open_command = ?",
            (package, packed, command, packed, command),
        )

    def _items(self, package_id: UUID, column: str) -> Iterator[bytes]:
        query = f"SELECT {column} FROM files WHERE package = ? ORDER BY path"  # noqa: S608 - our own two names
        for (item,) in self._db.execute(query, (package_id.bytes,)):
            yield item


def _path(path: str) -> bytes:
    """The path in UTF-8, so that SQLite compares its bytes. Surrogates, which only bad paths have, stay distinct."""
    return path.encode("utf-8", "surrogatepass")


def _packed(head: Head) -> list[object]:
    return [
        *(head.sequence, head.digest, head.last_at, head.created_at, head.finalized, head.files, head.total_bytes),
    ]


def _fields(command: OpenCommand) -> tuple[object, ...]:
    return (command.actor, command.event_type, command.count, command.done, command.principal)


def _head(packed: bytes, command: bytes | None) -> Head:
    head = Head(*cbor2.loads(packed))
    if command is not None:
        command_id, *rest = cbor2.loads(command)
        head.command = OpenCommand(UUID(bytes=command_id), *rest)
    return head
