"""The digest of a view: BLAKE3 over a canonical dump of its tables, the same on every database.

The dump is a sequence of canonical CBOR items (RFC 8949 §4.2): for each table, in the projection's order, the map
{"table": name, "columns": [name, …]}, then the array of values of each row, sorted by the bytes of the primary key.
Identifiers and digests are byte strings, texts are text strings, times and counts are integers, absent values are null.
Checkpoints, generations and seeds are not included.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from blake3 import blake3
from sqlalchemy import LargeBinary, Select, Table, Uuid, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from artifact_store.canonical import canonical_cbor
from artifact_store.manifest import ContentAddress
from artifact_store.position import Position
from services.views.bulk import driver_of, on_postgresql
from services.views.database import Views
from services.views.engine.build_tables import LONG_SECONDS, take_long
from services.views.engine.checkpoints import live_tables, read_position
from services.views.projections import Projection, Tables

_ROWS_AT_ONCE = 1000


@dataclass(frozen=True, slots=True)
class ViewDigest:
    """A view's digest, the number of rows it covers, and the view's position (None if it has folded nothing)."""

    projection: str
    digest: ContentAddress
    rows: int
    position: Position | None


async def digest_view(views: Views, projection: Projection) -> ViewDigest:
    """Digest the live view, in one snapshot and constant memory. Raises UnavailableError."""
    tables = live_tables(projection)
    async with views.reading(snapshot=True, long=True) as connection:
        await keep_tables(connection, tables)
        return await digest_tables(connection, projection, tables, await read_position(connection, projection))


async def keep_tables(connection: AsyncConnection, tables: Tables) -> None:
    """Prevent others from emptying or dropping the tables until the transaction ends. Call it before any query.

    On PostgreSQL, a TRUNCATE is visible to older snapshots too.
    """
    if on_postgresql(connection):
        names = ", ".join(table.name for table in tables.values())
        await connection.execute(text(f"LOCK TABLE {names} IN ACCESS SHARE MODE"))


async def digest_tables(
    connection: AsyncConnection, projection: Projection, tables: Tables, position: Position | None
) -> ViewDigest:
    """Digest one generation of the projection's tables, as the connection's snapshot shows it at `position`."""
    hasher = blake3()
    rows = 0
    await take_long(connection)
    for name, table in ((table.name, tables[table.name]) for table in projection.tables):
        hasher.update(canonical_cbor({"table": name, "columns": table.columns.keys()}))
        async for dump in _dump(connection, table):
            hasher.update(b"".join(dump))
            rows += len(dump)
    return ViewDigest(projection.name, ContentAddress.of_digest(hasher.digest()), rows, position)


async def _dump(connection: AsyncConnection, table: Table) -> AsyncIterator[list[bytes]]:
    """The rows of a table in canonical form, in lists of many."""
    query = select(table).order_by(*table.primary_key.columns)
    identifiers = [i for i, column in enumerate(table.columns) if isinstance(column.type, Uuid)]
    binaries = [i for i, column in enumerate(table.columns) if isinstance(column.type, LargeBinary)]
    async with aclosing(_rows(connection, query)) as parts:
        async for rows in parts:
            yield [_canonical(list(row), identifiers, binaries) for row in rows]


async def _rows(connection: AsyncConnection, query: Select[Any]) -> AsyncGenerator[Sequence[Sequence[Any]]]:
    if not on_postgresql(connection):
        async with connection.stream(query, execution_options={"yield_per": _ROWS_AT_ONCE}) as result:
            async for part in result.partitions():
                yield part
        return
    driver = await driver_of(connection)  # its cursor takes a time-out: the first rows may come after a long sort
    cursor = await driver.cursor(str(query.compile(dialect=connection.dialect)), timeout=LONG_SECONDS)
    while rows := await cursor.fetch(_ROWS_AT_ONCE, timeout=LONG_SECONDS):
        yield rows


def _canonical(values: list[Any], identifiers: list[int], binaries: list[int]) -> bytes:
    for i in identifiers:
        value: UUID | None = values[i]
        values[i] = None if value is None else value.bytes
    for i in binaries:
        values[i] = None if values[i] is None else bytes(values[i])
    return canonical_cbor(values)
