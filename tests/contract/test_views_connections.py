"""Connections to PostgreSQL: the cost of one query, and what happens when a connection is lost."""

from __future__ import annotations

from typing import Any
from uuid import UUID

import asyncpg
import pytest
from sqlalchemy import event

from services.views import database
from services.views.bulk import driver_of
from services.views.database import Views
from services.views.queries import Queries
from tests.integration.conditions import until

pytestmark = pytest.mark.services

NOBODY = UUID(int=1)


@pytest.fixture
def views_url(postgres_url: str) -> str:
    return postgres_url


class Sent:
    """What goes to the server from now on: the statements of questions, and what is sent beside them."""

    def __init__(self, views: Views) -> None:
        self.questions: list[str] = []
        self.beside: list[str] = []
        self._known: set[int] = set()
        event.listen(views.engine.sync_engine.pool, "checkout", self._watch, insert=True)
        event.listen(views.engine.sync_engine, "before_cursor_execute", self._ask)

    def _watch(self, connection: Any, _record: object, _proxy: object) -> None:
        driver = connection.driver_connection
        if id(driver) not in self._known:
            self._known.add(id(driver))
            driver.add_query_logger(lambda said: self.beside.append(said.query))

    def _ask(self, _connection: object, _cursor: object, statement: str, *_: object) -> None:
        self.questions.append(statement)


async def test_a_question_in_one_statement_is_all_that_is_sent(views: Views) -> None:
    queries, sent = Queries(views), Sent(views)
    for ask in (lambda: queries.found_file(NOBODY), lambda: queries.manifest(NOBODY)):
        assert await ask() is None  # which connects, and asks for types
        sent.questions.clear()
        sent.beside.clear()
        assert await ask() is None
        assert (len(sent.questions), sent.beside) == (1, [])


async def test_many_files_are_asked_for_by_the_statement_of_one(views: Views) -> None:
    queries, sent = Queries(views), Sent(views)
    for count in (1, 2, 7):
        assert await queries._found_files({UUID(int=number) for number in range(count)}) == {}
    assert (len(sent.questions), len(set(sent.questions))) == (3, 1)


async def test_a_connection_that_the_server_ended_is_replaced_without_asking(views: Views, postgres_url: str) -> None:
    async with views.reading() as connection:
        driver = await driver_of(connection)
    killer = await asyncpg.connect(postgres_url.replace("+asyncpg", ""))
    await killer.execute("SELECT pg_terminate_backend($1)", driver.get_server_pid())
    await killer.close()

    async def lost() -> bool:
        return bool(driver.is_closed())

    await until(lost, 10, "the connection still lives")
    assert await Queries(views).found_file(NOBODY) is None


async def test_a_connection_that_was_not_used_for_a_while_is_asked_whether_it_lives(
    views: Views, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[asyncpg.Connection] = []

    async def lost(driver: asyncpg.Connection, *_: object) -> None:
        asked.append(driver)
        driver.terminate()
        raise asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation")

    queries = Queries(views)
    await queries.found_file(NOBODY)
    monkeypatch.setattr(asyncpg.Connection, "fetchrow", lost)
    assert await queries.found_file(NOBODY) is None
    assert not asked  # it was used just now
    monkeypatch.setattr(database, "_PROVEN_SECONDS", 0)
    assert await queries.found_file(NOBODY) is None
    assert len(asked) == 1
