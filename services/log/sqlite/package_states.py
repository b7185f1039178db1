"""The state of the embedded log: package states that a writer keeps between batches, bounded by how much they hold.

Other processes append too, so that a kept state may lack events. Each is brought up to date from the log before it is
used, and what is forgotten is read again.
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
from services.core.evolve import evolve, evolve_all
from services.core.state import FINALIZED, PackageState
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
"""A state with more entries than this is large: it is never forgotten in favour of smaller ones. An event takes about
25 µs to read again, so that all others are back within 25 ms."""

MAX_SMALL = 100_000
"""Entries of all kept states that are small, or finalized, together. An entry is a file, a folder or a command. It
takes 0.9 KiB where commands bring hundreds of files each, 0.6 KiB where each brings one, so that a file makes two."""

MAX_LARGE = 600_000
"""Entries of all kept states that are large and open: three packages of 100,000 files that came one by one, six that
came many at once. At most 550 MiB; the packages of the batch at hand are kept whatever they hold."""


@dataclass
class _Kept:
    """States within one bound, the one that was used longest ago first."""

    max_entries: int
    states: OrderedDict[UUID, tuple[PackageState, int]] = field(default_factory=OrderedDict)
    entries: int = 0

    def put(self, state: PackageState, entries: int) -> None:
        self.states[state.package_id] = (state, entries)
        self.entries += entries

    def take(self, package_id: UUID) -> PackageState | None:
        state, entries = self.states.pop(package_id, (None, 0))
        self.entries -= entries
        return state

    @property
    def too_much(self) -> bool:
        return self.entries > self.max_entries


class PackageStates(State):
    """See `State`. `connection` is where events are read; it is set before anything is asked."""

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
        self._small = _Kept(max_small)
        self._large = _Kept(max_large)
        self._large_from = large
        self._chance = chance or random.Random()

    def __contains__(self, package_id: UUID) -> bool:
        return package_id in self._small.states or package_id in self._large.states

    @property
    def irregular(self) -> Irregular:
        """See `State`; nothing: what breaks an invariant here has no remedy but a copy of the file."""
        return self._irregular

    def read_ahead(self, package_ids: Collection[UUID], *, all_known: bool) -> None:
        """Bring these up to date, and keep them for the batch that is about to begin; those that are away excepted.

        `all_known` says that nothing was appended since the last batch. A broken package is left to its own requests.
        """
        self.pinned = set(package_ids)
        for package_id in self.pinned.intersection(self._small.states):
            self._small.states.move_to_end(package_id)
        for package_id in package_ids:
            if not all_known or package_id not in self:
                with suppress(CorruptError):
                    if not self.away(package_id):
                        self.package(package_id)

    def package(self, package_id: UUID, command_id: UUID | None = None) -> PackageState | None:
        """See `State`: every event of the package that the connection sees. Blocks. Raises as `file_errors`.

        CorruptError also when the log lists an event of the package in a wrong place.
        """
        with file_errors(self._path):
            state = _read(self.connection, package_id, self._take(package_id))
        if state is not None:
            self.adopt(state)
        return state

    def fold(self, before: PackageState | None, events: Sequence[Event]) -> PackageState:
        """See `State`."""
        state = evolve_all(before, events)
        self.adopt(state)
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

    def adopt(self, state: PackageState) -> None:
        """See `State`. Forgets others beyond the bounds."""
        self._take(state.package_id)
        entries = 1 + state.entries
        # Of one that is finalized there is nothing to come but a retry.
        if entries > self._large_from and state.status != FINALIZED:
            self._large.put(state, entries)
            self._forget_large(state.package_id)
        else:
            self._small.put(state, entries)
            self._forget_small(state.package_id)

    def clear(self) -> None:
        """Forget everything: a transaction failed, and states may hold events that the log does not."""
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
            if oldest == used or oldest in self.pinned:  # so is what comes after it
                return
            self._small.take(oldest)

    def _forget_large(self, used: UUID) -> None:
        """Forget the smaller of two that are drawn, as the cheaper one to read again.

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
