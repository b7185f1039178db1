"""Owners and readers of the tables keep their rights after a replay."""

from __future__ import annotations

from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from artifact_store.errors import ConfigurationError
from projector.rebuild import replay_view
from services.views.projections import PROJECTIONS
from tests.integration.projector_stage import (
    opened,
)
from tests.memory_log import MemoryLog
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]

pytestmark = pytest.mark.services


@pytest.mark.parametrize("way", ["beside", "in place", "of another layout"])
async def test_owner_and_rights_on_columns_stay_what_they_are(postgres_url: str, way: str) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    owner, reader = (f"{name}_{uuid4().hex[:12]}" for name in ("owner", "reader"))
    look = text(
        "SELECT pg_get_userbyid(relowner), ARRAY(SELECT CAST(item AS text) FROM unnest(relacl) AS item ORDER BY 1), "
        "ARRAY(SELECT format('%s %s', attname, attacl) FROM pg_attribute "
        "WHERE attrelid = pg_class.oid AND attacl IS NOT NULL ORDER BY attnum) "
        "FROM pg_class WHERE oid = to_regclass('artifact_packages')"
    )
    async with opened(postgres_url) as views:

        async def run(*statements: str) -> None:
            async with views.writing() as connection:
                for statement in statements:
                    await connection.execute(text(statement))

        async def rights() -> Any:
            async with views.reading() as connection:
                return tuple((await connection.execute(look)).one())

        await run(
            f"CREATE ROLE {owner}",
            f"CREATE ROLE {reader}",
            f"ALTER TABLE artifact_packages OWNER TO {owner}",
            f"GRANT SELECT (id, name), UPDATE (name) ON artifact_packages TO {reader} WITH GRANT OPTION",
            "GRANT SELECT ON artifact_packages TO PUBLIC, CURRENT_USER",
        )
        try:
            before = await rights()
            if way == "of another layout":
                await run("UPDATE projection_generations SET layout = 0")
            await replay_view(views, log, REGISTRY, in_place=way != "beside")
            assert await rights() == before
            assert before[0] == owner
            assert reader in str(before[2])
        finally:
            await run(f"DROP OWNED BY {owner}, {reader}", f"DROP ROLE {owner}, {reader}")


async def test_who_may_read_the_tables_still_may_and_what_stands_on_them_is_not_dropped(postgres_url: str) -> None:
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    role = f"reader_{uuid4().hex[:12]}"
    async with opened(postgres_url) as views:

        async def run(statement: str) -> Any:
            async with views.writing() as connection:
                found = await connection.execute(text(statement))
                return found.scalar() if found.returns_rows else None

        await run(f'CREATE ROLE "{role}"')
        try:
            await run(f'GRANT SELECT ON artifact_packages TO "{role}"')
            await replay_view(views, log, REGISTRY)
            may = f"SELECT has_table_privilege('{role}', 'artifact_packages', '%s')"
            assert [await run(may % right) for right in ("SELECT", "DELETE")] == [True, False]
            await run("CREATE VIEW mine AS SELECT name FROM artifact_packages")
            with pytest.raises(ConfigurationError, match="other objects"):
                await replay_view(views, log, REGISTRY)
            assert await run("SELECT count(*) FROM mine") == 2
            await run("DROP VIEW mine")
            assert (await replay_view(views, log, REGISTRY)).events == 0
        finally:
            await run(f'DROP OWNED BY "{role}"')
            await run(f'DROP ROLE "{role}"')
