"""Writing many rows at once: `COPY` on PostgreSQL, one prepared statement on SQLite."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Table, Uuid
from sqlalchemy.ext.asyncio import AsyncConnection

Row = tuple[Any, ...]


async def insert_rows(connection: AsyncConnection, table: Table, rows: Sequence[Row]) -> None:
    """Insert the rows, values in the order of the table's columns, in the connection's transaction.

    A row whose key is there already fails the whole: `Views.writing` raises CorruptError then. The driver is spoken to
    directly, because binding by name costs as much as the insert itself.
    """
    if not rows:
        return
    if connection.dialect.name == "postgresql":
        raw = await connection.get_raw_connection()
        copy = raw.driver_connection.copy_records_to_table  # type: ignore[union-attr] # asyncpg's own connection
        await copy(table.name, records=rows, columns=table.columns.keys())
    else:
        # As `Uuid` keeps identifiers on SQLite: 32 hex digits. No fold writes an absent identifier.
        as_text = [isinstance(column.type, Uuid) for column in table.columns]
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        places = ", ".join("?" * len(as_text))
        values = [tuple(v.hex if uuid else v for v, uuid in zip(row, as_text, strict=True)) for row in rows]
        statement = f"INSERT INTO {table.name} ({names}) VALUES ({places})"  # noqa: S608 - names of our own tables
        await connection.exec_driver_sql(statement, values)
