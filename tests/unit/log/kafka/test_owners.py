"""A partition's owner is asked for once for all callers, whatever the outcome."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
from threading import Event as Flag

import pytest

from artifact_store.errors import ConfigurationError, UnavailableError
from services.log.kafka import ownership as owners_module
from services.log.kafka.ownership import Owner, Owners
from services.log.port import PartitionNotOwnedError

ONE = Owner("http://127.0.0.1:1", is_self=False)


class Group:
    """A group that answers as it is told, and counts how often it was asked."""

    def __init__(self) -> None:
        self.asked = 0
        self.failure: Exception | None = None
        self.hold = Flag()
        """Cleared, it does not answer."""
        self.hold.set()

    def owners(self) -> Mapping[int, Owner]:
        self.asked += 1
        self.hold.wait(30)
        if self.failure is not None:
            raise self.failure
        return {0: ONE, 1: ONE}


@pytest.fixture
def group() -> Group:
    return Group()


@pytest.fixture
def owners(group: Group) -> Iterator[Owners]:
    made = Owners(group.owners)
    yield made
    made.close()


async def test_many_who_find_the_owner_wrong_do_not_ask_one_after_the_other(owners: Owners, group: Group) -> None:
    async def seek() -> str | None:
        found = (await owners.all())[0].url
        owners.forget()
        return found

    assert await asyncio.gather(*(seek() for _ in range(50))) == [ONE.url] * 50
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

    group.failure = UnavailableError("the group does not answer")
    answers = await asyncio.gather(*(seek() for _ in range(50)), return_exceptions=True)
    assert {type(answer) for answer in answers} == {UnavailableError}
    assert group.asked == 1


async def test_a_group_that_answers_again_is_believed(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_FAILED_SECONDS", 0.0)
    group.failure = UnavailableError("the group does not answer")
    with pytest.raises(UnavailableError):
        await owners.all()
    group.failure = None
    assert set(await owners.all()) == {0, 1}


@pytest.fixture
def looks_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owners_module, "_STILL_OWNED_SECONDS", 0.01)


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


async def test_while_the_group_cannot_be_asked_the_last_known_owners_stand(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_FRESH_SECONDS", 0.0)
    known = await owners.all()
    for failure in (UnavailableError("the coordinator is away"), ConfigurationError("no right to describe the group")):
        group.failure = failure
        assert await owners.all() == known
        owners.forget()
        assert await owners.all() == known, "also when one of them has refused"
    group.failure = None
    monkeypatch.setattr(owners_module, "_FAILED_SECONDS", 0.0)
    assert await owners.all() == known


async def test_a_group_that_keeps_silent_holds_up_nobody_who_knows_an_owner(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_FRESH_SECONDS", 0.0)
    monkeypatch.setattr(owners_module, "_PATIENCE_SECONDS", 0.01)
    known = await owners.all()
    group.hold.clear()
    try:
        async with asyncio.timeout(30):
            assert await asyncio.gather(*(owners.all() for _ in range(50))) == [known] * 50
        assert group.asked == 2, "all of them wait for one question"
    finally:
        group.hold.set()


async def test_who_knows_no_owner_waits_for_the_group_and_hears_why_it_cannot_be_asked(
    owners: Owners, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owners_module, "_PATIENCE_SECONDS", 0.0)
    group.failure = ConfigurationError("no right to describe the group")
    with pytest.raises(ConfigurationError, match="no right"):
        await owners.all()
