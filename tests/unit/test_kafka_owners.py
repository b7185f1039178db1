"""Who owns a partition is asked once for all who want to know, whatever comes of it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from services.errors import UnavailableError
from services.log.kafka import owners as owners_module
from services.log.kafka.cluster import Member
from services.log.kafka.owners import Owners

ONE = Member("one", "http://127.0.0.1:1", frozenset({0, 1}))


class Group:
    """A group that answers as it is told, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.silent = False

    def members(self) -> list[Member]:
        self.asked += 1
        if self.silent:
            raise UnavailableError("the group does not answer")
        return [ONE]

    def is_self(self, _: Member) -> bool:
        return False


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def owners(group: Group) -> Owners:
    async def blocking(call: Any) -> Any:
        await asyncio.sleep(0)
        return call()

    return Owners(cast("Any", SimpleNamespace(blocking=blocking)), cast("Any", group))


async def test_many_who_find_the_owner_wrong_do_not_ask_one_after_the_other(owners: Owners, group: Group) -> None:
    async def seek() -> str | None:
        found = (await owners.all())[0].url
        owners.forget()
        return found

    assert await asyncio.gather(*(seek() for _ in range(50))) == [ONE.client_id] * 50
    assert group.asked == 1


async def test_what_proved_wrong_is_asked_for_again_after_a_moment(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_UNSETTLED_SECONDS", 0.0)
    await owners.all()
    await owners.all()
    assert group.asked == 1
    owners.forget()
    await owners.all()
    assert group.asked == 2


async def test_a_group_that_does_not_answer_is_not_asked_for_each_who_waits(owners: Owners, group: Group) -> None:
    async def seek() -> None:
        try:
            await owners.all()
        finally:
            owners.forget()

    group.silent = True
    answers = await asyncio.gather(*(seek() for _ in range(50)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {UnavailableError}
    assert group.asked == 1


async def test_a_group_that_answers_again_is_believed(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_FAILED_SECONDS", 0.0)
    group.silent = True
    with pytest.raises(UnavailableError):
        await owners.all()
    group.silent = False
    assert set(await owners.all()) == ONE.partitions
