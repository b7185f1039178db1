"""The sequencer's driver for the embedded log: every batch is one transaction on the file.

All processes may append, in turns. From before a batch is decided until it is committed, the writer holds a lock beside
the file, and in the same transaction it reads what others have appended. So a lease needs no fence, and one object
serves as driver and lease.
"""

from __future__ import annotations

import random
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count, repeat
from pathlib import Path
from uuid import UUID

from blake3 import blake3

from artifact_store.errors import CorruptError, PushBackError, UnavailableError
from artifact_store.events import Event
from schemas.runs import commands_of, first_of
from services.core.state import FINALIZED, PackageState, evolve, evolve_all
from services.log.sequencer.driver import Driver, Lease, Staged, State
from services.log.sqlite.file import (
    BATCH_RECORDS,
    LogFile,
    decoded,
    end_offset,
    file_errors,
    numbered,
    offset_of,
    open_file,
    package_records_from,
    records_from,
    sequence_of,
    write_lock,
)
from services.log.state.state_file import Irregular

LARGE = 1_000
"""A state with more entries than this is large, and never dropped in favour of small ones. Reading an event takes about
25 µs, so a small state is read back within 25 ms."""

MAX_SMALL = 100_000
"""The most entries of all small or finalized states together. An entry is a file, a folder or a command. It takes
0.9 KiB if commands have hundreds of files each, and 0.6 KiB if each has one, which makes two entries."""

MAX_LARGE = 600_000
"""The most entries of all large open states together: three packages of 100,000 files that came one by one, or six
whose files came many at once. That is at most 550 MiB. The packages of the current batch are always kept."""


@dataclass
class _Kept:
    """States with a common bound, the least recently used one first."""

    max_entries: int
    states: OrderedDict[UUID, tuple[PackageState, int, int]] = field(default_factory=OrderedDict)
    """Each state with its number of entries, and the turn (see `PackageStates`) in which it had all events."""
    entries: int = 0

    def put(self, state: PackageState, entries: int, turn: int) -> None:
        self.states[state.package_id] = (state, entries, turn)
        self.entries += entries

    def take(self, package_id: UUID) -> PackageState | None:
        state, entries, _ = self.states.pop(package_id, (None, 0, 0))
        self.entries -= entries
        return state

    @property
    def too_much(self) -> bool:
        return self.entries > self.max_entries


class PackageStates(State):
    """A bounded cache of package states, which a writer keeps between batches: see `State`.

    Other processes append too, so a state in the cache may lack events. It is brought up to date from the log before it
    is used. A state that was dropped from the cache is read from the log again. Set `connection`, from which events are
    read, before anything else.
    """

    connection: sqlite3.Connection

    def __init__(
        self,
        path: Path,
        *,
        max_small: int = MAX_SMALL,
        max_large: int = MAX_LARGE,
        large: int = LARGE,
        chance: random.Random | None = None,
    ) -> None:
        self.last_created_at = 0
        self.next_offset = 0
        self.memory_only = None
        self.pinned = set()
        self._path = path
        self._irregular = Irregular()
        self._turn = 1
        """Increases when others have appended. A state that was complete in the current turn lacks nothing."""
        self._small = _Kept(max_small)
        self._large = _Kept(max_large)
        self._large_from = large
        self._chance = chance or random.Random()

    def __contains__(self, package_id: UUID) -> bool:
        return package_id in self._small.states or package_id in self._large.states

    @property
    def irregular(self) -> Irregular:
        """See `State`. Always empty: a file that breaks an invariant must be restored from a copy."""
        return self._irregular

    def read_ahead(self, package_ids: Collection[UUID], *, all_known: bool) -> None:
        """Bring these packages up to date and keep them for the next batch, except those that are `away`.

        `all_known` says that nothing was appended since the last batch. If a package breaks an invariant, its requests
        get the error later.
        """
        self.pinned = set(package_ids)
        for package_id in self.pinned.intersection(self._small.states):
            self._small.states.move_to_end(package_id)
        if not all_known:
            self.outdate()
        for package_id in package_ids:
            if not all_known or package_id not in self:
                with suppress(CorruptError):
                    if not self.away(package_id):
                        self.package(package_id)

    def package(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """See `State`. Includes every event that the connection sees. Blocks. Raises as `file_errors`.

        Also raises CorruptError if the log lists an event of the package under a wrong sequence.
        """
        kept = self._small.states.get(package_id) or self._large.states.get(package_id)
        if kept is not None and kept[2] == self._turn:
            return kept[0]
        with file_errors(self._path):
            state = _read(self.connection, package_id, self._take(package_id))
        if state is not None:
            self._keep(state, self._turn)
        return state

    def outdate(self) -> None:
        """Note that others have appended: states may lack events, and are brought up to date when they are used."""
        self._turn += 1

    def fold(self, before: PackageState | None, events: Sequence[Event]) -> PackageState:
        """See `State`."""
        state = evolve_all(before, events)
        self._keep(state, self._turn)
        self.last_created_at = max(self.last_created_at, state.last_event_at)
        return state

    def away(self, package_id: UUID) -> bool:
        """See `State`."""
        if package_id in self:
            return False
        with file_errors(self._path):
            return sequence_of(self.connection, package_id) > self._large_from

    def loading(self, package_id: UUID) -> Callable[[], PackageState | None]:
        """See `State`."""

        def load() -> PackageState | None:
            with file_errors(self._path), closing(open_file(self._path)) as file:
                return _read(file.connection, package_id, None)

        return load

    def adopt(self, package: PackageState) -> None:
        """See `State`."""
        self._keep(package, 0)

    def _keep(self, state: PackageState, turn: int) -> None:
        """Put the state into the cache, and drop others beyond the bounds."""
        self._take(state.package_id)
        entries = 1 + state.entries
        # A finalized package gets nothing but retries.
        if entries > self._large_from and state.status != FINALIZED:
            self._large.put(state, entries, turn)
            self._forget_large(state.package_id)
        else:
            self._small.put(state, entries, turn)
            self._forget_small(state.package_id)

    def clear(self) -> None:
        """Drop all states: a transaction failed, so they may have events that the log does not have."""
        self.last_created_at = self.next_offset = 0
        for kept in (self._small, self._large):
            kept.states.clear()
            kept.entries = 0

    def _take(self, package_id: UUID) -> PackageState | None:
        small = self._small.take(package_id)
        return small if small is not None else self._large.take(package_id)

    def _forget_small(self, used: UUID) -> None:
        while self._small.too_much:
            oldest = next(iter(self._small.states))
            if oldest == used or oldest in self.pinned:  # all after it are used or pinned too
                return
            self._small.take(oldest)

    def _forget_large(self, used: UUID) -> None:
        """Pick two states at random and drop the smaller one, which is cheaper to read again.

        If more packages are used in turn than fit, dropping the least recently used one would always drop the next one
        that is needed. Dropping the smallest of all would keep large states that nobody uses any more.
        """
        kept = self._large.states
        while self._large.too_much:
            others = [other for other in kept if other != used and other not in self.pinned]
            if not others:
                return
            drawn = self._chance.sample(others, min(2, len(others)))
            self._large.take(min(drawn, key=lambda other: kept[other][1]))


def _read(connection: sqlite3.Connection, package_id: UUID, state: PackageState | None) -> PackageState | None:
    """The state with all events that the connection sees; None for a package that does not exist."""
    while True:
        known = 0 if state is None else state.sequence
        records = package_records_from(connection, package_id, known, None, BATCH_RECORDS)
        for record in records:
            state = evolve(state, numbered(record))
        if not records:
            return state


class SqliteDriver(Driver, Lease):
    """See `Driver` and `Lease`. The file is opened by the first batch."""

    exclusive = False

    def __init__(self, path: Path, identity: UUID) -> None:
        self._path = path
        self._identity = identity
        self._file: LogFile | None = None
        self._states = PackageStates(path)
        self._batch = ExitStack()
        self._known_end = 0
        """The log's end when this process last saw it, which covers everything that it had acknowledged until then."""
        self._known_digest = b""
        """BLAKE3 over the value of the record before that end."""

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
        """See `Driver`. The known end of the log outlasts a lease."""
        return self

    def begin_batch(self, package_ids: Collection[UUID], *, appends: bool) -> None:
        """See `Lease`. Reads do not wait for other processes.

        Raises:
            PushBackError: another process held the file for too long.
            UnavailableError: the file is gone or cannot be read. LogIdentityError: another one is in its place.
            CorruptError: it is damaged, or lacks a record that this process has seen in it.
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
        """Turn SQLite's errors into UnavailableError. If one persists, the next batches find out what is wrong."""
        try:
            yield
        except sqlite3.Error as error:
            raise UnavailableError(f"the log {self._path}: {error}") from error

    def _roll_back(self) -> None:
        if self._file is not None and self._file.connection.in_transaction:
            with suppress(sqlite3.Error):
                self._file.connection.execute("ROLLBACK")

    def _see_end(self, connection: sqlite3.Connection) -> None:
        """Note what other processes have appended. Raises CorruptError if the log lost records that it had before."""
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
