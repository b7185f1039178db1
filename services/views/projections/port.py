"""What a projection is: a named, deterministic fold of the log into its own tables.

Every fold checks that each event's sequence is its package's last one plus one. `known_packages` finds the last
sequences, and `follows` compares.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol
from uuid import UUID

from sqlalchemy import Column, Table
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError
from artifact_store.events import FILE_INGESTED, Event, PackageCreated
from schemas.runs import Entry, FileFields
from services.views.bulk import find_rows

Tables = Mapping[str, Table]
"""One generation of a projection's tables, by the names that they have when that generation is live."""


class Projection(Protocol):
    """A fold. Its rows depend only on the events: not on batch sizes, clocks, offsets, or the current seeds."""

    @property
    def name(self) -> str:
        """The name in commands and checkpoints."""

    @property
    def layout(self) -> int:
        """The version of the tables' layout; raised with every change to columns, or to what the fold writes."""

    @property
    def tables(self) -> Sequence[Table]:
        """The tables that only this projection writes, in the order of its digest."""

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Entry]) -> None:
        """Apply events, in order per package, to one generation of the tables within the connection's transaction.

        Touches only rows of the events' own packages, and totals that commute. A repeated event is skipped. Raises
        CorruptError if an event does not follow the events folded before it: a gap, or an impossible order.
        """


async def known_packages(
    connection: AsyncConnection, key: Column[UUID], columns: Sequence[Column[Any]], events: Sequence[Entry]
) -> dict[UUID, tuple[Any, ...]]:
    """The view's values of `columns` for the events' packages, by package id.

    If there are several events, packages whose first event is among them are left out: their rows are yet to be
    inserted. If such a first event is a repeat, its package has a row already, and the insert fails. The batch is then
    halved down to single events, and the repeat is recognised.
    """
    if len(events) == 1:
        return {row[0]: row[1:] for row in await find_rows(connection, [key, *columns], [events[0].package_id])}
    begun: set[UUID] = set()
    wanted: list[UUID] = []
    last: UUID | None = None
    for event in events:
        package_id = event.package_id
        if package_id is not last and package_id not in begun:
            begun.add(package_id)
            if event.sequence != 1:
                wanted.append(package_id)
        last = package_id
    return {row[0]: row[1:] for row in await find_rows(connection, [key, *columns], wanted)}


def follows(event: Entry, last_sequence: int) -> bool:
    """Whether the event is the one after `last_sequence` (0: the package is unknown); False if it is a repeat.

    Tools that mirror a topic repeat records, so a fold skips repeated events. Raises CorruptError: it is neither.
    """
    if 1 <= event.sequence <= last_sequence:
        return False
    creates = isinstance(event, Event) and isinstance(event.payload, PackageCreated)
    if event.sequence == last_sequence + 1 and creates == (event.sequence == 1):
        return True
    event_type = FILE_INGESTED if isinstance(event, FileFields) else event.event_type
    if event.sequence != last_sequence + 1:
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} ({event_type}) does not follow "
            f"event {last_sequence}, the last one that the view has"
        )
    raise CorruptError(
        f"package {event.package_id}: event {event.sequence} is {event_type}; "
        "the first event, and no other, creates a package"
    )
