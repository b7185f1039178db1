"""The state of one partition in a SQLite file: complete open packages, and what finalized packages still need.

The file is disposable: everything in it comes from the log, and it names the last record that was folded into it. It
is in WAL mode with `synchronous=NORMAL`: after a crash or a power cut it is as it was at some earlier moment, never a
mixture (SQLite, "Write-Ahead Logging"). Other damage (another program's file, a truncated one, inconsistent pages) is
detected when the file is opened or, by a checksum in every row, when a row is read.

A finalized package is one row. The answers to retries of its commands are rows of another table, in the order of
finalization; the oldest are deleted first. An open package has one row for itself, and rows for its commands with their
files. When a large package is finalized, `tidy` turns these rows into answers, some at a time; a retry is looked up in
both until then. When an open package takes no more commands, `put_away` deletes its rows of commands.

A row is CBOR with a checksum and holds several commands. A statement writes many rows, because Python's `sqlite3`
releases the interpreter several times per statement, and in a busy process other threads run before it comes back. With
one row per statement, a save took ten times as long.
"""

from __future__ import annotations

import errno
import shutil
import sqlite3
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import astuple, dataclass, field
from itertools import islice
from pathlib import Path
from sqlite3 import Connection
from typing import Any, NamedTuple, Self
from uuid import UUID

import cbor2

from artifact_store.errors import UnavailableError
from artifact_store.events import PACKAGE_CREATED, PACKAGE_FINALIZED, PackageCreated
from artifact_store.rules import PathPair, Unportable
from schemas.digests import DIGEST_BYTES, items_digest
from services.core.state import (
    ABANDONED,
    CREATED,
    FINALIZED,
    Answered,
    CommandState,
    FileState,
    PackageState,
)
from services.log.records import AcceptedLoss, AdministrativeHead
from services.runtime.file_system import private_file

_APPLICATION_ID = 0x61727470
FORMAT = 6
"""The format of tables and rows. A file of the previous format is converted; any other is discarded."""

_FORMAT_BEFORE = 5
READABLE_FORMATS = frozenset({_FORMAT_BEFORE, FORMAT})

QUICK_CHECK_BYTES = 32 << 20
"""Files up to this size are checked page by page when they are opened, which takes about 0.1 s."""

_DAMAGE = frozenset({sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CONSTRAINT})
_PASSING = frozenset(
    {
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
        sqlite3.SQLITE_NOMEM,
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_CANTOPEN,
    }
)
"""Errors that say nothing about the file. Discarding a state costs minutes of reading the log."""

_NO_ROOM = frozenset(
    {
        sqlite3.SQLITE_IOERR_SHMSIZE,
        sqlite3.SQLITE_IOERR_SHMOPEN,
        sqlite3.SQLITE_IOERR_SHMMAP,
        sqlite3.SQLITE_IOERR_WRITE,
        sqlite3.SQLITE_IOERR_FSYNC,
        sqlite3.SQLITE_IOERR_TRUNCATE,
    }
)
"""Extended codes that also say nothing about the file: SQLite could not create or write a file beside it."""

_DISK_FULL = frozenset({sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_SHMSIZE})
_DISK_FULL_ERRNO = frozenset({errno.ENOSPC, errno.EDQUOT})

MEMORY_BYTES = 128 << 20
"""The most that a state in memory takes, in addition to the packages in `PartitionState`."""

SPARE_BYTES = 32 << 20
"""How much more room a state in memory needs before it goes back to the disk, so as not to fill it at once."""

_PAGE_BYTES = 4 << 10
_CACHE_KIB = 2 << 10
_WAL_PAGES = 4_000
_PURGE_ROWS = 2_000
_LOOK_ROWS = 100
_UNKNOWN = PackageCreated("", "", "", "", None, "{}")

AT_ONCE = 2_000
"""`tidy` turns about this many commands and files into answers at a time, which takes about 20 ms."""

_TABLES = (
    # One row: the state's log and partition, its anchor, and the id of the next row of answers.
    "CREATE TABLE about (body BLOB NOT NULL)",
    "CREATE TABLE packages (package_id BLOB PRIMARY KEY, body BLOB NOT NULL) WITHOUT ROWID",
    # Several commands and their results; `sequence` is that of their last event.
    """CREATE TABLE commands (package_id BLOB, sequence INTEGER, body BLOB NOT NULL,
        PRIMARY KEY (package_id, sequence)) WITHOUT ROWID""",
    # Each row holds several commands of one package: so there are few rows, and a retry is still found quickly.
    """CREATE TABLE answers (
        id INTEGER PRIMARY KEY, finalized_at INTEGER NOT NULL, command_ids BLOB NOT NULL, body BLOB NOT NULL)""",
    # One row: the fields of `Irregular`.
    "CREATE TABLE irregular (body BLOB NOT NULL)",
    # Finalized packages some of whose commands are not answers yet; `next_answer` is the next id reserved for them.
    """CREATE TABLE untidy (
        id INTEGER PRIMARY KEY, package_id BLOB NOT NULL UNIQUE, finalized_at INTEGER NOT NULL,
        next_answer INTEGER NOT NULL, body BLOB NOT NULL)""",
)


class StateFileError(UnavailableError):
    """The file cannot be used at the moment. Unless it is a DiskFullError, the partition is taken over again."""


class DiskFullError(StateFileError):
    """The disk is full. Earlier saves are intact; the state stays in memory until there is room."""


class UnusableStateError(StateFileError):
    """The file is damaged, another program's, or of another format: discard it."""


class ForeignStateError(StateFileError):
    """The file is intact, but belongs to another log: the topic was deleted and created again."""

    def __init__(self, detail: str, log: UUID, anchor: Anchor) -> None:
        super().__init__(detail)
        self.log = log
        self.anchor = anchor


@dataclass(frozen=True, slots=True)
class LogPartition:
    """The partition that a state belongs to. `identity` is the topic's."""

    identity: UUID
    topic: str
    partition: int


@dataclass(frozen=True, slots=True)
class Anchor:
    """The last record that was folded into a state, by which the state is compared with the log."""

    next_offset: int = 0
    """The offset after that record."""
    digest: bytes = b""
    """BLAKE3 over the record's value."""
    last_created_at: int = 0
    """The time of the newest event so far (µs since 1970)."""


@dataclass(slots=True)
class Irregular:
    """The records of a partition, up to the end of its state, that are not the next event of a package."""

    administrative: AdministrativeHead | None = None
    """The last administrative record of this log."""
    skipped: int = 0
    """How many records are not events and are skipped, as an operator confirmed."""
    repeated: int = 0
    """How many events are repeats, and are skipped."""
    quarantined: dict[UUID, str] = field(default_factory=dict)
    """Packages whose history the log contradicts, and how."""
    accepted: list[AcceptedLoss] = field(default_factory=list)
    """Losses that were accepted in this log."""


class Summary(NamedTuple):
    """A package in the file: its status and last event, and when it was created (µs since 1970)."""

    status: str
    created_at: int
    sequence: int
    digest: bytes


class StateFile:
    """The file. For use by one thread at a time. Every method blocks, and raises StateFileError."""

    def __init__(
        self,
        path: Path,
        connection: sqlite3.Connection,
        origin: LogPartition,
        anchor: Anchor,
        next_answer: int,
        *,
        alone: bool = False,
    ) -> None:
        """Use `open`, `create` or `in_memory`."""
        self.path = path
        self.alone = alone
        """Whether others cannot open it, because it is in memory or was opened on a full disk. See `shared`."""
        self.anchor = anchor
        self._connection = connection
        self.origin = origin
        self._next_answer = next_answer
        self._looked_at = anchor.digest[:16]  # at random, so that short-lived processes reach all packages in time
        self.irregular = _irregular(connection.execute("SELECT body FROM irregular").fetchone()[0])
        """Read when the file is opened. The caller may change it, and `save` writes it."""
        self.untidy = connection.execute("SELECT 1 FROM untidy LIMIT 1").fetchone() is not None
        """Whether there is anything for `tidy` to do."""
        self.broken = False
        """Whether the file has proved to be unusable: delete it when it is closed."""

    @classmethod
    def create(cls, path: Path, origin: LogPartition) -> Self:
        """Create the file, replacing an existing one."""
        remove(path)
        with _explained(path):
            return cls(path, _made(_connect(private_file(path), "rw"), origin), origin, Anchor(), 1)

    @classmethod
    def in_memory(cls, path: Path, origin: LogPartition) -> Self:
        """Create a state in memory, for a full disk. It takes at most MEMORY_BYTES; `shared` writes it to `path`."""
        with _explained(path):
            connection = sqlite3.connect(":memory:", isolation_level=None, check_same_thread=False)
            connection.execute(f"PRAGMA page_size = {_PAGE_BYTES}")
            connection.execute(f"PRAGMA max_page_count = {MEMORY_BYTES // _PAGE_BYTES}")
            return cls(path, _made(connection, origin), origin, Anchor(), 1, alone=True)

    @classmethod
    def open(cls, path: Path, origin: LogPartition) -> Self:
        """Open the existing file.

        Raises UnusableStateError if it is not an intact state of this topic and partition, and ForeignStateError if it
        belongs to another log.
        """
        with _explained(path, opening=True, reading=True):
            size = path.stat().st_size
            connection, alone = _connect_with_or_without_room(path)
            try:
                ids = tuple(
                    connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("application_id", "user_version")
                )
                if ids == (_APPLICATION_ID, _FORMAT_BEFORE):
                    _bring_up_to_date(connection)
                elif ids != (_APPLICATION_ID, FORMAT):
                    raise UnusableStateError(f"{path.name} is no state of this version")
                (body,) = connection.execute("SELECT body FROM about").fetchone() or (b"",)
                log, *found, next_offset, digest, last_created_at, next_answer = unsealed(body)
                if found != [origin.topic, origin.partition]:
                    raise UnusableStateError(f"{path.name} is the state of another partition")
                anchor = Anchor(next_offset, digest, last_created_at)
                if log != origin.identity.bytes:
                    raise ForeignStateError(f"{path.name} is the state of another log", UUID(bytes=log), anchor)
                if size <= QUICK_CHECK_BYTES:
                    checked = connection.execute("PRAGMA quick_check(1)").fetchone()
                    if checked != ("ok",):
                        raise UnusableStateError(f"{path.name} is damaged")
                return cls(path, connection, origin, anchor, next_answer, alone=alone)
            except BaseException:
                connection.close()
                raise

    def beside(self) -> Self:
        """Another connection to the file, on which another thread can `load` packages. That thread closes it."""
        with _explained(self.path):
            connection = _connect(self.path, "rw")
            try:
                connection.execute("PRAGMA query_only = ON")
                return type(self)(self.path, connection, self.origin, self.anchor, 0)
            except BaseException:
                connection.close()
                raise

    def shared(self) -> Self:
        """Replace this state by the same one in a file that others can open too.

        Raises DiskFullError, after which this one can still be used.
        """
        with _explained(self.path):
            if self._in_memory:
                self._write_to_disk()
            self._connection.close()
        return self.open(self.path, self.origin)

    def _write_to_disk(self) -> None:
        (pages,) = self._connection.execute("PRAGMA page_count").fetchone()
        if shutil.disk_usage(self.path.parent).free < 2 * pages * _PAGE_BYTES + SPARE_BYTES:
            raise DiskFullError(f"there is no room for the state file {self.path} yet")
        written = self.path.with_name(self.path.name + ".written")
        try:
            remove(written)
            target = sqlite3.connect(private_file(written), isolation_level=None)
            try:
                self._connection.backup(target)
            finally:
                target.close()
            remove(self.path)
            written.rename(self.path)
        except BaseException:
            remove(written)
            raise

    @property
    def _in_memory(self) -> bool:
        (_, _, file), *_ = self._connection.execute("PRAGMA database_list").fetchall()
        return not file

    def close(self) -> None:
        """Close the connection. What was saved stays."""
        with _explained(self.path):
            self._connection.close()

    def load(self, package_id: UUID, command_id: UUID | None, kept_after: int) -> PackageState | None:
        """The package; None if there is none.

        A finalized package comes with this command alone, and only if it was finalized after `kept_after` (µs).
        """
        with self._using(reading=True):
            found = self._row(package_id)
            if found is None:
                return None
            kind, *values = found
            if kind == CREATED:
                return self._open_package(package_id, values)
            if kind == ABANDONED:
                _, created_at, last_event_at, sequence, digest = values
                about = package_id, _UNKNOWN, created_at, last_event_at, sequence, digest
                return PackageState(*about, ABANDONED, forgotten=True)
            return self._finalized_package(package_id, values, command_id, kept_after)

    def summary_of(self, package_id: UUID) -> Summary | None:
        """What is cheap to read about the package; None if there is none."""
        with self._using(reading=True):
            found = self._row(package_id)
            if found is None:
                return None
            first = 3 if found[0] == FINALIZED else 2  # `_finalized_package` and `_open_package` name the values
            created_at, _, sequence, digest, *_ = found[first:]
            return Summary(found[0], created_at, sequence, digest)

    def _row(self, package_id: UUID) -> list[Any] | None:
        row = self._connection.execute("SELECT body FROM packages WHERE package_id = ?", (package_id.bytes,)).fetchone()
        return None if row is None else unsealed(row[0])

    def save(self, changed: Iterable[tuple[PackageState, int]], anchor: Anchor, answers_kept_after: int) -> None:
        """Write changed packages, each with the sequence up to which the file has it, in one transaction.

        Also deletes some answers of packages that were finalized at `answers_kept_after` (µs) or before.
        """
        with self._using(), self._numbering(), _transaction(self._connection):
            changes = Changes(self._connection)
            # In the order of the table, in which packages that changed are far apart.
            for state, saved in sorted(changed, key=lambda found: found[0].package_id.bytes):
                if state.status == FINALIZED:
                    self._save_finalized(changes, state, saved)
                else:
                    self._save_open(changes, state, saved)
            changes.flush()
            self._purge(answers_kept_after)
            self._connection.execute("UPDATE irregular SET body = ?", (_sealed_irregular(self.irregular),))
            self._connection.execute("UPDATE about SET body = ?", (_about(self.origin, anchor, self._next_answer),))
        self.anchor = anchor

    @contextmanager
    def _using(self, *, reading: bool = False) -> Iterator[None]:
        """As `_explained`. Notes when the file is unusable."""
        try:
            with _explained(self.path, reading=reading):
                yield
        except UnusableStateError:
            self.broken = True
            raise

    @contextmanager
    def _numbering(self) -> Iterator[None]:
        """Release the ids that answers got in a transaction that failed."""
        first_free = self._next_answer
        try:
            yield
        except BaseException:
            self._next_answer = first_free
            raise

    def tidy(self) -> None:
        """Turn some more commands of large finalized packages into answers, in a separate transaction."""
        with self._using(reading=True), _transaction(self._connection):
            execute = self._connection.execute
            row = execute("SELECT * FROM untidy ORDER BY id LIMIT 1").fetchone()
            if row is not None:
                id_, package_id, finalized_at, next_answer, body = row
                of_package = unsealed(body)
                bodies, last, whole = self._next_commands(package_id)
                changes = Changes(self._connection)
                answers = answers_of_rows(bodies, of_package)
                first_free = self._add_answers(changes, answers, finalized_at, next_answer)
                changes.flush()
                execute("DELETE FROM commands WHERE package_id = ? AND sequence <= ?", (package_id, last))
                if whole:
                    execute("DELETE FROM untidy WHERE id = ?", (id_,))
                else:
                    execute("UPDATE untidy SET next_answer = ? WHERE id = ?", (first_free, id_))
            untidy = execute("SELECT 1 FROM untidy LIMIT 1").fetchone() is not None
        self.untidy = untidy

    def put_away(self, idle_before: int) -> set[UUID]:
        """Delete files and commands of open packages whose last event is older than `idle_before` (µs); which ones.

        Checks some packages in a separate transaction, and continues there the next time.
        """
        with self._using(reading=True), _transaction(self._connection):
            execute = self._connection.execute
            rows = execute(
                "SELECT package_id, body FROM packages WHERE package_id > ? ORDER BY package_id LIMIT ?",
                (self._looked_at, _LOOK_ROWS),
            ).fetchall()
            gone, events, self._looked_at = set[UUID](), 0, b""
            for key, body in rows:
                if events > AT_ONCE:
                    break
                self._looked_at = key
                kind, *values = unsealed(body)
                if kind != CREATED or values[2] >= idle_before:
                    continue
                _, created_at, last_event_at, sequence, digest, *_ = values
                kept = sealed(ABANDONED, None, created_at, last_event_at, sequence, digest)
                execute("UPDATE packages SET body = ? WHERE package_id = ?", (kept, key))
                execute("DELETE FROM commands WHERE package_id = ?", (key,))
                gone.add(UUID(bytes=key))
                events += sequence
        return gone

    def _next_commands(self, package_id: bytes) -> tuple[list[bytes], int, bool]:
        """The first rows of the package's commands, the sequence of the last of them, and whether these are all."""
        found = self._connection.execute(
            "SELECT sequence, body FROM commands WHERE package_id = ? ORDER BY sequence", (package_id,)
        )
        bodies: list[bytes] = []
        last = size = 0
        for last, body in found:
            bodies.append(body)
            size += entries_of(body)
            if size >= AT_ONCE:
                return bodies, last, False
        return bodies, last, True

    def _add_answers(self, changes: Changes, answers: Iterable[Answer], finalized_at: int, number: int) -> int:
        """Write answers under the ids from `number` on; the next free id."""
        for command_ids, body in answer_rows(answers):
            changes.answers.add(number, finalized_at, command_ids, body)
            number += 1
        return number

    def _save_open(self, changes: Changes, state: PackageState, saved: int) -> None:
        body = sealed(
            CREATED,
            created_values(state.created),
            state.created_at,
            state.last_event_at,
            state.sequence,
            state.digest,
            state.total_bytes,
            state.unfinished.bytes if state.unfinished is not None else None,
        )
        changes.packages.add(state.package_id.bytes, body)
        self._save_commands(changes, state, saved)

    def _save_commands(self, changes: Changes, state: PackageState, saved: int) -> None:
        for sequence, body in command_rows(state, saved):
            changes.commands.add(state.package_id.bytes, sequence, body)

    def _save_finalized(self, changes: Changes, state: PackageState, saved: int) -> None:
        key = state.package_id.bytes
        created, first = state.created, self._next_answer
        entries = len(state.files) + len(state.commands)
        if entries <= AT_ONCE:
            self._next_answer = self._add_answers(changes, answers_of(state), state.last_event_at, first)
            if saved:
                changes.answered.add(key)
        else:
            # As many ids as `tidy` may need: each row is full, or the last one of a turn.
            self._next_answer += entries // ROW_ENTRIES + entries // AT_ONCE + 2
            self._save_commands(changes, state, saved)
            self._connection.execute(
                "INSERT INTO untidy (package_id, finalized_at, next_answer, body) VALUES (?, ?, ?, ?)",
                (key, state.last_event_at, first, sealed(*package_values(state))),
            )
            self.untidy = True
        body = sealed(
            FINALIZED,
            created.retention_class,
            created.retention_days,
            state.created_at,
            state.last_event_at,
            state.sequence,
            state.digest,
            state.total_bytes,
            state.manifest_digest,
            first,
            self._next_answer - 1,
        )
        changes.packages.add(key, body)

    def _purge(self, kept_after: int) -> None:
        """Delete answers from the first one up to the first that is still needed.

        The answers of one save are in the order of their packages, not of their time, so some stay a bit longer.
        """
        row = self._connection.execute(
            "SELECT coalesce(min(CASE WHEN finalized_at > ? THEN id END), max(id) + 1) "
            "FROM (SELECT id, finalized_at FROM answers ORDER BY id LIMIT ?)",
            (kept_after, _PURGE_ROWS),
        ).fetchone()
        if row[0] is not None:
            self._connection.execute("DELETE FROM answers WHERE id < ?", row)

    def _open_package(self, package_id: UUID, values: list[Any]) -> PackageState:
        created, created_at, last_event_at, sequence, digest, total_bytes, unfinished = values
        state = PackageState(
            package_id,
            PackageCreated(*created),
            created_at,
            last_event_at,
            sequence,
            digest,
            total_bytes=total_bytes,
            unfinished=UUID(bytes=unfinished) if unfinished is not None else None,
        )
        rows = self._connection.execute(
            "SELECT body FROM commands WHERE package_id = ? ORDER BY sequence", (package_id.bytes,)
        )
        events = 0
        for (body,) in rows:
            events += add_command_row(state, body)
        if events != sequence:
            raise UnusableStateError(f"{self.path.name} lacks rows of package {package_id}")
        return state

    def _finalized_package(
        self, package_id: UUID, values: list[Any], command_id: UUID | None, kept_after: int
    ) -> PackageState:
        class_, days, created_at, last_event_at, sequence, digest, total_bytes, manifest_digest, first, last = values
        state = PackageState(
            package_id,
            PackageCreated("", "", "", class_, days, "{}"),
            created_at,
            last_event_at,
            sequence,
            digest,
            FINALIZED,
            total_bytes,
            manifest_digest,
        )
        state.forgotten = last_event_at <= kept_after
        if command_id is None or state.forgotten:
            return state
        execute = self._connection.execute
        rows = execute(
            "SELECT body FROM answers WHERE id BETWEEN ? AND ? AND instr(command_ids, ?)",
            (first, last, command_id.bytes),
        )
        for (body,) in rows:
            add_answers(state, body, command_id)
        untidy = execute("SELECT body FROM untidy WHERE package_id = ?", (package_id.bytes,)).fetchone()
        if untidy is not None:
            of_package = unsealed(untidy[0])
            rows = execute(
                "SELECT body FROM commands WHERE package_id = ? AND instr(body, ?) ORDER BY sequence",
                (package_id.bytes, command_id.bytes),
            )
            for _, body in answer_rows(answers_of_rows((body for (body,) in rows), of_package)):
                add_answers(state, body, command_id)
        return state


def _about(origin: LogPartition, anchor: Anchor, next_answer: int) -> bytes:
    return sealed(origin.identity.bytes, origin.topic, origin.partition, *astuple(anchor), next_answer)


def _sealed_irregular(found: Irregular) -> bytes:
    quarantined = [[package_id.bytes, cause] for package_id, cause in found.quarantined.items()]
    head = None if found.administrative is None else list(found.administrative)
    accepted = [[loss.log.bytes, *loss[1:4], list(loss.head)] for loss in found.accepted]
    return sealed(head, found.skipped, found.repeated, quarantined, accepted)


def _irregular(body: bytes) -> Irregular:
    head, skipped, repeated, quarantined, accepted = unsealed(body)
    return Irregular(
        None if head is None else AdministrativeHead(*head),
        skipped,
        repeated,
        {UUID(bytes=package): cause for package, cause in quarantined},
        [
            AcceptedLoss(UUID(bytes=log), offset, digest, created_at, AdministrativeHead(*last))
            for log, offset, digest, created_at, last in accepted
        ],
    )


def _bring_up_to_date(connection: sqlite3.Connection) -> None:
    """Convert a file of the format before, which has no `Irregular`: its release stopped at everything irregular."""
    with _transaction(connection):
        connection.execute("CREATE TABLE irregular (body BLOB NOT NULL)")
        connection.execute("INSERT INTO irregular VALUES (?)", (_sealed_irregular(Irregular()),))
        connection.execute(f"PRAGMA user_version = {FORMAT}")


def copy_file(source: Path, target: Path) -> None:
    """Write a consistent copy of a state, which may be in use. Blocks."""
    with _explained(source):
        reading = _connect(source, "rw")
        try:
            reading.execute("PRAGMA query_only = ON")
            reading.execute("PRAGMA wal_autocheckpoint = 0")
            reading.execute("PRAGMA cache_size = -256")  # every page is read once
            writing = sqlite3.connect(private_file(target), isolation_level=None)
            try:
                writing.execute("PRAGMA synchronous = OFF")
                writing.execute("PRAGMA cache_size = -256")
                reading.backup(writing)
            finally:
                writing.close()
        finally:
            reading.close()


def remove(path: Path) -> None:
    """Delete a state, with the files that SQLite keeps beside it. Raises StateFileError."""
    with _explained(path):
        for file in files_of(path):
            file.unlink(missing_ok=True)


def files_of(path: Path) -> list[Path]:
    """The file of a state, and those that SQLite keeps beside it, whether they are there or not."""
    return [path.with_name(path.name + suffix) for suffix in ("", "-wal", "-shm", "-journal")]


def _made(connection: sqlite3.Connection, origin: LogPartition) -> sqlite3.Connection:
    """Create an empty state on the connection, and return that. Closes it on failure."""
    try:
        with _transaction(connection):
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {FORMAT}")
            for table in _TABLES:
                connection.execute(table)
            connection.execute("INSERT INTO about VALUES (?)", (_about(origin, Anchor(), 1),))
            connection.execute("INSERT INTO irregular VALUES (?)", (_sealed_irregular(Irregular()),))
    except BaseException:
        connection.close()
        raise
    return connection


def _connect_with_or_without_room(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A connection, and whether it excludes others: a full disk may have no room for the shared memory file."""
    try:
        return _connect(path, "rw"), False
    except sqlite3.OperationalError as error:
        if error.sqlite_errorcode not in _DISK_FULL:
            raise
        return _connect(path, "rw", alone=True), True


def _connect(path: Path, mode: str, *, alone: bool = False) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}", uri=True, isolation_level=None, check_same_thread=False, timeout=5.0
    )
    try:
        if alone:
            connection.execute("PRAGMA locking_mode = EXCLUSIVE")
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = NORMAL")
        # Deleted content need not be overwritten, which is the default on some systems.
        connection.execute("PRAGMA secure_delete = OFF")
        connection.execute(f"PRAGMA cache_size = -{_CACHE_KIB}")
        connection.execute(f"PRAGMA wal_autocheckpoint = {_WAL_PAGES}")
    except BaseException:
        connection.close()
        raise
    return connection


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        # The first error is the one to report.
        with suppress(sqlite3.Error):
            connection.execute("ROLLBACK")
        raise


@contextmanager
def _explained(path: Path, *, opening: bool = False, reading: bool = False) -> Iterator[None]:
    """Translate errors of SQLite and the system. At opening, all but passing ones mean that it is not a state."""
    try:
        yield
    except sqlite3.Error as error:
        extended = getattr(error, "sqlite_errorcode", 0)
        code = extended & 0xFF
        if code in _DAMAGE or (opening and code not in _PASSING and extended not in _NO_ROOM):
            raise UnusableStateError(f"{path.name} is damaged: {error}") from error
        kind = DiskFullError if extended in _DISK_FULL else StateFileError
        raise kind(f"the state file {path} cannot be used: {error}") from error
    except OSError as error:
        kind = DiskFullError if error.errno in _DISK_FULL_ERRNO else StateFileError
        raise kind(f"the state file {path} cannot be used: {error.strerror}") from error
    except DamagedRowError:
        raise UnusableStateError(f"{path.name} holds a damaged row") from None
    except (KeyError, TypeError, ValueError) as error:  # the row has an unknown form
        if not reading:
            raise
        raise UnusableStateError(f"{path.name} holds a row that cannot be read: {type(error).__name__}") from error


ROW_ENTRIES = 128
"""A row of commands has about this many commands and files, a row of answers this many commands."""

_CHECKSUM = 4
_ID_BYTES = 16

Command = tuple[bytes, str, str | list[str], int, int, int, bytes]
"""A command's id, and what became of it, in the order of `CommandState`; actor and principal where there are both."""

Answer = tuple[Command, list[Any] | None, tuple[bytes, bytes] | None]
"""A command, what else its answer needs, and what is kept of its files.

The second is the fields of `PackageCreated` for a creation, and `Unportable` for the finalization of a package that has
such paths.
"""


class DamagedRowError(ValueError):
    """The checksum of a row does not match its content."""


def sealed(*values: Any) -> bytes:
    """The body of a row with these values."""
    content = cbor2.dumps(values)
    return content + zlib.crc32(content).to_bytes(_CHECKSUM)


def unsealed(body: bytes) -> list[Any]:
    """The values in the body of a row. Raises DamagedRowError."""
    content, checksum = body[:-_CHECKSUM], body[-_CHECKSUM:]
    if zlib.crc32(content).to_bytes(_CHECKSUM) != checksum:
        raise DamagedRowError
    found: list[Any] = cbor2.loads(content)
    return found


def command_rows(state: PackageState, saved: int) -> Iterator[tuple[int, bytes]]:
    """Rows of the package's commands after its event `saved`: the last sequence of each row, and its body."""
    files_of = state.files
    commands: list[Command] = []
    files: list[list[FileState]] = []
    paths: list[list[str]] = []
    size = 0
    for command_id, command in _since(state.commands, saved):
        # Its events are consecutive.
        new = min(len(command.paths), command.last_sequence - saved)
        own = command.paths[len(command.paths) - new :]
        commands.append(_command(command_id, command))
        paths.append(own)
        files.append([files_of[path] for path in own])
        size += 1 + new
        if size >= ROW_ENTRIES:
            yield command.last_sequence, sealed(_columns(commands), paths, files)
            commands, paths, files, size = [], [], [], 0
    if commands:
        yield state.sequence, sealed(_columns(commands), paths, files)


def add_command_row(state: PackageState, body: bytes) -> int:
    """Add the commands in a row of `command_rows`; the number of their events. Raises as `unsealed`."""
    events = 0
    for command, paths, files in _commands(body):
        known = _add_command(state, command)
        state.add_files(paths, map(FileState._make, files))
        known.paths += paths
        events += len(files) or 1
    return events


def entries_of(body: bytes) -> int:
    """The number of commands and files in a row of `command_rows`. Raises as `unsealed`."""
    return sum(1 + len(files) for _, _, files in _commands(body))


def answers_of(state: PackageState) -> Iterator[Answer]:
    """What it takes to recognise and answer retries of the package's commands."""
    files_of = state.files
    of_package = package_values(state)
    for command_id, known in state.commands.items():
        command = _command(command_id, known)
        yield command, _needed(command, *of_package), _answered([files_of[path] for path in known.paths])


def answers_of_rows(bodies: Iterable[bytes], of_package: Sequence[list[Any]]) -> Iterator[Answer]:
    """The same from rows of `command_rows` and from `package_values`. Raises as `unsealed`."""
    for body in bodies:
        for command, _, files in _commands(body):
            yield command, _needed(command, *of_package), _answered(files)


def answer_rows(answers: Iterable[Answer]) -> Iterator[tuple[bytes, bytes]]:
    """Rows of answers, each with several commands: the joined ids of the commands, and the body."""
    left = iter(answers)
    while found := list(islice(left, ROW_ENTRIES)):
        commands, needed, answered = zip(*found, strict=True)
        columns = _columns(commands)
        yield columns[0], sealed(columns, needed, answered)


def add_answers(state: PackageState, body: bytes, command_id: UUID) -> None:
    """Add this command from a row of `answer_rows`. Raises as `unsealed`."""
    for command, needed, answered in _commands(body):
        if command[0] != command_id.bytes:
            continue
        known = _add_command(state, command)
        if needed is not None and known.event_type == PACKAGE_CREATED:
            state.created = PackageCreated(*needed)
        elif needed is not None:
            state.unportable = _unportable(*needed)
        if answered is not None:
            known.answered = (*known.answered, Answered(*answered))


def created_values(created: PackageCreated) -> list[Any]:
    """The fields of `PackageCreated` in their order."""
    return [getattr(created, name) for name in PackageCreated.__slots__]


def package_values(state: PackageState) -> list[list[Any]]:
    """What answers need of a finalized package in addition to its commands and files."""
    return [created_values(state.created), list(state.find_unportable())]


def _needed(command: Command, created: list[Any], unportable: Sequence[Any] = ()) -> list[Any] | None:
    """The part of `package_values` that this command needs. Older files do not have the second part."""
    if command[1] == PACKAGE_CREATED:
        return created
    return list(unportable) if command[1] == PACKAGE_FINALIZED and unportable and unportable[0] else None


def _unportable(number: int, pairs: Sequence[Sequence[str]]) -> Unportable:
    return Unportable(number, tuple(PathPair(*pair) for pair in pairs))


def _add_command(state: PackageState, values: Command) -> CommandState:
    """Add a command as the newest row has it, with the files that earlier rows have of it."""
    id_bytes, event_type, who, count, done, last_sequence, last_digest = values
    command_id = UUID(bytes=id_bytes)
    actor, principal = (who, None) if isinstance(who, str) else who
    before = state.commands.get(command_id)
    state.commands[command_id] = command = CommandState(
        event_type, actor, count, done, last_sequence, last_digest, principal=principal
    )
    if before is not None:
        command.paths += before.paths
        command.answered += before.answered
    return command


def _command(command_id: UUID, command: CommandState) -> Command:
    return (
        command_id.bytes,
        command.event_type,
        command.actor if command.principal is None else [command.actor, command.principal],
        command.count,
        command.done,
        command.last_sequence,
        command.last_digest,
    )


def _columns(commands: Iterable[Command]) -> tuple[Any, ...]:
    """The commands by column. Columns of values of equal length are joined."""
    ids, *between, digests = zip(*commands, strict=True)
    return b"".join(ids), *between, b"".join(digests)


def _commands(body: bytes) -> Iterator[tuple[Command, Any, Any]]:
    """The commands of a row, each with its values in the row's other two columns. Raises as `unsealed`."""
    (ids, *between, digests), *others = unsealed(body)
    columns = _pieces(ids, _ID_BYTES), *between, _pieces(digests, DIGEST_BYTES)
    return zip(zip(*columns, strict=True), *others, strict=True)


def _pieces(joined: bytes, size: int) -> list[bytes]:
    return [joined[at : at + size] for at in range(0, len(joined), size)]


def _answered(files: Sequence[Sequence[Any]]) -> tuple[bytes, bytes] | None:
    """The values of `Answered` for files in the form of `command_rows`."""
    if not files:
        return None
    return items_digest([item for _, _, item, _ in files]), b"".join([digest for _, digest, _, _ in files])


def _since(commands: dict[UUID, CommandState], saved: int) -> list[tuple[UUID, CommandState]]:
    """The commands with events after `saved`. Commands are in the order of their events, so these are the last ones."""
    found = []
    for item in reversed(commands.items()):
        if item[1].last_sequence <= saved:
            break
        found.append(item)
    found.reverse()
    return found


STATEMENT_ROWS = 64
"""The most rows in one statement. With four columns this is well below the 999 values that every SQLite accepts."""

STATEMENT_BYTES = 4 << 20
"""A statement is carried out when its values take this many bytes."""


class Many:
    """Gathers rows and writes many with one statement; `flush` writes the last ones. Blocks on the file."""

    def __init__(self, connection: Connection, statement: Callable[[str], str], columns: int) -> None:
        """`statement` gets the placeholders of the rows: `(?, ?), (?, ?)` for two of two columns, `?, ?` for one."""
        self._connection = connection
        self._statement = statement
        self._row = f"({', '.join('?' * columns)})" if columns > 1 else "?"
        self._values: list[Any] = []
        self._rows = self._bytes = 0

    def add(self, *row: Any) -> None:
        """Add a row. Raises sqlite3.Error, perhaps about an earlier row."""
        self._values += row
        self._rows += 1
        self._bytes += len(row[-1])
        if self._rows >= STATEMENT_ROWS or self._bytes >= STATEMENT_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait. Raises sqlite3.Error."""
        if self._rows:
            self._connection.execute(self._statement(", ".join([self._row] * self._rows)), self._values)
            self._values, self._rows, self._bytes = [], 0, 0


class Changes:
    """The changes of a save to the tables of a state file."""

    def __init__(self, connection: Connection) -> None:
        self.packages = Many(connection, "INSERT OR REPLACE INTO packages VALUES {}".format, 2)
        self.commands = Many(connection, "INSERT INTO commands VALUES {}".format, 3)
        self.answers = Many(connection, "INSERT INTO answers VALUES {}".format, 4)
        self.answered = Many(connection, "DELETE FROM commands WHERE package_id IN ({})".format, 1)
        """Packages whose commands have become answers."""

    def flush(self) -> None:
        """Write all rows that wait. Raises sqlite3.Error."""
        for many in (self.packages, self.commands, self.answers, self.answered):
            many.flush()
