"""What a projection is: a named, deterministic fold of the log into tables of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

from sqlalchemy import Table
from sqlalchemy.ext.asyncio import AsyncConnection

from schemas.runs import Entry

Tables = Mapping[str, Table]
"""One build of a projection's tables, by the names that they have, or will have, when it is the live one."""


class Projection(Protocol):
    """A fold. Its rows depend on the events alone: not on batch sizes, clocks, offsets, or the seeds of today."""

    @property
    def name(self) -> str:
        """The name that commands and checkpoints know it by."""

    @property
    def layout(self) -> int:
        """The number of the tables' layout; raised with every change to columns, or to what the fold writes."""

    @property
    def tables(self) -> Sequence[Table]:
        """The tables that are the projection's alone, in the order of its digest."""

    async def fold(self, connection: AsyncConnection, tables: Tables, events: Sequence[Entry]) -> None:
        """Apply events, in order per package, to one build of the tables within the connection's transaction.

        Touches rows of the events' own packages only. Raises CorruptError when an event does not follow what was folded
        before it: a gap, or an impossible order. A repeated event is skipped.
        """
