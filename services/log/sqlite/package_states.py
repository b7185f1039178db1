"""The package states that a writer keeps between transactions, bounded by how much they hold."""

from __future__ import annotations

import random
import sqlite3
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field
from uuid import UUID

from services.core.evolve import evolve
from services.core.state import FINALIZED, PackageState
from services.log.sqlite.file import BATCH_RECORDS, numbered, package_records_from

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


class PackageStates:
    """States as of some moment; `current` brings one up to date from the log. What is forgotten is read again."""

    def __init__(
        self,
        *,
        max_small: int = MAX_SMALL,
        max_large: int = MAX_LARGE,
        large: int = LARGE,
        chance: random.Random | None = None,
    ) -> None:
        self._small = _Kept(max_small)
        self._large = _Kept(max_large)
        self._large_from = large
        self._pinned: frozenset[UUID] = frozenset()
        self._chance = chance or random.Random()

    def __contains__(self, package_id: UUID) -> bool:
        return package_id in self._small.states or package_id in self._large.states

    def pin(self, package_ids: Iterable[UUID]) -> None:
        """From now on keep these, and no longer those that were pinned before."""
        self._pinned = frozenset(package_ids)
        for package_id in self._pinned.intersection(self._small.states):
            self._small.states.move_to_end(package_id)

    def current(self, connection: sqlite3.Connection, package_id: UUID) -> PackageState | None:
        """The state with every event that the connection sees; None for a package that does not exist. Blocks.

        Raises CorruptError when the package's history, or how the log lists it, breaks an invariant.
        """
        state = self._take(package_id)
        while True:
            known = 0 if state is None else state.sequence
            records = package_records_from(connection, package_id, known, None, BATCH_RECORDS)
            for record in records:
                state = evolve(state, numbered(record))
            if not records:
                break
        if state is not None:
            self.keep(state)
        return state

    def keep(self, state: PackageState) -> None:
        """Remember the state, forgetting others beyond the bounds."""
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
        for kept in (self._small, self._large):
            kept.states.clear()
            kept.entries = 0

    def _take(self, package_id: UUID) -> PackageState | None:
        small = self._small.take(package_id)
        return small if small is not None else self._large.take(package_id)

    def _forget_small(self, used: UUID) -> None:
        while self._small.too_much:
            oldest = next(iter(self._small.states))
            if oldest == used or oldest in self._pinned:  # so is what comes after it
                return
            self._small.take(oldest)

    def _forget_large(self, used: UUID) -> None:
        """Forget the smaller of two that are drawn, as the cheaper one to read again.

        When more take turns than there is room for, the one that was used longest ago would be the next to be asked
        for, each time; and if it were the smallest of all, those that nobody uses any more would never go.
        """
        kept = self._large.states
        while self._large.too_much:
            others = [other for other in kept if other != used and other not in self._pinned]
            if not others:
                return
            drawn = self._chance.sample(others, min(2, len(others)))
            self._large.take(min(drawn, key=lambda other: kept[other][1]))
