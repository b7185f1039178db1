"""The check that every reader makes: per package, each event's sequence is the last one plus one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any
from uuid import UUID

from sqlalchemy import Column, select
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.events import Event, PackageCreated
from services.errors import CorruptError

_CHUNK = 10_000  # identifiers in one statement; below what either database takes (32,766 parameters)


async def known_packages(
    connection: AsyncConnection, key: Column[UUID], columns: Sequence[Column[Any]], events: Iterable[Event]
) -> dict[UUID, tuple[Any, ...]]:
    """What a view holds of the events' packages: from package id to the values of `columns`.

    Packages whose first event is among the events are left out: their rows are yet to be inserted, and an insert of
    one that is there already fails by itself.
    """
    begun: set[UUID] = set()
    wanted: list[UUID] = []
    for package_id, sequence in ((event.package_id, event.sequence) for event in events):
        if package_id not in begun:
            begun.add(package_id)
            if sequence != 1:
                wanted.append(package_id)
    found: dict[UUID, tuple[Any, ...]] = {}
    for start in range(0, len(wanted), _CHUNK):
        query = select(key, *columns).where(key.in_(wanted[start : start + _CHUNK]))
        for row in await connection.execute(query):
            found[row[0]] = tuple(row[1:])
    return found


def check_follows(event: Event, last_sequence: int) -> None:
    """Raise CorruptError unless the event is the one after `last_sequence` (0: the package is not known)."""
    if event.sequence != last_sequence + 1:
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} ({event.event_type}) does not follow "
            f"event {last_sequence}, the last one that the view has"
        )
    if isinstance(event.payload, PackageCreated) != (event.sequence == 1):
        raise CorruptError(
            f"package {event.package_id}: event {event.sequence} is {event.event_type}; "
            "the first event, and no other, creates a package"
        )
