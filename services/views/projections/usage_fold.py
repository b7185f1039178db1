"""Usage: the number of packages, files and bytes received, per producer, retention class and day of the events' time.

The totals of one producer are shared by packages of all partitions, so folds only add to them: the sums do not depend
on the order of packages. An event that was applied twice would show here for ever.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Table, func
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError
from artifact_store.events import Event, PackageCreated
from schemas.runs import Entry, FileFields
from services.views.bulk import insert_rows, on_postgresql, update_rows, upsert
from services.views.projections.port import Tables, follows, known_packages
from services.views.tables import usage_packages, usage_totals

DAY = 86_400_000_000
"""The length of a day in µs; a day begins at midnight UTC."""

_MEASURES = ("packages", "files", "bytes")
_TOTALS_AT_ONCE = 1000
"""Rows in one statement: with six values each, it stays below both databases' limit (32,766 parameters)."""

_Key = tuple[str, str, int]


@dataclass(slots=True)
class _Package:
    last_sequence: int
    producer: str
    retention_class: str
    begun_here: bool = False


class UsageProjection:
    """`usage_totals`, and `usage_packages` with the producer and class under which a package's events are counted."""

    name = "usage"
    layout = 1
    tables: Sequence[Table] = (usage_totals, usage_packages)

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Entry]) -> None:
        """As `Projection.fold`. The totals are written last: until the transaction ends, other folds wait for them."""
        table = tables["usage_packages"]
        row = table.c
        columns = (row.last_event_sequence, row.producer, row.retention_class)
        known = await known_packages(connection, row.package_id, columns, events)
        packages = {package_id: _Package(*found) for package_id, found in known.items()}
        totals: dict[_Key, list[int]] = {}
        _follow_all(packages, totals, events)
        begun = [
            (package_id, p.producer, p.retention_class, p.last_sequence)
            for package_id, p in packages.items()
            if p.begun_here
        ]
        await insert_rows(connection, table, begun)
        await _advance(connection, table, packages)
        await _add(connection, tables["usage_totals"], totals)


def _follow_all(packages: dict[UUID, _Package], totals: dict[_Key, list[int]], entries: Sequence[Entry]) -> None:
    for entry in entries:
        package = packages.get(entry.package_id)
        if not follows(entry, package.last_sequence if package else 0):
            continue
        if isinstance(entry, Event) and isinstance(entry.payload, PackageCreated):
            created = entry.payload
            package = _Package(0, created.producer, created.retention_class, begun_here=True)
            packages[entry.package_id] = package
            _total(totals, package, entry)[0] += 1
        elif isinstance(entry, FileFields) and package:
            total = _total(totals, package, entry)
            total[1] += 1
            total[2] += entry.size_bytes
        if package:
            package.last_sequence = entry.sequence


def _total(totals: dict[_Key, list[int]], package: _Package, event: Entry) -> list[int]:
    """What the batch adds to the totals of the package's producer and class on the event's day.

    The items are packages, files and bytes.
    """
    key = (package.producer, package.retention_class, event.created_at // DAY)
    found = totals.get(key)
    if found is None:
        found = totals[key] = [0, 0, 0]
    return found


async def _advance(connection: AsyncConnection, table: Table, packages: Mapping[UUID, _Package]) -> None:
    """Update the rows of packages that earlier batches created, in one statement."""
    advanced = [(package_id, p.last_sequence) for package_id, p in packages.items() if not p.begun_here]
    await update_rows(connection, [table.c.package_id, table.c.last_event_sequence], advanced)


async def _add(connection: AsyncConnection, table: Table, totals: Mapping[_Key, Sequence[int]]) -> None:
    """Add to the totals, in the same order in all folds, so that they cannot deadlock."""
    rows = [(*key, *sums) for key, sums in sorted(totals.items())]
    for start in range(0, len(rows), _TOTALS_AT_ONCE):
        put = upsert(connection, table).values(rows[start : start + _TOTALS_AT_ONCE])
        adding = put.on_conflict_do_update(
            index_elements=list(table.primary_key.columns),
            set_={name: table.c[name] + put.excluded[name] for name in _MEASURES},
        )
        if on_postgresql(connection):  # it refuses a sum that does not fit the column
            await connection.execute(adding)
            continue
        kinds = [func.typeof(table.c[name]) for name in _MEASURES]
        if any(set(row) != {"integer"} for row in await connection.execute(adding.returning(*kinds))):
            raise CorruptError("a total of this producer and day has more than 64 bits")  # SQLite would round it
