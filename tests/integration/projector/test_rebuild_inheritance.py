"""What a table inherits from the live table that it replaces: owners, rights and comments."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text

from artifact_store.errors import ConfigurationError
from projector import rebuild
from projector.rebuild import replay_view
from services.views.database import Views
from services.views.engine.apply import catch_up
from services.views.engine.build_tables import create_index
from services.views.engine.generations import reset
from services.views.projections import PROJECTIONS
from tests.integration.projector_stage import WAIT_SECONDS, eventually, opened
from tests.memory_log import MemoryLog
from tests.views_history import History

REGISTRY = PROJECTIONS["registry"]

pytestmark = pytest.mark.services

Run = Callable[[str], Awaitable[Any]]


@asynccontextmanager
async def filled(url: str) -> AsyncIterator[tuple[Views, MemoryLog, Run]]:
    """A view of the registry that stands at the end of its log, the log, and what runs a statement on the view."""
    log = MemoryLog()
    log.append(*History().fill(packages=2, files=1).events)
    async with opened(url) as views:
        await catch_up(views, log, REGISTRY)

        async def run(statement: str) -> Any:
            async with views.writing() as connection:
                found = await connection.exec_driver_sql(statement)
                return found.scalar() if found.returns_rows else None

        yield views, log, run


@pytest.fixture
async def role(postgres_url: str) -> AsyncIterator[str]:
    """A role whose name looks like a parameter of a statement, as SQL writes it."""
    name = f'"the team :ro %s $1 {uuid4().hex[:12]}"'
    async with opened(postgres_url) as views:

        async def run(statement: str) -> None:
            async with views.writing() as connection:
                await connection.exec_driver_sql(statement)

        await run(f"CREATE ROLE {name}")
        yield name
        await run(f"DROP OWNED BY {name}")
        await run(f"DROP ROLE {name}")


@pytest.fixture(params=["beside", "of another layout"])
def way(request: pytest.FixtureRequest) -> str:
    """The two ways in which a table takes the place of another."""
    return str(request.param)


async def replace(views: Views, log: MemoryLog, run: Run, way: str) -> None:
    """Put another table in the place of each live one."""
    if way != "beside":
        await run("UPDATE projection_generations SET layout = 0")
    await replay_view(views, log, REGISTRY, in_place=way != "beside")


async def test_rights_that_every_new_table_gets_are_given_to_nobody_who_lost_them(
    postgres_url: str, role: str, way: str
) -> None:
    async with filled(postgres_url) as (views, log, run):
        await run(f"ALTER DEFAULT PRIVILEGES GRANT SELECT, UPDATE ON TABLES TO {role}, PUBLIC")
        await run(f"GRANT INSERT ON artifact_packages TO {role}")
        rights = "SELECT CAST(relacl AS text) FROM pg_class WHERE oid = to_regclass('artifact_%s')"
        packages, files = await run(rights % "packages"), await run(rights % "files")
        await replace(views, log, run, way)
        assert (await run(rights % "packages"), await run("SELECT count(*) FROM artifact_packages")) == (packages, 2)
        of_role = f"SELECT has_table_privilege('{role.strip(chr(34))}', 'artifact_files', 'SELECT')"
        assert (files, await run(of_role)) == (None, False)


async def test_comments_go_over(postgres_url: str, way: str) -> None:
    said = "everyone's :packages, 100% of $1"
    async with filled(postgres_url) as (views, log, run):
        await run(f"COMMENT ON TABLE artifact_packages IS '{said.replace(chr(39), chr(39) * 2)}'")
        await run("COMMENT ON COLUMN artifact_packages.name IS 'as its producer calls it'")
        await replace(views, log, run, way)
        table = "to_regclass('artifact_packages')"
        column = f"(SELECT attnum FROM pg_attribute WHERE attrelid = {table} AND attname = 'name')"
        assert await run(f"SELECT obj_description({table}, 'pg_class')") == said
        assert await run(f"SELECT col_description({table}, {column})") == "as its producer calls it"


@pytest.mark.parametrize(
    ("make", "remove", "what"),
    [
        ("ALTER TABLE {} ENABLE ROW LEVEL SECURITY", "ALTER TABLE {} DISABLE ROW LEVEL SECURITY", "row-level security"),
        ("CREATE POLICY mine ON {} USING (true)", "DROP POLICY mine ON {}", "policy mine"),
        ("CREATE RULE mine AS ON DELETE TO {} DO ALSO NOTIFY mine", "DROP RULE mine ON {}", "rule mine"),
        ("CREATE PUBLICATION mine FOR TABLE {}", "DROP PUBLICATION mine", "publication mine"),
        (
            "CREATE TRIGGER mine AFTER UPDATE ON {} EXECUTE FUNCTION suppress_redundant_updates_trigger()",
            "DROP TRIGGER mine ON {}",
            "trigger mine",
        ),
    ],
)
async def test_what_would_be_lost_with_a_table_keeps_it(
    postgres_url: str, way: str, make: str, remove: str, what: str
) -> None:
    async with filled(postgres_url) as (views, log, run):
        await run(make.format("artifact_packages"))
        table = await run("SELECT to_regclass('artifact_packages')::oid")
        with pytest.raises(ConfigurationError, match=f"artifact_packages has .*{what}; remove it"):
            await replace(views, log, run, way)
        assert await run("SELECT to_regclass('artifact_packages')::oid") == table
        await run(remove.format("artifact_packages"))
        await replace(views, log, run, way)
        assert await run("SELECT to_regclass('artifact_packages')::oid") != table


@pytest.mark.parametrize("way", ["switched", "emptied"])
async def test_a_vacuum_of_the_server_s_own_gives_way_to_a_view_that_is(
    postgres_url: str, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    """Such a vacuum ends for a lock that was waited for so long, and for no number of shorter attempts."""
    monkeypatch.setattr(rebuild, "_SWITCH_SECONDS", WAIT_SECONDS / 2)
    waited_for = text(
        "SELECT count(*) FROM pg_locks WHERE NOT granted AND relation = to_regclass('artifact_files') "
        "AND waitstart < clock_timestamp() - (SELECT CAST(setting || 'ms' AS interval) FROM pg_settings "
        "WHERE name = 'deadlock_timeout')"
    )
    async with filled(postgres_url) as (views, log, _), views.engine.connect() as vacuum:
        await vacuum.execute(text("LOCK TABLE artifact_files IN SHARE UPDATE EXCLUSIVE MODE"))  # as a vacuum does
        replacing = asyncio.create_task(
            replay_view(views, log, REGISTRY)
            if way == "switched"
            else reset(views, REGISTRY, patience_seconds=WAIT_SECONDS / 2)
        )

        async def gives_way() -> bool:
            async with views.reading() as connection:
                return replacing.done() or bool((await connection.execute(waited_for)).scalar_one())

        await eventually(gives_way, "the vacuum's lock is waited for long enough")
        assert not replacing.done()
        await vacuum.rollback()
        await replacing


async def test_a_reset_does_not_wait_for_what_is_done_to_a_build_beside_it(postgres_url: str) -> None:
    async with filled(postgres_url) as (views, _, _), views.engine.connect() as indexing:
        await indexing.execute(text("CREATE TABLE artifact_files__building (LIKE artifact_files)"))
        await indexing.commit()
        await indexing.execute(text("LOCK TABLE artifact_files__building IN SHARE MODE"))  # as an index that is made
        async with asyncio.timeout(WAIT_SECONDS):
            await reset(views, REGISTRY, patience_seconds=0)


async def test_an_index_may_take_longer_than_the_server_lets_statements_take(postgres_url: str) -> None:
    async with opened(postgres_url) as views, views.writing() as connection:
        await connection.execute(text("SET LOCAL statement_timeout = '1s'"))
        await create_index(connection, "SELECT pg_sleep(1.2)", memory_mib=1, workers=0)
