"""The state of the embedded log: a bounded cache of package states, which a writer keeps between batches.

Other processes append too, so a state in the cache may lack events. It is brought up to date from the log before it is
used. A state that was dropped from the cache is read from the log again.
"""

from __future__ import annotations

import random
import sqlite3
from collections import OrderedDict
from collections.abc import Callable, Collection, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field
from pathlib import Path
from uuid import UUID

from artifact_store.errors import CorruptError
from artifact_store.events import Event
from services.core.state import FINALIZED, PackageState, evolve, evolve_all
from services.log.sequencer.driver import State
from services.log.sqlite.file import (
    BATCH_RECORDS,
    file_errors,
    numbered,
    open_file,
    package_records_from,
    sequence_of,
)
from services.log.state.state_file import Irregular

LARGE = 1_000
"""A state with more entries than this is large, and never dropped in favour of small ones. Reading an event takes about
25 µs, so a small state is back within 25 ms."""

MAX_SMALL = 100_000
"""The most entries of all small or finalized states together. An entry is a file, a folder or a command. It takes
0.9 KiB if commands have hundreds of files each, and 0.6 KiB if each has one, which makes two entries."""

MAX_LARGE = 600_000
"""The most entries of all large open states together: three packages of 100,000 files that came one by one, or six
whose files came many at once. That is at most 550 MiB. The packages of the current batch are kept in any case."""


@dataclass
class _Kept:
    """States within one bound, the least recently used one first."""

    max_entries: int
    states: OrderedDict[UUID, tuple[PackageState, int, int]] = field(default_factory=OrderedDict)
    """Each with its entries, and the turn of the log in which it had all events."""
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
    """See `State`. Set `connection`, from which events are read, before anything else."""

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
        """Counts how often others have appended. A state lacks nothing until the next time."""
        self._small = _Kept(max_small)
        self._large = _Kept(max_large)
        self._large_from = large
        self._chance = chance or random.Random()

    def __contains__(self, package_id: UUID) -> bool:
        return package_id in self._small.states or package_id in self._large.states

    @property
    def irregular(self) -> Irregular:
        """See `State`. Always empty: the remedy for what breaks an invariant here is a copy of the file."""
        return self._irregular

    def read_ahead(self, package_ids: Collection[UUID], *, all_known: bool) -> None:
        """Bring these packages up to date and keep them for the next batch, except those that are `away`.

        `all_known` says that nothing was appended since the last batch. The requests for a package that breaks an
        invariant meet its error later.
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

        Raises CorruptError also when the log lists an event of the package under a wrong sequence.
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
        """Others have appended: states may lack events, and are brought up to date when they are asked for."""
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
        """Drop everything: a transaction failed, and states may hold events that the log does not."""
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
            if oldest == used or oldest in self.pinned:  # and so are all after it
                return
            self._small.take(oldest)

    def _forget_large(self, used: UUID) -> None:
        """Draw two states and drop the smaller one, which is cheaper to read again.

        When more take turns than there is room for, the one that was used longest ago would be the next to be asked
        for, each time; and if it were the smallest of all, those that nobody uses any more would never go.
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
