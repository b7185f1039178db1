"""One subscription's outbox: what a failing package holds back, and what continues without it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from uuid import UUID, uuid4

from artifact_store.models import EventFilter
from artifact_store.position import Position
from services.core.access import EVERYTHING
from services.runtime.clock import system_clock
from services.views.queries import Origin
from services.webhooks.messages import new_secret
from services.webhooks.outbox import Message, Outbox, Policy
from services.webhooks.subscriptions import HeldPackage, Secret, State, Subscription
from services.webhooks.targets import Answer
from tests.memory_log import MemoryLog
from tests.views_history import History

ACCEPTED = Answer(200, None, None)
LATER = Policy(first_pause_seconds=3600.0)
"""What fails is not tried again during the test, unless something else has it tried."""


class Receiver:
    """A log whose events are offered to the outbox of one subscription, and a receiver that answers by package."""

    def __init__(self) -> None:
        self.history = History()
        self.log = MemoryLog(partitions=2)
        self.answers: dict[UUID, Answer] = {}
        self.came: list[tuple[UUID, int]] = []
        """Each request, accepted or not: package and sequence."""
        self.held: dict[UUID, HeldPackage] = {}
        self.subscription = Subscription(
            uuid4(),
            "ci:owner",
            {},
            "https://receiver.example/",
            EventFilter(),
            (Secret(new_secret()),),
            State.ACTIVE,
            cause=None,
            resumes=0,
            created_at=0,
            epoch=1,
            position=Position(self.log.id, {}),
            deliveries=0,
        )
        self._logged = 0
        self._news = asyncio.Event()

    def refuse(self, status: int = 503, retry_after: str | None = None) -> UUID:
        """A package whose events are refused."""
        package_id = self.history.create()
        self.answers[package_id] = Answer(status, None, retry_after)
        return package_id

    @asynccontextmanager
    async def served(self, policy: Policy) -> AsyncIterator[Outbox]:
        """The outbox, as a deliverer that starts now opens it; what it has done is saved at the end."""
        outbox = Outbox(
            self.subscription,
            list(self.held.values()),
            policy=policy,
            may_send=self._may_send,
            post=self._post,
            read_package=self._read_package,
            clock=system_clock,
            delivered=lambda *_: None,
        )
        outbox.set_rights(EVERYTHING)
        try:
            yield outbox
        finally:
            await outbox.close(20.0)
            self.save(outbox)

    def save(self, outbox: Outbox) -> None:
        """Save what the outbox has done, as the deliverer does."""
        progress = outbox.take_progress(force=True)
        assert progress is not None
        self.subscription = replace(self.subscription, position=progress.position)
        self.held = {id_: row for id_, row in self.held.items() if id_ not in progress.released} | dict(progress.held)

    async def offer(self, outbox: Outbox) -> None:
        """Offer what is new in the history, in the order of the log, as soon as there is room."""
        self.log.append(*self.history.events[self._logged :])
        self._logged = len(self.history.events)
        async with asyncio.timeout(20):
            for message in await self._messages(outbox.reading):
                while not outbox.offer(message):
                    await outbox.room.wait()

    async def until(self, condition: Callable[[], bool]) -> None:
        """Wait until the requests that came satisfy the condition."""
        async with asyncio.timeout(20):
            while not condition():
                self._news.clear()
                await self._news.wait()

    async def _messages(
        self, since: Position, until: Position | None = None, package_id: UUID | None = None
    ) -> list[Message]:
        events = self.log.read(since, until=until, package_id=package_id)
        origin = Origin("build", "main", "report")
        return [Message(event, self.log.partition_of(event.package_id), origin) async for event in events]

    async def _read_package(self, package_id: UUID, since: Position, until: Position) -> Sequence[Message]:
        return await self._messages(since, until, package_id)

    async def _may_send(self) -> None:
        pass

    async def _post(self, _: Subscription, _name: str, body: bytes) -> Answer:
        event = json.loads(body)
        package_id = UUID(event["subject"])
        self.came.append((package_id, int(event["sequence"])))
        self._news.set()
        return self.answers.get(package_id, ACCEPTED)


async def test_parked_packages_hold_back_their_own_later_events_and_nothing_else() -> None:
    receiver = Receiver()
    history = receiver.history
    policy = Policy(first_pause_seconds=0.0, park_after_seconds=0.0, most_failing=2, room=8)
    parked, sound = [receiver.refuse() for _ in range(5)], history.create()
    refused = [(package_id, 1) for package_id in parked]

    async def all_get_a_file(outbox: Outbox, path: str) -> None:
        for package_id in parked:
            history.ingest(package_id, *(f"{path}/{number}" for number in range(policy.room)))
        history.ingest(sound, path)
        last = history.events[-1].sequence
        await receiver.offer(outbox)
        await receiver.until(lambda: (sound, last) in receiver.came)

    async with receiver.served(policy) as outbox:
        await receiver.offer(outbox)
        await receiver.until(lambda: set(refused) < set(receiver.came))
        await all_get_a_file(outbox, "a")
    assert receiver.subscription.position == outbox.reading, "the cursor waits for a parked package"
    async with receiver.served(policy) as outbox:
        await all_get_a_file(outbox, "b")
        assert outbox.parked == len(parked)
        assert sorted(came for came in receiver.came if came[0] != sound) == sorted(refused)
        assert [sequence for package_id, sequence in receiver.came if package_id == sound] == [1, 2, 3]
        mended, row = parked[2], receiver.held[parked[2]]
        del receiver.answers[mended]
        assert outbox.unpark(mended, row.offset)
        last = 1 + 2 * policy.room
        await receiver.until(lambda: (mended, last) in receiver.came)
        assert outbox.parked == len(parked) - 1
    assert [n for package_id, n in receiver.came if package_id == mended] == [1, *range(1, last + 1)]


async def test_a_package_whose_receiver_said_when_to_come_back_is_not_tried_before() -> None:
    receiver = Receiver()
    asked, other, back = receiver.refuse(429, "7200"), receiver.refuse(), receiver.refuse()
    async with receiver.served(LATER) as outbox:
        await receiver.offer(outbox)
        await receiver.until(lambda: len(receiver.came) == 3)
    assert receiver.held[asked].next_at - receiver.held[asked].since >= 7_200_000_000
    async with receiver.served(LATER) as outbox:
        receiver.answers.clear()
        assert outbox.unpark(back, receiver.held[back].offset)
        await receiver.until(lambda: receiver.came[3:] == [(back, 1), (other, 1)])
    assert set(receiver.held) == {asked}


async def test_resuming_has_everything_sent_to_a_receiver_that_was_gone() -> None:
    receiver = Receiver()
    gone = receiver.refuse(410)
    async with receiver.served(LATER) as outbox:
        await receiver.offer(outbox)
        await receiver.until(lambda: receiver.came == [(gone, 1)])
        receiver.answers.clear()
        outbox.change(replace(receiver.subscription, resumes=1))
        await receiver.until(lambda: receiver.came == [(gone, 1)] * 2)
    assert receiver.held == {}
