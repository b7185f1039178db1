"""A consumer that handles each event once: it stores its position in the same transaction as its own results.

Events come from any registry: from a gateway (`Client`), from the embedded log, or straight from Kafka
(`services.registry.open_events`). The database is the program's own.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Generic, Protocol, Self, TypeVar

from artifact_store.errors import ConflictError, PushBackError, UnavailableError
from artifact_store.events import RecordedEvent
from artifact_store.models import EventFilter
from artifact_store.position import Position
from artifact_store.registry import Since

_LOG = logging.getLogger(__name__)

_FIRST_PAUSE_SECONDS = 0.5
_LONGEST_PAUSE_SECONDS = 30.0

Transaction = TypeVar("Transaction")
_Transaction = TypeVar("_Transaction", contravariant=True)


class EventSource(Protocol):
    """Where events come from. Every `Registry` is an `EventSource`."""

    def read_events(
        self, since: Since = None, *, where: EventFilter | None = None, follow: bool = False
    ) -> AsyncIterator[RecordedEvent]:
        """See `Registry.read_events`."""


class PositionStore(Protocol[_Transaction]):
    """Keeps the position of one consumer in the database that the consumer writes to."""

    async def load(self, transaction: _Transaction) -> Position | None:
        """The position that was stored last; None before the first one."""

    async def store(self, transaction: _Transaction, before: Position | None, after: Position) -> bool:
        """Store `after` if the stored position is still `before`. Returns whether it was."""


class DurableConsumer(Generic[Transaction]):
    """Passes events to a handler, each in a transaction that also moves the position past the event.

    A consumer that ends in the middle, even by a crash, continues with the first event whose transaction was not
    committed. If two consumers share one position, the slower one stops, and nothing is handled twice.
    """

    def __init__(
        self,
        source: EventSource,
        begin: Callable[[], AbstractAsyncContextManager[Transaction]],
        positions: PositionStore[Transaction],
        *,
        where: EventFilter | None = None,
        since: Since = None,
    ) -> None:
        """`begin` opens a transaction that is committed when its block ends, and rolled back when that raises.

        `since` is where a consumer without a stored position begins: by default at the log's start.
        """
        self._source = source
        self._begin = begin
        self._positions = positions
        self._where = where
        self._since = since

    async def run(
        self, handle: Callable[[Transaction, RecordedEvent], Awaitable[None]], *, follow: bool = True
    ) -> None:
        """Handle events in order per package, without end; without `follow`, up to the log's end.

        While it follows, an UnavailableError or PushBackError of the source or of `handle` makes it wait and continue.
        Anything else that `handle` or the database raises ends it, and the event is not handled.

        Raises:
            ConflictError: another consumer has moved the position.
            InvalidPositionError, LogIdentityError: the stored position does not exist in this log.
            CorruptError: something cannot be read as an event. Without `follow`, also UnavailableError.
        """
        pause = _FIRST_PAUSE_SECONDS
        while True:
            async with self._begin() as transaction:
                reached = await self._positions.load(transaction)
            try:
                async for event in self._source.read_events(reached or self._since, where=self._where, follow=follow):
                    async with self._begin() as transaction:
                        await handle(transaction, event)
                        if not await self._positions.store(transaction, reached, event.position):
                            raise ConflictError("another consumer has moved the position that this one stores")
                    reached, pause = event.position, _FIRST_PAUSE_SECONDS
            except (UnavailableError, PushBackError) as error:
                if not follow:
                    raise
                _LOG.warning("no events can be handled now; next try in %g s: %s", pause, error.detail)
                await asyncio.sleep(pause)
                pause = min(2 * pause, _LONGEST_PAUSE_SECONDS)
            else:
                return


Fetch = Callable[[Any, str, Sequence[str]], Awaitable[Sequence[Sequence[Any]]]]
"""Runs a statement with these values in a transaction, and returns all its rows."""


class PositionTable:
    """The positions of consumers in one table of an SQL database with RETURNING: PostgreSQL, SQLite from 3.35 on."""

    def __init__(
        self, consumer: str, fetch: Fetch, *, marks: tuple[str, str, str], table: str = "artifact_store_positions"
    ) -> None:
        """`consumer` is the name under which the position is stored. `marks` are the driver's three placeholders.

        `table` is put into the statements unchanged, and may include a schema name.
        """
        self._consumer = consumer
        self._fetch = fetch
        first, second, third = marks
        self._create = f"CREATE TABLE IF NOT EXISTS {table} (consumer TEXT PRIMARY KEY, position TEXT NOT NULL)"
        self._select = f"SELECT position FROM {table} WHERE consumer = {first}"  # noqa: S608 - the program's own names
        values = f"(consumer, position) VALUES ({first}, {second})"
        self._insert = f"INSERT INTO {table} {values} ON CONFLICT DO NOTHING RETURNING consumer"
        still = f"consumer = {second} AND position = {third}"
        self._update = f"UPDATE {table} SET position = {first} WHERE {still} RETURNING consumer"  # noqa: S608 - as above

    @classmethod
    def asyncpg(cls, consumer: str, **options: str) -> Self:
        """For transactions that are connections of asyncpg."""

        async def fetch(connection: Any, statement: str, values: Sequence[str]) -> Sequence[Sequence[Any]]:
            rows: Sequence[Sequence[Any]] = await connection.fetch(statement, *values)
            return rows

        return cls(consumer, fetch, marks=("$1", "$2", "$3"), **options)

    @classmethod
    def sqlite3(cls, consumer: str, **options: str) -> Self:
        """For transactions that are connections of Python's sqlite3."""

        async def fetch(connection: Any, statement: str, values: Sequence[str]) -> Sequence[Sequence[Any]]:
            rows: Sequence[Sequence[Any]] = connection.execute(statement, values).fetchall()
            return rows

        return cls(consumer, fetch, marks=("?", "?", "?"), **options)

    async def create(self, transaction: Any) -> None:
        """Create the table if it does not exist."""
        await self._fetch(transaction, self._create, ())

    async def load(self, transaction: Any) -> Position | None:
        """See `PositionStore`. Raises InvalidPositionError."""
        rows = await self._fetch(transaction, self._select, (self._consumer,))
        return Position.parse(rows[0][0]) if rows else None

    async def store(self, transaction: Any, before: Position | None, after: Position) -> bool:
        """See `PositionStore`."""
        if before is None:
            return bool(await self._fetch(transaction, self._insert, (self._consumer, str(after))))
        return bool(await self._fetch(transaction, self._update, (str(after), self._consumer, str(before))))
