"""Parked packages: one event that a projection cannot read or apply stops its package, and no other.

A mark says where a package stopped and why; the log keeps the bytes. What the view holds of a parked package is what
a fold of its events before the mark makes. Which event is to blame does not depend on how batches were cut: a batch
that fails is halved until the event is found at which a fold in log order would have stopped.

`retry` folds what waits in the log, a batch at a time, each in one transaction with the mark. It goes on at the mark
and moves it, so nothing is folded twice. It reads the log before it locks the view: folds of the package's partition
wait for the database alone, however long the log takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from uuid import UUID

from blake3 import blake3
from sqlalchemy import delete, insert, select
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.events import Event
from artifact_store.position import Position
from schemas.runs import EventBatch, entries_of
from services.log.port import Log, Record
from services.log.records import Skips
from services.views.database import DamagedDatabaseError, Views, database_errors
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    check_continues,
    load_checkpoint,
    tables_of,
)
from services.views.engine.source import BATCH_BYTES, DecodedBatch, decode
from services.views.projections import Projection, Tables, projection_named
from services.views.tables import parked_packages, projection_checkpoints, projection_generations

_CAUSE_CHARACTERS = 500
_KEY_BYTES = 64


class TooManyParkedError(CorruptError, problem="too-many-parked"):
    """A projection would park more packages than it may: something is wrong with more than a few events."""


@dataclass(frozen=True, slots=True)
class Mark:
    """One parked package: from the record at `offset` of `partition` on, `events` of its events wait in the log.

    `package_id` is None for a record whose package cannot be told; `package` then stands for its key.
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
        """What it is known by within its generation."""
        return self.partition, self.package


def key_name(key: bytes) -> tuple[str, UUID | None]:
    """The package that a record's key names; else a text that stands for the key.

    An event that was decoded has its package's id as its key.
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
    """The marks of the live views, of one projection or of all, by projection and place in the log."""
    live = projection_generations.c
    table = parked_packages.c
    query = select(parked_packages).join(projection_generations, live.generation == table.generation)
    if projection is not None:
        query = query.where(table.projection == projection)
    async with views.reading() as connection:
        rows = await connection.execute(query.order_by(table.projection, table.partition, table.offset, table.package))
        return [_mark(row._asdict()) for row in rows]


async def forget_mark(connection: AsyncConnection, mark: Mark) -> bool:
    """Remove one mark; whether it was there, and at this offset: one that another retry has moved is not this one."""
    table = parked_packages.c
    mine = (
        table.generation == mark.generation,
        table.partition == mark.partition,
        table.package == mark.package,
        table.offset == mark.offset,
    )
    return (await connection.execute(delete(parked_packages).where(*mine))).rowcount == 1


async def forget_marks(connection: AsyncConnection, generation: UUID) -> None:
    """Remove the marks of a generation that is given up."""
    await connection.execute(delete(parked_packages).where(parked_packages.c.generation == generation))


class Parking:
    """Folds around what cannot be applied, within one transaction, and moves the marks; used once."""

    def __init__(
        self,
        connection: AsyncConnection,
        projection: Projection,
        tables: Tables,
        generation: UUID,
        most: int,
        marks: Mapping[tuple[int, str], Mark],
    ) -> None:
        """`most` is how many packages may be parked; `marks` are those that are, as the database has them."""
        self._connection = connection
        self._projection = projection
        self._tables = tables
        self._generation = generation
        self._most = most
        self.marks = dict(marks)
        """By partition and package; what `save` writes."""
        self._before = dict(marks)

    def pass_over(self, batch: DecodedBatch) -> Sequence[Event]:
        """The events that do not wait, as far as can be seen before they are folded; counts those that do.

        Raises TooManyParkedError as `fold` does.
        """
        entries = entries_of(batch.events)
        parked = {mark.package_id for mark in self.marks.values()}
        if not batch.unreadable and not (parked and any(entry.package_id in parked for entry in entries)):
            return batch.events
        left: list[int] = []
        number = -1
        for i, record in enumerate(batch.records):
            if i in batch.unreadable:
                self._park(record, batch.unreadable[i])
                continue
            number += 1
            if not self._waits(record, entries[number].package_id):
                left.append(number)
        return batch.events.select(left) if isinstance(batch.events, EventBatch) else [batch.events[n] for n in left]

    async def fold(self, batch: DecodedBatch) -> None:
        """Fold what can be folded and park the rest.

        Raises TooManyParkedError, after which the transaction must not be committed; UnavailableError.
        """
        events: list[tuple[Record, Event]] = []
        for record, event in batch:
            if isinstance(event, Event):
                events.append((record, event))
            else:
                self._park(record, event)
        await self._fold(events)

    async def save(self) -> None:
        """Write the marks that have changed. Each `fold` may be followed by others before that."""
        changed = [mark for key, mark in self.marks.items() if self._before.get(key) != mark]
        table = parked_packages
        for mark in changed:
            mine = (table.c.partition == mark.partition, table.c.package == mark.package)
            await self._connection.execute(delete(table).where(table.c.generation == self._generation, *mine))
        if changed:
            await self._connection.execute(insert(table), [_row(mark) for mark in changed])
        self._before = dict(self.marks)

    async def _fold(self, events: Sequence[tuple[Record, Event]]) -> None:
        left = [(record, event) for record, event in events if not self._waits(record, event.package_id)]
        if not left:
            return
        cause = await self._try([event for _, event in left])
        if cause is None:
            return
        if len(left) == 1:
            self._park(left[0][0], cause)
            return
        middle = len(left) // 2
        await self._fold(left[:middle])
        await self._fold(left[middle:])

    async def _try(self, events: Sequence[Event]) -> str | None:
        """Fold all of the events, or none; then why not."""
        try:
            async with self._connection.begin_nested():
                with database_errors():
                    await self._projection.fold(self._connection, self._tables, events)
        except DamagedDatabaseError:
            raise
        except CorruptError as error:
            return error.detail
        return None

    def _waits(self, record: Record, package_id: UUID) -> bool:
        """Whether a package's event lies behind its mark; it is counted then."""
        if not self.marks:
            return False
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


_BATCH_EVENTS = 2000

_CHASES = 3
"""How often what came meanwhile is read without a lock, before folds wait for the last of it."""

_LOCKED_SECONDS = 5.0
"""How long folds wait at most while that is read."""


@dataclass(frozen=True, slots=True)
class Retried:
    """What a retry came to: how many events were folded, and the mark of a package that is parked again."""

    package: str
    projection: str
    events: int
    mark: Mark | None


async def retry(views: Views, log: Log, mark: Mark) -> Retried:
    """Fold what waits behind the mark, up to where the view stands. Marks of one partition: the earliest first.

    Blocks until the package is followed again or parked at its next bad event. When it fails, what was folded by then
    stays, and the mark has moved behind it.

    Raises:
        StaleCheckpointError: the mark is not there any more or has moved, or the view was folded again since.
        CorruptError, LogIdentityError: the log is not the one that the view was folded from.
        UnavailableError: the log or the database cannot be reached.
    """
    projection = projection_named(mark.projection)
    identity = await log.identity()
    checkpoint = await load_checkpoint(views, projection, identity)
    await check_continues(log, projection.name, checkpoint, [mark.partition])
    here = Checkpoint(mark.generation, Position(identity, {}))
    skips = Skips(log)
    folded, chases, at = 0, 0, mark.offset
    while True:
        end = (await load_checkpoint(views, projection, identity)).position.offsets.get(mark.partition, 0)
        batch, at = await _read(log, mark, at, end, skips)
        chases += at == end
        async with views.writing() as connection:
            tables = await tables_of(connection, projection, here)
            end = await _hold_partition(connection, mark)
            marks = await read_marks(connection, mark.generation)
            found = marks.pop(mark.key, None)
            if found is None or not await forget_mark(connection, mark):
                raise StaleCheckpointError(
                    f"{mark.package} is not parked in {mark.projection} at offset {mark.offset} any more"
                )
            most = max(views.max_parked, len(marks) + 1)  # a projector was allowed as many as there are
            parking = Parking(connection, projection, tables, mark.generation, most, marks)
            await parking.fold(batch)
            done = len(batch.records)
            if at < end and found.events > done and chases > _CHASES:
                batch, at = await _read_locked(log, mark, at, end, skips)
                await parking.fold(batch)
                done += len(batch.records)
            again = parking.marks.get(mark.key)
            done -= 0 if again is None else again.events
            folded, left = folded + done, found.events - done
            if again is not None:
                parking.marks[mark.key] = replace(again, events=left)
            elif at < end and left:
                parking.marks[mark.key] = replace(found, offset=at, events=left)
            await parking.save()
        if again is not None or mark.key not in parking.marks:
            return Retried(mark.package, mark.projection, folded, parking.marks.get(mark.key))
        mark = parking.marks[mark.key]


async def _hold_partition(connection: AsyncConnection, mark: Mark) -> int:
    """Let no fold of the mark's partition begin until the transaction ends; where the view stands in it."""
    table = projection_checkpoints.c
    query = select(table.next_offset).where(table.generation == mark.generation, table.partition == mark.partition)
    end: int = (await connection.execute(query.with_for_update())).scalar_one()
    return end


async def _read(log: Log, mark: Mark, start: int, end: int, skips: Skips) -> tuple[DecodedBatch, int]:
    """What waits between these offsets, or the first of it, and the offset behind what was read."""
    waiting: list[Record] = []
    size, at = 0, start
    async with aclosing(log.scan({mark.partition: start}, {mark.partition: end})) as batches:
        async for batch in batches:
            for record in batch.records:
                if key_name(record.key)[0] == mark.package:
                    waiting.append(record)
                    size += len(record.value)
            at = batch.next_offsets.get(mark.partition, at)
            if len(waiting) >= _BATCH_EVENTS or size >= BATCH_BYTES:
                break
    return await decode(log, waiting, skips), at


async def _read_locked(log: Log, mark: Mark, start: int, end: int, skips: Skips) -> tuple[DecodedBatch, int]:
    """As `_read`, for the little that came since. Raises UnavailableError when the log takes too long."""
    try:
        async with asyncio.timeout(_LOCKED_SECONDS):
            return await _read(log, mark, start, end, skips)
    except TimeoutError:
        raise UnavailableError(
            f"{mark.package} takes events faster than they are read from the log; retry it when it takes fewer"
        ) from None


async def retry_confirmed(views: Views, log: Log, projection: Projection, partitions: Collection[int]) -> None:
    """Retry the marks of the live view that stand on a record which an operator has confirmed to be no event.

    To be called once confirmations in these partitions were read: what waits behind such a record goes on by itself.
    Raises as `retry`.
    """
    skips = Skips(log)
    marks = [mark for mark in await list_marks(views, projection.name) if mark.partition in partitions]
    for mark in marks:
        async with aclosing(log.scan({mark.partition: mark.offset}, {mark.partition: mark.offset + 1})) as batches:
            records = [record async for batch in batches for record in batch.records]
        if DecodedBatch.of(records, log.partition_of).unreadable and not (await decode(log, records, skips)).records:
            await retry(views, log, mark)
