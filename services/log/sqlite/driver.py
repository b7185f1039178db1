"""The sequencer's driver for the embedded log: every batch is one transaction on the file.

All processes may append, in turns. From before a batch is decided until it is committed, the writer holds a lock beside
the file, and it reads what others appended in the same transaction. So a lease needs no fence, and one object serves as
driver and lease.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from itertools import count, repeat
from pathlib import Path
from uuid import UUID

from blake3 import blake3

from artifact_store.errors import CorruptError, PushBackError, UnavailableError
from schemas.runs import commands_of, first_of
from services.log.sequencer.driver import Driver, Lease, Staged
from services.log.sqlite.file import (
    LogFile,
    decoded,
    end_offset,
    file_errors,
    offset_of,
    open_file,
    records_from,
    write_lock,
)
from services.log.sqlite.package_states import PackageStates


class SqliteDriver(Driver, Lease):
    """See `Driver` and `Lease`. Nothing is opened before the first batch."""

    exclusive = False

    def __init__(self, path: Path, identity: UUID) -> None:
        self._path = path
        self._identity = identity
        self._file: LogFile | None = None
        self._states = PackageStates(path)
        self._batch = ExitStack()
        self._known_end = 0
        """The end of the log when this process last saw it, including all that it had acknowledged until then,"""
        self._known_digest = b""
        """and BLAKE3 over the value of the record before it."""

    @property
    def identity(self) -> UUID:
        """See `Driver`; the id in the file."""
        return self._identity

    @property
    def state(self) -> PackageStates:
        """See `Lease`."""
        return self._states

    def take_over(
        self,
        partition: int,
        *,
        is_ours: Callable[[], bool],
        stopping: Callable[[], bool],
        progressed: Callable[[], None],
    ) -> SqliteDriver:
        """See `Driver`. What it knows of the log's end outlasts a lease."""
        return self

    def begin_batch(self, package_ids: Collection[UUID], *, appends: bool) -> None:
        """See `Lease`. Reads do not wait for other processes.

        Raises:
            PushBackError: another process held the file for too long.
            UnavailableError: the file is gone or cannot be read. LogIdentityError: another one is in its place.
            CorruptError: it is damaged, or lacks what this process knows to be in it.
        """
        try:
            with file_errors(self._path), ExitStack() as batch:
                connection = self._opened()
                # Before the lock is taken, because it can take long.
                self._states.read_ahead(package_ids, all_known=end_offset(connection) == self._states.next_offset)
                if appends:
                    batch.enter_context(write_lock(self._path))
                batch.callback(self._roll_back)
                connection.execute("BEGIN IMMEDIATE" if appends else "BEGIN")
                self._see_end(connection)
                self._batch = batch.pop_all()
        except PushBackError:
            raise
        except BaseException:
            self.close()
            raise

    def end_batch(self) -> None:
        """See `Lease`."""
        self._batch.close()

    def hand_over(self, staged: Sequence[Staged]) -> list[bytes]:
        """See `Lease`. Raises UnavailableError."""
        values: list[bytes] = []
        with self._in_doubt():
            for events, encoded, _, _ in staged:
                first = first_of(events)
                rows = zip(
                    count(self._states.next_offset + len(values)),
                    repeat(first.package_id.bytes),
                    count(first.sequence),
                    [command.command_id.bytes for command in commands_of(events) for _ in range(len(command))],
                    encoded,
                    strict=False,
                )
                self._states.connection.executemany("INSERT INTO events VALUES (?, ?, ?, ?, ?)", rows)
                values += encoded
        return values

    def commit(self, values: Sequence[bytes]) -> None:
        """See `Lease`. Raises UnavailableError."""
        with self._in_doubt():
            self._states.connection.execute("COMMIT")
        self._states.next_offset += len(values)
        self._known_end, self._known_digest = self._states.next_offset, _digest(values[-1])

    def offset_of(self, package_id: UUID, sequence: int) -> int | None:
        """See `Lease`. Raises UnavailableError."""
        with self._in_doubt():
            return offset_of(self._states.connection, package_id, sequence)

    def close(self) -> None:
        """See `Lease`. Closes the connection and forgets the states."""
        self._states.clear()
        file, self._file = self._file, None
        if file is not None:
            file.close()

    def _opened(self) -> sqlite3.Connection:
        if self._file is None:
            self._file = open_file(self._path, writable=True, identity=self._identity)
            self._states.connection = self._file.connection
        self._file.check_in_place()
        return self._file.connection

    @contextmanager
    def _in_doubt(self) -> Iterator[None]:
        """Raise errors as passing ones: the next batches find out what is wrong, perhaps with one package alone."""
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(f"the log {self._path}: {error}") from error

    def _roll_back(self) -> None:
        if self._file is not None and self._file.connection.in_transaction:
            with suppress(sqlite3.Error):
                self._file.connection.execute("ROLLBACK")

    def _see_end(self, connection: sqlite3.Connection) -> None:
        """Learn what other processes have appended. Raises CorruptError when the log lost what it had before."""
        end = end_offset(connection)
        self._require_known(connection, end)
        if end != self._states.next_offset:
            self._states.outdate()
            last = records_from(connection, end - 1, None, 1)[0]
            self._states.last_created_at = decoded(last).created_at
            self._states.next_offset = self._known_end = end
            self._known_digest = _digest(last.value)

    def _require_known(self, connection: sqlite3.Connection, end: int) -> None:
        offset = self._known_end - 1
        if offset < 0:
            return
        found = f"ends at offset {end}"
        for record in records_from(connection, offset, offset + 1, 1):
            if (digest := _digest(record.value)) == self._known_digest:
                return
            found = f"holds a record with digest {digest.hex()} there"
        raise CorruptError(
            f"the log {self._path} lost what it had acknowledged: this process knows the record at offset {offset} "
            f"with digest {self._known_digest.hex()}, but the log {found}. Put the newer file back; or accept the loss "
            "by starting this process again"
        )


def _digest(value: bytes) -> bytes:
    return blake3(value).digest()
