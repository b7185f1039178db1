"""The SQLite file: its tables, connections to it, and queries on its events. Everything except `Readers` blocks.

The file carries this project's application id, a format number and the log's identity. It is in WAL mode, so that
readers never wait for a writer, and a commit is on the disk when it returns (`synchronous=FULL`). The answer to every
query is bounded in rows and bytes. `Readers` runs queries in a few threads, so that the event loop never waits for the
disk.
"""

from __future__ import annotations

import asyncio
import itertools
import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from threading import Lock
from typing import TypeVar
from uuid import UUID, uuid4

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    CorruptError,
    LogIdentityError,
    PushBackError,
    UnavailableError,
)
from artifact_store.events import Event
from schemas.codec import UndecodableEventError, decode
from services.log.port import Record
from services.runtime.file_system import PRIVATE_FOLDER, FileLock, private_file, secure_folder

PARTITION = 0
"""The only partition."""

LOCK_SECONDS = 10.0
"""How long a writer waits for the transaction of another process."""

_APPLICATION_ID = 0x61727473
_FORMAT = 1

_TABLES = (
    "CREATE TABLE log (identity BLOB NOT NULL)",
    # Offsets count from 0 without gaps; a row is never changed or deleted.
    """CREATE TABLE events (
        offset INTEGER PRIMARY KEY,
        package_id BLOB NOT NULL,
        sequence INTEGER NOT NULL,
        command_id BLOB NOT NULL,
        value BLOB NOT NULL,
        UNIQUE (package_id, sequence))""",
    """CREATE TABLE progress (
        projection TEXT NOT NULL,
        partition INTEGER NOT NULL,
        next_offset INTEGER NOT NULL,
        metadata TEXT NOT NULL,
        PRIMARY KEY (projection, partition))""",
)


class LogFile:
    """A connection to the file. Threads may share it, but only one may use it at a time."""

    def __init__(self, path: Path, connection: sqlite3.Connection, identity: UUID) -> None:
        self.path = path
        self.connection = connection
        self.identity = identity
        self._inode = _inode(path)

    def check_in_place(self) -> None:
        """Raise UnavailableError if the path no longer names the open file: writes to it would be lost."""
        if _inode(self.path) != self._inode:
            raise UnavailableError(f"the log {self.path} was removed or replaced while it was open")

    def close(self) -> None:
        """Close the connection. Blocks: the last one to close moves the WAL into the file."""
        self.connection.close()


def open_file(path: Path, *, writable: bool = False, identity: UUID | None = None) -> LogFile:
    """Connect to the log at `path`. Blocks. Only a `writable` connection can change it.

    Raises:
        UnavailableError: the file does not exist or cannot be opened.
        ConfigurationError: it is not a log, or a newer version made it.
        CorruptError: it is damaged.
        LogIdentityError: it has another identity than `identity`.
    """
    if not path.exists():
        raise UnavailableError(f"there is no log at {path}; `artifact-store migrate` creates it")
    with file_errors(path):
        connection = _connect(path, "rw")
        try:
            if _is_new(path, connection):
                raise UnavailableError(f"the log {path} is empty; `artifact-store migrate` completes it")
            row = connection.execute("SELECT CAST(identity AS BLOB) FROM log").fetchone()
            if row is None or len(row[0] or b"") != 16:
                raise CorruptError(f"the log {path} is damaged: it does not say which log it is")
            found = UUID(bytes=row[0])
            if identity not in (None, found):
                raise LogIdentityError(f"{path} holds log {found} where log {identity} was before")
            if not writable:
                connection.execute("PRAGMA query_only = ON")
            return LogFile(path, connection, found)
        except BaseException:
            connection.close()
            raise


def create_file(path: Path) -> None:
    """Create the log and its folder, or check the existing log. Blocks. Several processes may call it at once.

    Raises as `open_file`, and PushBackError if another process holds the file for too long.
    """
    with file_errors(path):
        if path.exists():
            with closing(_connect(path, "rw")) as connection:
                if not _is_new(path, connection):
                    return
        path.parent.mkdir(PRIVATE_FOLDER, parents=True, exist_ok=True)
        with write_lock(path), closing(_connect(private_file(path), "rw")) as connection:
            if not _is_new(path, connection):
                return
            if connection.execute("PRAGMA journal_mode = WAL").fetchone() != ("wal",):
                raise ConfigurationError(f"the file system of {path} has no shared memory; put the log on a local disk")
            secure_folder(path.parent)  # before another process can take this for a log and append to it
            connection.execute("BEGIN IMMEDIATE")
            for table in _TABLES:
                connection.execute(table)
            connection.execute("INSERT INTO log VALUES (?)", (uuid4().bytes,))
            connection.execute(f"PRAGMA application_id = {_APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {_FORMAT}")
            connection.execute("COMMIT")


@contextmanager
def write_lock(path: Path) -> Iterator[None]:
    """Exclude all other writes to the log and checkpoints of it, in any process. Blocks.

    SQLite before 3.51.3 can lose committed pages when one connection checkpoints while another commits (its "WAL-reset
    bug"). A checkpoint runs after a commit, outside SQLite's own lock; this lock keeps the two apart.

    Raises PushBackError if another process holds the lock for more than LOCK_SECONDS.
    """
    lock = FileLock(path.with_name(path.name + ".lock"))
    if not lock.take(LOCK_SECONDS):
        raise PushBackError(f"another process has been writing to {path} for more than {LOCK_SECONDS:.0f} s")
    try:
        yield
    finally:
        lock.release()


@contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Translate errors of SQLite and the system into errors that say what the caller should do."""
    try:
        yield
    except sqlite3.Error as error:
        raise _translated(path, error) from error
    except OSError as error:
        raise UnavailableError(f"the log {path}: {error.strerror}") from error


def _translated(path: Path, error: sqlite3.Error) -> ArtifactStoreError:
    text = f"the log {path}: {error}"
    match getattr(error, "sqlite_errorcode", 0) & 0xFF:
        case sqlite3.SQLITE_NOTADB:
            return ConfigurationError(f"{path} is not a log but some other file; set another log URL")
        case sqlite3.SQLITE_CORRUPT | sqlite3.SQLITE_CONSTRAINT:
            return CorruptError(text)
        case sqlite3.SQLITE_BUSY | sqlite3.SQLITE_LOCKED:
            return PushBackError(text)
    return UnavailableError(text)


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode={mode}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=LOCK_SECONDS,
    )
    connection.execute("PRAGMA synchronous = FULL")
    # Only for macOS, where a plain fsync leaves data in the drive's cache.
    connection.execute("PRAGMA fullfsync = ON")
    connection.execute("PRAGMA checkpoint_fullfsync = ON")
    return connection


def _is_new(path: Path, connection: sqlite3.Connection) -> bool:
    """Whether the file has no tables yet. Raises ConfigurationError if it is not a log of this version."""
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    (tables,) = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
    if (application, version, tables) == (0, 0, 0):
        return True
    if application != _APPLICATION_ID:
        raise ConfigurationError(f"{path} is not a log but another program's database; set another log URL")
    if version != _FORMAT:
        raise ConfigurationError(f"{path} has log format {version}, this version reads {_FORMAT}; use a newer version")
    return False


def _inode(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


BATCH_RECORDS = 500
_BATCH_BYTES = 4 << 20
"""A batch ends early with this many bytes, because a record with a manifest takes half a megabyte."""

_COLUMNS = "offset, CAST(package_id AS BLOB), CAST(sequence AS INTEGER), CAST(value AS BLOB)"
"""A damaged row may hold any type. The casts give readers the types that they expect; readers check the values."""

_NO_END = (1 << 63) - 1


def end_offset(connection: sqlite3.Connection) -> int:
    """The offset after the last event."""
    (last,) = connection.execute("SELECT max(offset) FROM events").fetchone()
    return 0 if last is None else last + 1


def records_from(connection: sqlite3.Connection, offset: int, end: int | None, limit: int) -> list[Record]:
    """The records from `offset`, to before `end` if given. Raises CorruptError if one between them is missing."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events WHERE offset >= ? AND offset < ? ORDER BY offset LIMIT ?",  # noqa: S608 - ours
        (offset, _NO_END if end is None else end, limit),
    )
    found = _bounded(rows)
    if found and found[-1].offset != offset + len(found) - 1:  # they are numbered without gaps
        there = {record.offset for record in found}
        gap = next(expected for expected in itertools.count(offset) if expected not in there)
        raise CorruptError(f"the log's record at offset {gap} is gone, but later ones are there")
    return found


def package_records_from(
    connection: sqlite3.Connection, package_id: UUID, sequence: int, end: int | None, limit: int
) -> list[Record]:
    """The package's records after its event `sequence`, to before offset `end` if given."""
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events"  # noqa: S608 - our own
        " WHERE package_id = ? AND sequence > ? AND offset < ? ORDER BY sequence LIMIT ?",
        (package_id.bytes, sequence, _NO_END if end is None else end, limit),
    )
    return _bounded(rows)


def sequence_before(connection: sqlite3.Connection, package_id: UUID, offset: int) -> int:
    """The sequence of the package's last event before `offset`, 0 if there is none. Raises as `numbered`."""
    if not offset:
        return 0
    rows = connection.execute(
        f"SELECT {_COLUMNS} FROM events"  # noqa: S608 - our own
        " WHERE package_id = ? AND offset < ? ORDER BY sequence DESC LIMIT 1",
        (package_id.bytes, offset),
    )
    return max((numbered(record).sequence for record in _bounded(rows)), default=0)


def offset_of(connection: sqlite3.Connection, package_id: UUID, sequence: int) -> int | None:
    """The offset of the package's event with this sequence; None if there is none."""
    query = "SELECT offset FROM events WHERE package_id = ? AND sequence = ?"
    row = connection.execute(query, (package_id.bytes, sequence)).fetchone()
    return None if row is None else int(row[0])


def sequence_of(connection: sqlite3.Connection, package_id: UUID) -> int:
    """The sequence under which the log lists the package's last event, 0 if there is none. Decodes nothing."""
    (last,) = connection.execute(
        "SELECT CAST(max(sequence) AS INTEGER) FROM events WHERE package_id = ?", (package_id.bytes,)
    ).fetchone()
    return last or 0


def progress_of(connection: sqlite3.Connection, projection: str) -> Mapping[int, tuple[int, str]]:
    """What the projection has committed: the next offset and the metadata, by partition."""
    rows = connection.execute(
        "SELECT partition, next_offset, metadata FROM progress WHERE projection = ?", (projection,)
    ).fetchall()
    return {partition: (offset, metadata) for partition, offset, metadata in rows}


def store_progress(connection: sqlite3.Connection, projection: str, next_offset: int, metadata: str) -> None:
    """Store what `progress_of` reads."""
    connection.execute(
        "INSERT INTO progress VALUES (?, ?, ?, ?) ON CONFLICT (projection, partition)"
        " DO UPDATE SET next_offset = excluded.next_offset, metadata = excluded.metadata",
        (projection, PARTITION, next_offset, metadata),
    )


def decoded(record: Record) -> Event:
    """The record's event. Raises CorruptError, which names the record's partition and offset."""
    try:
        return decode(record.value)
    except UndecodableEventError as error:
        raise CorruptError(
            f"the log's record at partition {record.partition}, offset {record.offset}: {error}"
        ) from None


def numbered(record: Record) -> Event:
    """As `decoded`. Also raises CorruptError if the log lists the event under a sequence that is not its own.

    Reading on after such an event would give the same record again, or miss others.
    """
    event = decoded(record)
    if record.sequence != event.sequence:
        raise CorruptError(
            f"the log's record at offset {record.offset} is listed as event {record.sequence} of its package, and is"
            f" event {event.sequence}"
        )
    return event


def _bounded(rows: Iterable[tuple[int, bytes | None, int | None, bytes | None]]) -> list[Record]:
    found: list[Record] = []
    size = 0
    for offset, package_id, sequence, value in rows:
        key = str(UUID(bytes=package_id)).encode() if package_id and len(package_id) == 16 else b""
        found.append(Record(PARTITION, offset, key, value or b"", sequence))
        size += len(found[-1].value)
        if size >= _BATCH_BYTES:
            break
    return found


_T = TypeVar("_T")
_THREADS = 4


class Readers:
    """Runs queries. Remembers the log's identity from the first connection, and refuses another log after that."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._pool = ThreadPoolExecutor(_THREADS, thread_name_prefix="log-read")
        self._idle: list[LogFile] = []
        self._identity: UUID | None = None
        self._lock = Lock()

    async def run(self, work: Callable[[LogFile], _T]) -> _T:
        """Run `work` in a thread. Raises what `work` raises, and as `open_file`."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, self._run, work)

    async def close(self) -> None:
        """Wait for running queries and close the connections."""
        await asyncio.to_thread(self._pool.shutdown)
        while self._idle:
            self._idle.pop().close()

    def _run(self, work: Callable[[LogFile], _T]) -> _T:
        file = self._take()
        try:
            with file_errors(self._path):
                file.check_in_place()
                result = work(file)
        except BaseException:
            # The connection itself may be broken: the next query opens a new one.
            file.close()
            raise
        with self._lock:
            self._idle.append(file)
        return result

    def _take(self) -> LogFile:
        with self._lock:
            if self._idle:
                return self._idle.pop()
        file = open_file(self._path, identity=self._identity)
        with self._lock:
            self._identity = file.identity
        return file
