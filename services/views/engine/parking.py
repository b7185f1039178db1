"""Parked packages: an event that a projection cannot read or apply stops its package, and no other.

A mark says where a package stopped and why; the log keeps the bytes. The view shows the package as of the events before
the mark. The mark does not depend on how batches were cut: a batch that fails is halved until the event is found at
which a fold in log order would have stopped.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from uuid import UUID

from blake3 import blake3
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError
from schemas.runs import Entry
from services.log.port import Record
from services.views.database import DamagedDatabaseError, Views, database_errors
from services.views.engine.source import EventBatch
from services.views.projections import Projection, Tables
from services.views.tables import parked_packages, projection_generations

_CAUSE_CHARACTERS = 500
_KEY_BYTES = 64


class TooManyParkedError(CorruptError, problem="too-many-parked"):
    """A projection would park more packages than it may. The cause is probably not a few bad events."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One parked package: from the record at `offset` of `partition` on, `events` of its events wait in the log.

    `package_id` is None if the record's key is not a package id; `package` is then a text that stands for the key.
    """

    projection: str
    generation: UUID
    partition: int
    package: str
    package_id: UUID | None
    offset: int
    events: int
    cause: str

    @property
    def key(self) -> tuple[int, str]:
        """Identifies the mark within its generation."""
        return self.partition, self.package


def key_name(key: bytes) -> tuple[str, UUID | None]:
    """The package id in a record's key, as text and UUID; for another key, a text that stands for it, and None.

    Every decoded event has its package's id as its key.
    """
    try:
        text = key.decode("ascii")
        package_id = UUID(text)
    except ValueError:
        pass
    else:
        if str(package_id) == text:
            return text, package_id
    return f"key {key.hex()}" if len(key) <= _KEY_BYTES else f"key of blake3:{blake3(key).hexdigest()}", None


async def read_marks(connection: AsyncConnection, generation: UUID) -> dict[tuple[int, str], Mark]:
    """The marks of one generation, by partition and package."""
    rows = await connection.execute(select(parked_packages).where(parked_packages.c.generation == generation))
    marks = (_mark(row._asdict()) for row in rows)
    return {mark.key: mark for mark in marks}


async def list_marks(views: Views, projection: str | None = None) -> list[Mark]:
    """The marks of the live views, of one projection or of all, sorted by projection and position in the log."""
    live = projection_generations.c
    table = parked_packages.c
    query = select(parked_packages).join(projection_generations, live.generation == table.generation)
    if projection is not None:
        query = query.where(table.projection == projection)
    async with views.reading() as connection:
        rows = await connection.execute(query.order_by(table.projection, table.partition, table.offset, table.package))
        return [_mark(row._asdict()) for row in rows]


async def forget_mark(connection: AsyncConnection, mark: Mark) -> bool:
    """Remove one mark, unless another retry has removed or moved it. Returns whether this removed it."""
    table = parked_packages.c
    mine = (
        table.generation == mark.generation,
        table.partition == mark.partition,
        table.package == mark.package,
        table.offset == mark.offset,
    )
    return (await connection.execute(delete(parked_packages).where(*mine))).rowcount == 1


class Parking:
    """Folds batches within one transaction, parks packages whose events cannot be applied, and updates the marks."""

    def __init__(
        self,
        connection: AsyncConnection,
        projection: Projection,
        tables: Tables,
        generation: UUID,
        most: int,
        marks: Mapping[tuple[int, str], Mark],
    ) -> None:
        """At most `most` packages may be parked. `marks` are the generation's marks in the database."""
        self._connection = connection
        self._projection = projection
        self._tables = tables
        self._generation = generation
        self._most = most
        self.marks = dict(marks)
        """By partition and package. `save` writes them."""
        self._before = dict(marks)

    async def fold(self, batch: EventBatch, *, whole: bool = False) -> None:
        """Fold what can be folded and park the rest. With `whole`, park only unreadable records.

        Raises TooManyParkedError, after which the transaction must not be committed; UnavailableError. With `whole`
        also CorruptError, when an event cannot be applied.
        """
        for record, cause in batch.unreadable:
            self._park(record, cause)
        if whole:
            _, events = self._following(batch.records, batch.events)
            if events:
                await self._projection.fold(self._connection, self._tables, events)
        else:
            await self._fold(batch.records, batch.events)

    async def save(self) -> None:
        """Write the changed marks. May follow several calls of `fold`."""
        changed = [mark for key, mark in self.marks.items() if self._before.get(key) != mark]
        table = parked_packages
        for mark in changed:
            mine = (table.c.partition == mark.partition, table.c.package == mark.package)
            await self._connection.execute(delete(table).where(table.c.generation == self._generation, *mine))
        if changed:
            await self._connection.execute(insert(table), [_row(mark) for mark in changed])
        self._before = dict(self.marks)

    async def _fold(self, records: Sequence[Record], events: Sequence[Entry]) -> None:
        records, events = self._following(records, events)
        if not events:
            return
        cause = await self._try(events)
        if cause is None:
            return
        if len(events) == 1:
            self._park(records[0], cause)
            return
        middle = len(events) // 2
        await self._fold(records[:middle], events[:middle])
        await self._fold(records[middle:], events[middle:])

    async def _try(self, events: Sequence[Entry]) -> str | None:
        """Fold all of the events or none. Returns why they were refused, or None."""
        try:
            async with self._connection.begin_nested():
                with database_errors():
                    await self._projection.fold(self._connection, self._tables, events)
        except DamagedDatabaseError:
            raise
        except CorruptError as error:
            return error.detail
        return None

    def _following(
        self, records: Sequence[Record], events: Sequence[Entry]
    ) -> tuple[Sequence[Record], Sequence[Entry]]:
        """Leave out the events after their package's mark, and count them in the mark."""
        parked = {mark.package_id for mark in self.marks.values()}
        if not parked or not any(event.package_id in parked for event in events):
            return records, events
        left = [i for i, record in enumerate(records) if not self._waits(record, events[i].package_id)]
        return [records[i] for i in left], [events[i] for i in left]

    def _waits(self, record: Record, package_id: UUID) -> bool:
        """Whether the event lies after its package's mark. If so, the mark counts it."""
        key = (record.partition, str(package_id))
        mark = self.marks.get(key)
        if mark is None or record.offset < mark.offset:
            return False
        self.marks[key] = replace(mark, events=mark.events + 1)
        return True

    def _park(self, record: Record, cause: str) -> None:
        package, package_id = key_name(record.key)
        key = (record.partition, package)
        mark = self.marks.get(key)
        if mark is not None:
            mark = replace(mark, events=mark.events + 1)
            if record.offset < mark.offset:
                mark = replace(mark, offset=record.offset, cause=cause[:_CAUSE_CHARACTERS])
            self.marks[key] = mark
            return
        if len(self.marks) >= self._most:
            raise TooManyParkedError(
                f"the view {self._projection.name} has parked {len(self.marks)} packages and may not park more; the "
                f"next is {package} at offset {record.offset} of partition {record.partition}: {cause}. "
                "`artifact-store parked` lists them; mend the cause and retry them, or allow more with --max-parked"
            )
        self.marks[key] = Mark(
            projection=self._projection.name,
            generation=self._generation,
            partition=record.partition,
            package=package,
            package_id=package_id,
            offset=record.offset,
            events=1,
            cause=cause[:_CAUSE_CHARACTERS],
        )


def _row(mark: Mark) -> dict[str, object]:
    return {column.name: getattr(mark, column.name) for column in parked_packages.columns}


def _mark(row: Mapping[str, object]) -> Mark:
    return Mark(**row)  # type: ignore[arg-type]  # the columns are the fields
