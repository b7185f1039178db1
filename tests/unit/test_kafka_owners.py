"""Who owns a partition is asked once for all who want to know, whatever comes of it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from typing import Any, cast

import pytest

from services.errors import ConfigurationError, UnavailableError
from services.log.kafka import owners as owners_module
from services.log.kafka.cluster import Member
from services.log.kafka.owners import Owner, Owners
from services.log.port import PartitionNotOwnedError

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
def owners(group: Group) -> Iterator[Owners]:
    made = Owners(cast("Any", group))
    yield made
    made.close()


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


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners_module, "_LOOK_SECONDS", 0.01)


@pytest.mark.usefixtures("looks_at_once")
async def test_an_answer_that_is_there_does_not_wait_for_the_group(
    owners: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = asyncio.Event()

    async def silent(_: Owners) -> Mapping[int, Owner]:
        asked.set()
        await asyncio.Event().wait()
        raise AssertionError("never reached")

    async def answer() -> str:
        await asked.wait()
        return "recorded"

    monkeypatch.setattr(Owners, "all", silent)
    async with asyncio.timeout(30):
        assert await owners.while_owned(0, Owner("http://there", is_self=False), answer()) == "recorded"


@pytest.mark.usefixtures("looks_at_once")
async def test_an_answer_is_not_waited_for_from_who_owns_no_more(
    owners: Owners, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = [Owner("http://there", is_self=False), Owner("http://elsewhere", is_self=False)]

    async def known(_: Owners) -> Mapping[int, Owner]:
        return {0: owner.pop(0) if len(owner) > 1 else owner[0]}

    monkeypatch.setattr(Owners, "all", known)
    async with asyncio.timeout(30):
        with pytest.raises(UnavailableError, match="went to another") as moved:
            await owners.while_owned(0, owner[0], asyncio.Event().wait())
    assert not isinstance(moved.value, PartitionNotOwnedError), "it may have been tried"


@pytest.mark.usefixtures("looks_at_once")
@pytest.mark.parametrize("error", [UnavailableError("no answer"), ConfigurationError("no right")])
async def test_who_may_not_ask_who_owns_it_waits_for_the_answer(
    owners: Owners, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    asked_again = asyncio.Event()
    asked = 0

    async def refused(_: Owners) -> Mapping[int, Owner]:
        nonlocal asked
        asked += 1
        if asked > 1:
            asked_again.set()
        raise error

    async def answer() -> str:
        await asked_again.wait()
        return "recorded"

    monkeypatch.setattr(Owners, "all", refused)
    async with asyncio.timeout(30):
        assert await owners.while_owned(0, Owner("http://there", is_self=False), answer()) == "recorded"
