"""What a table that takes the place of a live one inherits from it: owner, rights, comments.

People read the tables with SQL, and an operator who replays may be another than who made them. What else stands on a
table and cannot go over by itself is refused before the table is dropped; indexes, statistics and storage settings that
others have added are not looked for, and go with the table.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from sqlalchemy import Table, TextClause, text
from sqlalchemy.ext.asyncio import AsyncConnection

from services.errors import ConfigurationError
from services.views.bulk import on_postgresql

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
    """The statements that give the live table's owner, rights and comments to the one that takes its place.

    Raises ConfigurationError when there is something on the live table that would be lost with it.
    """
    if not on_postgresql(connection):
        return ()
    asked = {"name": table.name}
    if refused := await _found(connection, _REFUSED, asked):
        raise ConfigurationError(
            f"the views database: {table.name} has what the table in its place would not have: {', '.join(refused)}; "
            "remove it, and make it anew behind this"
        )
    return await _found(connection, _INHERITED, {**asked, "columns": table.columns.keys()})


async def inherit(connection: AsyncConnection, table: Table, statements: Sequence[str]) -> None:
    """Give the table that has taken the live one's place, and its name, what that left, and no right beyond it."""
    if not on_postgresql(connection):
        return
    for statement in (*await _found(connection, _GIVEN_BY_DEFAULT, {"name": table.name}), *statements):
        await connection.exec_driver_sql(statement)  # as it is: a role's name may look like a parameter


async def _found(connection: AsyncConnection, query: TextClause, asked: Mapping[str, object]) -> list[str]:
    return list((await connection.execute(query, asked)).scalars())
