"""The package states that a writer keeps between transactions, bounded by how much they hold."""

from __future__ import annotations

import sqlite3
from collections import OrderedDict
from uuid import UUID

from services.core.evolve import evolve
from services.core.state import PackageState
from services.log.sqlite.records import BATCH_RECORDS, decoded, package_records_from

MAX_ENTRIES = 100_000
"""Files and commands of all kept states together, at about a kilobyte each; a larger state is kept while it is used."""


class PackageStates:
    """States as of some moment; `current` brings one up to date from the log. What is forgotten is read again."""

    def __init__(self, max_entries: int = MAX_ENTRIES) -> None:
        self._max_entries = max_entries
        self._states: OrderedDict[UUID, tuple[PackageState, int]] = OrderedDict()
        self._entries = 0

    def __contains__(self, package_id: UUID) -> bool:
        return package_id in self._states

    def current(self, connection: sqlite3.Connection, package_id: UUID) -> PackageState | None:
        """The state with every event that the connection sees; None for a package that does not exist. Blocks.

        Raises CorruptError when the package's history breaks an invariant.
        """
        state = self._take(package_id)
        while True:
            known = 0 if state is None else state.sequence
            records = package_records_from(connection, package_id, known, None, BATCH_RECORDS)
            for record in records:
                state = evolve(state, decoded(record))
            if not records:
                break
        if state is not None:
            self.keep(state)
        return state

    def keep(self, state: PackageState) -> None:
        """Remember the state, forgetting those that were used longest ago."""
        self._take(state.package_id)
        entries = 1 + len(state.files) + len(state.commands)
        self._states[state.package_id] = (state, entries)
        self._entries += entries
        while self._entries > self._max_entries and len(self._states) > 1:
            _, (_, dropped) = self._states.popitem(last=False)
            self._entries -= dropped

    def clear(self) -> None:
        """Forget everything: a transaction failed, and states may hold events that the log does not."""
        self._states.clear()
        self._entries = 0

    def _take(self, package_id: UUID) -> PackageState | None:
        state, entries = self._states.pop(package_id, (None, 0))
        self._entries -= entries
        return state
