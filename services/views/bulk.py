"""Writing many rows at once: `COPY` on PostgreSQL, one prepared statement elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table, insert
from sqlalchemy.ext.asyncio import AsyncConnection

Row = tuple[Any, ...]


async def insert_rows(connection: AsyncConnection, table: Table, rows: Sequence[Row]) -> None:
    """Insert the rows, values in the order of the table's columns, in the connection's transaction.

    A row whose key is there already fails the whole: `Views.writing` raises CorruptError then.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        raw = await connection.get_raw_connection()
        copy = raw.driver_connection.copy_records_to_table  # type: ignore[union-attr] # asyncpg's own connection
        await copy(table.name, records=rows, columns=table.columns.keys())
    else:
        names = table.columns.keys()
        await connection.execute(insert(table), [dict(zip(names, row, strict=True)) for row in rows])
