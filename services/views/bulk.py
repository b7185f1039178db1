"""Writing and finding many rows at once: `COPY` and `unnest` on PostgreSQL, prepared statements on SQLite.

These functions call the drivers directly, because binding by name costs as much as the work itself. Every value must
have the type that the driver takes for its column: UUID, text, integer, bytes, None.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable, Sequence
from itertools import islice
from typing import Any
from uuid import UUID

from sqlalchemy import BigInteger, Boolean, Column, Integer, LargeBinary, Table, Text, Uuid, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.types import TypeEngine

Row = tuple[Any, ...]

_CHUNK = 10_000  # identifiers in one statement of SQLite; its limit is 32,766 parameters
_TYPES: dict[type[TypeEngine[Any]], str] = {
    Uuid: "uuid",
    BigInteger: "bigint",
    Integer: "integer",
    Boolean: "boolean",
    LargeBinary: "bytea",
    Text: "text",
}
_ROWS_AT_ONCE = 250
"""The number of encoded rows in one message of the `COPY`."""

# PostgreSQL documentation, COPY, "Binary Format": signature, flags, length of the extension; and the trailer.
_COPY_HEAD = b"PGCOPY\n\xff\r\n\0" + bytes(8)
_COPY_END = b"\xff\xff"


def on_postgresql(connection: AsyncConnection) -> bool:
    """Whether the database is PostgreSQL; else it is SQLite."""
    return connection.dialect.name == "postgresql"


def upsert(connection: AsyncConnection, table: Table) -> postgresql.Insert | sqlite.Insert:
    """An insert with `on_conflict_do_update`: both databases have it, but SQLAlchemy's generic insert does not."""
    return postgresql.insert(table) if on_postgresql(connection) else sqlite.insert(table)


async def insert_rows(connection: AsyncConnection, table: Table, rows: Sequence[Row]) -> None:
    """Insert the rows, values in the order of the table's columns, in the connection's transaction.

    A key that exists already fails the whole insert: `Views.writing` then raises CorruptError.
    """
    if not rows:
        return
    if on_postgresql(connection):
        driver = await driver_of(connection)
        await driver.copy_records_to_table(table.name, records=rows, columns=table.columns.keys())
    else:
        names = ", ".join(f'"{column.name}"' for column in table.columns)
        places = ", ".join("?" * len(table.columns))
        statement = f"INSERT INTO {table.name} ({names}) VALUES ({places})"  # noqa: S608 - names of our own tables
        await connection.exec_driver_sql(statement, _as_sqlite(list(table.columns), rows))


async def copy_encoded(connection: AsyncConnection, table: Table, rows: Iterable[bytes]) -> None:
    """Insert rows that are already encoded for PostgreSQL's binary `COPY`, with all columns in their order.

    Only on PostgreSQL. The iterable is consumed while rows are sent. Otherwise as `insert_rows`.
    """
    driver = await driver_of(connection)
    await driver.copy_to_table(table.name, source=_copy(rows), columns=table.columns.keys(), format="binary")


async def _copy(rows: Iterable[bytes]) -> AsyncIterator[bytes]:
    rest = iter(rows)
    yield _COPY_HEAD
    while some := b"".join(islice(rest, _ROWS_AT_ONCE)):
        yield some
    yield _COPY_END


async def update_rows(connection: AsyncConnection, columns: Sequence[Column[Any]], rows: Sequence[Row]) -> None:
    """Set `columns` to each row's values. The first column is the key; a key that is not found changes nothing."""
    if not rows:
        return
    key, *changed = columns
    name = key.table.name
    if on_postgresql(connection):
        values = ", ".join(f'"{column.name}" = v{i}' for i, column in enumerate(changed, 1))
        statement = f'UPDATE {name} SET {values} FROM {_given(columns)} WHERE {name}."{key.name}" = v0'  # noqa: S608 - as above
        driver = await driver_of(connection)
        await driver.execute(statement, *map(list, zip(*rows, strict=True)))
    else:
        values = ", ".join(f'"{column.name}" = ?' for column in changed)
        statement = f'UPDATE {name} SET {values} WHERE "{key.name}" = ?'  # noqa: S608 - names of our own tables
        turned = [(*row[1:], row[0]) for row in rows]
        await connection.exec_driver_sql(statement, _as_sqlite([*changed, key], turned))


async def delete_rows(connection: AsyncConnection, columns: Sequence[Column[Any]], rows: Sequence[Row]) -> None:
    """Delete the table's rows whose `columns` have the values of one of `rows`. All columns are of one table."""
    if not rows:
        return
    name = columns[0].table.name
    if on_postgresql(connection):
        same = " AND ".join(f'{name}."{column.name}" = v{i}' for i, column in enumerate(columns))
        statement = f"DELETE FROM {name} USING {_given(columns)} WHERE {same}"  # noqa: S608 - as above
        driver = await driver_of(connection)
        await driver.execute(statement, *map(list, zip(*rows, strict=True)))
    else:
        same = " AND ".join(f'"{column.name}" = ?' for column in columns)
        statement = f"DELETE FROM {name} WHERE {same}"  # noqa: S608 - names of our own tables
        await connection.exec_driver_sql(statement, _as_sqlite(columns, rows))


async def find_rows(
    connection: AsyncConnection, columns: Sequence[Column[Any]], keys: Sequence[UUID], *, lock: bool = False
) -> list[Row]:
    """The values of `columns` in the rows whose first column, an identifier, is one of `keys`.

    With `lock`, no other transaction can change these rows before this one ends. SQLite has only one writer anyway.
    """
    if not keys:
        return []
    key = columns[0]
    if on_postgresql(connection):
        names = ", ".join(f'"{column.name}"' for column in columns)
        driver = await driver_of(connection)
        statement = f'SELECT {names} FROM {key.table.name} WHERE "{key.name}" = ANY($1::uuid[])'  # noqa: S608 - as above
        if lock:
            statement += " FOR UPDATE"
        return [tuple(row) for row in await driver.fetch(statement, keys)]
    found: list[Row] = []
    for start in range(0, len(keys), _CHUNK):
        query = select(*columns).where(key.in_(keys[start : start + _CHUNK]))
        found += [tuple(row) for row in await connection.execute(query)]
    return found


def _given(columns: Sequence[Column[Any]]) -> str:
    """A table for PostgreSQL, with the columns `v0`, `v1`, ..., made of parameters: one array for each column."""
    arrays = ", ".join(f"${i}::{_type_name(column)}[]" for i, column in enumerate(columns, 1))
    return f"unnest({arrays}) AS given ({', '.join(f'v{i}' for i in range(len(columns)))})"


def _as_sqlite(columns: Sequence[Column[Any]], rows: Iterable[Row]) -> list[Row]:
    """The rows with identifiers in the form that `Uuid` stores on SQLite: 32 hex digits."""
    identifiers = [isinstance(column.type, Uuid) for column in columns]
    return [
        tuple(v.hex if is_id and v is not None else v for v, is_id in zip(row, identifiers, strict=True))
        for row in rows
    ]


def _type_name(column: Column[Any]) -> str:
    """PostgreSQL's name of the column's type. Raises TypeError for a type that no view uses yet."""
    for kind, name in _TYPES.items():
        if isinstance(column.type, kind):
            return name
    raise TypeError(f"a column of type {type(column.type).__name__} cannot be updated in bulk yet")


async def driver_of(connection: AsyncConnection) -> Any:
    """asyncpg's own connection, in the transaction of `connection`: SQLAlchemy begins it with its first statement."""
    raw = await connection.get_raw_connection()
    driver: Any = raw.driver_connection
    if not driver.is_in_transaction():
        await connection.execute(select(1))
    return driver
