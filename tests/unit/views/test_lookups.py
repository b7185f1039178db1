"""Lookups that share a query: which caller gets which answer, and how many ids are asked for."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Set
from uuid import UUID

import pytest

from artifact_store.errors import UnavailableError
from services.views.lookups import Lookups

IDS = [UUID(int=number) for number in range(10)]


class Database:
    """Answers once it may."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, set[UUID]]] = []
        self.may = asyncio.Event()
        self.rows = dict.fromkeys(IDS[:8], 0)
        self.failure: Exception | None = None

    async def ask(self, key: str, wanted: Set[UUID]) -> Mapping[UUID, int]:
        self.asked.append((key, set(wanted)))
        await self.may.wait()
        if self.failure is not None:
            raise self.failure
        return {each: self.rows[each] for each in wanted if each in self.rows}


async def test_questions_that_come_together_are_asked_together_and_each_kind_apart() -> None:
    database = Database()
    database.may.set()
    lookups = Lookups(database.ask)
    found = await asyncio.gather(*(lookups.find("a", each) for each in IDS), lookups.find("b", IDS[0]))
    assert found == [0] * 8 + [None, None, 0]
    assert sorted(database.asked) == [("a", set(IDS)), ("b", {IDS[0]})]


async def test_an_answer_is_never_older_than_its_question_and_one_question_is_asked_at_a_time() -> None:
    database = Database()
    lookups = Lookups(database.ask)
    early = [asyncio.create_task(lookups.find("a", IDS[number])) for number in range(2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    late = [asyncio.create_task(lookups.find("a", IDS[number])) for number in (0, 0, 2)]
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert [wanted for _, wanted in database.asked] == [set(IDS[:2])]
    database.rows[IDS[0]] = 1  # after the first question was asked
    database.may.set()
    assert await asyncio.gather(*early, *late) == [1, 0, 1, 1, 0]
    assert [wanted for _, wanted in database.asked] == [set(IDS[:2]), {IDS[0], IDS[2]}]


async def test_a_question_that_nobody_waits_behind_leaves_nothing() -> None:
    database = Database()
    database.may.set()
    lookups = Lookups(database.ask)
    for _ in range(2):
        assert await lookups.find("a", IDS[0]) == 0
    assert not lookups._lanes


async def test_one_who_leaves_takes_nothing_from_the_others_and_a_failure_reaches_all() -> None:
    database = Database()
    lookups = Lookups(database.ask)
    first, second = (asyncio.create_task(lookups.find("a", IDS[0])) for _ in range(2))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    first.cancel()
    database.may.set()
    assert await second == 0
    database.failure = UnavailableError("away")
    for failed in await asyncio.gather(*(lookups.find("a", each) for each in IDS), return_exceptions=True):
        assert isinstance(failed, UnavailableError)
    database.failure = None
    assert await lookups.find("a", IDS[0]) == 0


async def test_a_question_that_is_cut_off_cuts_off_who_waits() -> None:
    async def ask(_key: str, _wanted: Set[UUID]) -> Mapping[UUID, int]:
        raise asyncio.CancelledError

    with pytest.raises(asyncio.CancelledError):
        await Lookups(ask).find("a", IDS[0])
