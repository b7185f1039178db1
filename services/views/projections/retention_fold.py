"""Retention: one row for each package, which says until when it must be kept; computed only from events.

The period counts from the package's creation while it is open, and from its finalization afterwards. Its length is the
one that was recorded at the creation, whatever the seeded classes say now.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.events import Event, PackageCreated, PackageFinalized
from schemas.runs import Entry
from services.core.lifecycle import retain_until
from services.views.bulk import insert_rows, update_rows
from services.views.projections.port import Tables, follows, known_packages
from services.views.tables import retention_state


@dataclass(slots=True)
class _Change:
    last_sequence: int
    retention_class: str
    days: int | None
    counted_from: int
    begun_here: bool = False


class RetentionProjection:
    """`retention_state`."""

    name = "retention"
    layout = 1
    tables: Sequence[Table] = (retention_state,)

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Entry]) -> None:
        """As `Projection.fold`. Takes at most three statements a batch."""
        table = tables["retention_state"]
        row = table.c
        columns = (row.last_event_sequence, row.retention_class, row.retention_days, row.counted_from)
        known = await known_packages(connection, row.package_id, columns, events)
        changes = {package_id: _Change(*found) for package_id, found in known.items()}
        _follow_all(changes, events)
        await insert_rows(
            connection,
            table,
            [
                (
                    package_id,
                    c.retention_class,
                    c.days,
                    c.counted_from,
                    retain_until(c.counted_from, c.days),
                    c.last_sequence,
                )
                for package_id, c in changes.items()
                if c.begun_here
            ],
        )
        await _update(connection, table, {package_id: c for package_id, c in changes.items() if not c.begun_here})


def _follow_all(changes: dict[UUID, _Change], entries: Sequence[Entry]) -> None:
    for entry in entries:
        change = changes.get(entry.package_id)
        if not follows(entry, change.last_sequence if change else 0):
            continue
        if isinstance(entry, Event):
            match entry.payload:
                case PackageCreated(retention_class=name, retention_days=days):
                    change = changes[entry.package_id] = _Change(0, name, days, entry.created_at, begun_here=True)
                case PackageFinalized() if change:
                    change.counted_from = entry.created_at
        if change:
            change.last_sequence = entry.sequence


async def _update(connection: AsyncConnection, table: Table, changes: dict[UUID, _Change]) -> None:
    """Update the rows of packages that earlier batches created, in one statement."""
    row = table.c
    await update_rows(
        connection,
        [row.package_id, row.counted_from, row.retain_until, row.last_event_sequence],
        [
            (package_id, c.counted_from, retain_until(c.counted_from, c.days), c.last_sequence)
            for package_id, c in changes.items()
        ],
    )
