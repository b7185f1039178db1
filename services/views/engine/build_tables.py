"""The tables of a build: they are created without indexes, indexed last, and finally replace the live tables.

The live tables always have the plain names. The tables of a build have a suffix, and their indexes have a suffix for
the generation, because SQLite cannot rename an index and cannot have two indexes with one name.

A table that replaces a live one gets its owner, rights and comments: people read the tables with SQL, and the operator
who replays may not be the one who created them. If the live table has anything else that would be lost, such as a
trigger or a policy, the replacement is refused before the table is dropped. Indexes, statistics and storage settings
that others have added are not checked, and are lost with the table.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from uuid import UUID

from sqlalchemy import Column, Index, MetaData, Table, TextClause, text
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncConnection
from sqlalchemy.schema import CreateIndex, CreateTable
from sqlalchemy.sql import quoted_name

from artifact_store.errors import ConfigurationError
from services.views.bulk import driver_of, on_postgresql
from services.views.engine.checkpoints import SUFFIX, building_tables
from services.views.projections import Projection

_READERS_MILLISECONDS = 50
"""How long to wait for readers of each table before giving up. New readers queue up during that time."""

_BEYOND_DEADLOCKS = """
    SELECT set_config('lock_timeout', CAST(CAST(setting AS integer) + 4000 AS text), true)
    FROM pg_settings WHERE name = 'deadlock_timeout'
"""
"""Sets how long to wait for vacuums, in ms: 4 s longer than `deadlock_timeout`, which is 1 s by default."""

LONG_SECONDS = 24 * 3600.0
"""The time limit for creating an index, and for a digest's queries, which sort: other statements are shorter."""


async def create_tables(connection: AsyncConnection, projection: Projection, generation: UUID) -> None:
    """Create the build's tables, with only the indexes by which its folds look rows up."""
    await drop_tables(connection, projection)
    for table in projection.tables:
        if not on_postgresql(connection):  # SQLite cannot add a primary key later
            await connection.execute(CreateTable(building_tables(projection)[table.name]))
            continue
        columns = [Column(c.name, c.type, nullable=c.nullable) for c in table.columns]
        await connection.execute(CreateTable(Table(table.name + SUFFIX, MetaData(), *columns)))
        if not table.info.get("only_inserted"):
            await connection.execute(CreateIndex(_key(table, generation)))


async def drop_tables(connection: AsyncConnection, projection: Projection) -> None:
    """Remove the build's tables, as far as they exist."""
    for table in projection.tables:
        await connection.execute(text(f"DROP TABLE IF EXISTS {table.name}{SUFFIX}"))


def index_statements(table: Table, generation: UUID, dialect: Dialect) -> Iterator[str]:
    """The statements that create the indexes of this table in the build.

    Each can be repeated, and may run concurrently with the others.
    """
    if dialect.name == "postgresql":
        yield _text(CreateIndex(_key(table, generation), if_not_exists=True), dialect)
    for index in _indexes(table, generation):
        yield _text(CreateIndex(index, if_not_exists=True), dialect)


async def take_long(connection: AsyncConnection) -> None:
    """Lift the server's time limit for statements, for the rest of the transaction."""
    if on_postgresql(connection):
        await connection.execute(text("SET LOCAL statement_timeout = 0"))


async def create_index(connection: AsyncConnection, statement: str, *, memory_mib: int, workers: int) -> None:
    """Run one of `index_statements` with this much memory and this many parallel workers of the database."""
    if not on_postgresql(connection):
        await connection.execute(text(statement))
        return
    await take_long(connection)
    await connection.execute(text(f"SET LOCAL maintenance_work_mem = '{memory_mib}MB'"))
    await connection.execute(text(f"SET LOCAL max_parallel_maintenance_workers = {workers}"))
    driver = await driver_of(connection)  # for its time-out
    await driver.execute(statement, timeout=LONG_SECONDS)


async def analyze(connection: AsyncConnection, table: Table) -> None:
    """Analyze this table in the build, so that PostgreSQL plans well from the first query on.

    Covers only the columns by which queries look rows up: with the others, such as digests, it takes twice as long.
    """
    if on_postgresql(connection):
        indexed = {column.name for index in table.indexes for column in index.columns}
        names = sorted(indexed | {column.name for column in table.primary_key.columns})
        await take_long(connection)
        await connection.execute(text(f"ANALYZE {table.name}{SUFFIX} ({', '.join(names)})"))


async def hold_off_vacuums(connection: AsyncConnection, tables: Collection[str]) -> None:
    """Keep vacuum and analyze off these tables, as far as they exist, until the transaction ends. Call it first.

    PostgreSQL cancels an autovacuum only for a lock that has waited longer than `deadlock_timeout` (1 s), so this waits
    longer than that. Neither readers nor folds wait meanwhile. Raises LockedError as `lock_live_tables`.
    """
    if not on_postgresql(connection):
        return
    there = text("SELECT name FROM unnest(CAST(:names AS text[])) AS name WHERE to_regclass(name) IS NOT NULL")
    names = (await connection.execute(there, {"names": list(tables)})).scalars()
    await connection.execute(text(_BEYOND_DEADLOCKS))
    await connection.execute(text(f"LOCK TABLE {', '.join(names)} IN SHARE UPDATE EXCLUSIVE MODE"))


async def lock_live_tables(connection: AsyncConnection, projection: Projection) -> None:
    """Lock readers out of the live tables until the transaction ends, to drop or empty them.

    Waits only briefly for running readers, because new readers queue up behind the lock. Raises LockedError through
    `Views.writing` if they take longer: try again. On SQLite, readers keep their snapshot and nobody waits.
    """
    if on_postgresql(connection):
        names = ", ".join(table.name for table in projection.tables)
        await connection.execute(text(f"SET LOCAL lock_timeout = {_READERS_MILLISECONDS}"))
        await connection.execute(text(f"LOCK TABLE {names} IN ACCESS EXCLUSIVE MODE"))


async def replace_live_tables(connection: AsyncConnection, projection: Projection, generation: UUID) -> None:
    """Drop the live tables and give their names to the build's tables, in the connection's transaction.

    Raises as `inheritance_of`, which says what the build's tables inherit.
    """
    for table in projection.tables:
        name = table.name
        inherited = await inheritance_of(connection, table)
        statements = [f"DROP TABLE IF EXISTS {name}", f"ALTER TABLE {name}{SUFFIX} RENAME TO {name}"]
        if on_postgresql(connection):
            key = _key(table, generation).name
            statements.append(f"ALTER TABLE {name} ADD CONSTRAINT {name}_pkey PRIMARY KEY USING INDEX {key}")
            suffix = _suffix(generation)
            statements += [f"ALTER INDEX {index.name}{suffix} RENAME TO {index.name}" for index in table.indexes]
        for statement in statements:
            await connection.execute(text(statement))
        await inherit(connection, table, inherited)


def _suffix(generation: UUID) -> str:
    return f"__{generation.hex[:8]}"


def _key(table: Table, generation: UUID) -> Index:
    """The unique index that becomes the primary key when the build becomes live."""
    aside = Table(table.name + SUFFIX, MetaData(), *(Column(c.name, c.type) for c in table.columns))
    columns = [aside.c[column.name] for column in table.primary_key.columns]
    return Index(f"{table.name}_pkey{_suffix(generation)}", *columns, unique=True)


def _indexes(table: Table, generation: UUID) -> list[Index]:
    aside = table.to_metadata(MetaData(), name=table.name + SUFFIX)
    indexes = sorted(aside.indexes, key=lambda index: str(index.name))
    for index in indexes:
        index.name = quoted_name(f"{index.name}{_suffix(generation)}", quote=None)
    return indexes


def _text(statement: CreateIndex, dialect: Dialect) -> str:
    return str(statement.compile(dialect=dialect))


_REFUSED = text(
    """
    SELECT what FROM (
        SELECT 'row-level security' AS what FROM pg_class
        WHERE oid = to_regclass(:name) AND (relrowsecurity OR relforcerowsecurity)
        UNION ALL SELECT format('policy %I', polname) FROM pg_policy WHERE polrelid = to_regclass(:name)
        UNION ALL SELECT format('trigger %I', tgname) FROM pg_trigger
        WHERE tgrelid = to_regclass(:name) AND NOT tgisinternal
        UNION ALL SELECT format('rule %I', rulename) FROM pg_rewrite WHERE ev_class = to_regclass(:name)
        UNION ALL SELECT format('publication %I', pubname)
        FROM pg_publication_rel JOIN pg_publication ON pg_publication.oid = prpubid
        WHERE prrelid = to_regclass(:name)
    ) AS found ORDER BY what
    """
)

_INHERITED = text(
    """
    WITH live AS (SELECT oid, relowner, relacl FROM pg_class WHERE oid = to_regclass(:name)),
    parts AS (
        SELECT attname, attnum, attacl FROM live JOIN pg_attribute ON attrelid = live.oid
        WHERE attname = ANY (CAST(:columns AS text[]))
    ),
    rights AS (
        SELECT acl.*, '' AS part FROM live, aclexplode(relacl) AS acl
        UNION ALL
        SELECT acl.*, format(' (%I)', attname) FROM parts, aclexplode(attacl) AS acl
    ),
    comments AS (
        SELECT format('TABLE %I', CAST(:name AS text)) AS what, obj_description(oid, 'pg_class') AS said FROM live
        UNION ALL
        SELECT format('COLUMN %I.%I', CAST(:name AS text), attname), col_description(oid, attnum) FROM live, parts
    )
    SELECT statement FROM (
        SELECT 1 AS turn, format('ALTER TABLE %I OWNER TO %I', CAST(:name AS text), pg_get_userbyid(relowner))
            AS statement
        FROM live WHERE pg_get_userbyid(relowner) != current_user
        UNION ALL
        SELECT 2, format('GRANT %s%s ON %I TO %s%s', privilege_type, part, CAST(:name AS text),
            CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END,
            CASE WHEN is_grantable THEN ' WITH GRANT OPTION' ELSE '' END)
        FROM live, rights WHERE grantee != relowner
        UNION ALL
        SELECT 3, format('COMMENT ON %s IS %L', what, said) FROM comments WHERE said IS NOT NULL
    ) AS statements ORDER BY turn
    """
)

_GIVEN_BY_DEFAULT = text(
    """
    SELECT DISTINCT format('REVOKE ALL ON %I FROM %s CASCADE', relname,
        CASE grantee WHEN 0 THEN 'PUBLIC' ELSE quote_ident(pg_get_userbyid(grantee)) END)
    FROM pg_class, aclexplode(relacl) WHERE oid = to_regclass(:name) AND grantee != relowner
    """
)


async def inheritance_of(connection: AsyncConnection, table: Table) -> Sequence[str]:
    """The statements that transfer the live table's owner, rights and comments to the table that replaces it.

    Raises ConfigurationError if the live table has anything else that would be lost with it.
    """
    if not on_postgresql(connection):
        return ()
    asked = {"name": table.name}
    if refused := await _found(connection, _REFUSED, asked):
        raise ConfigurationError(
            f"the views database: {table.name} has what the table in its place would not have: {', '.join(refused)}; "
            "remove it, and create it again afterwards"
        )
    return await _found(connection, _INHERITED, {**asked, "columns": table.columns.keys()})


async def inherit(connection: AsyncConnection, table: Table, statements: Sequence[str]) -> None:
    """Run these statements on the table that has replaced the live one, after revoking its default rights."""
    if not on_postgresql(connection):
        return
    for statement in (*await _found(connection, _GIVEN_BY_DEFAULT, {"name": table.name}), *statements):
        await connection.exec_driver_sql(statement)  # unparsed, because a role's name may look like a parameter


async def _found(connection: AsyncConnection, query: TextClause, asked: Mapping[str, object]) -> list[str]:
    return list((await connection.execute(query, asked)).scalars())
