"""Questions about single files, of which those that wait at the same time are put to the database together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from uuid import UUID

_AT_ONCE = 2
"""How many questions of one kind are under way: one is decoded while the database works on the next."""

_MOST = 500
"""Most files of one question."""

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(slots=True)
class _Lane(Generic[Found]):
    """Those who wait for answers of one kind."""

    waiting: dict[UUID, list[asyncio.Future[Found | None]]] = field(default_factory=dict)
    under_way: int = 0
    called: bool = False
    """Whether `_send` is about to run."""


class Lookups(Generic[Key, Found]):
    """Finds things by id. Belongs to one event loop.

    A question is never answered by what the database said before it was asked.
    """

    def __init__(self, ask: Callable[[Key, Set[UUID]], Awaitable[Mapping[UUID, Found]]]) -> None:
        """`ask` answers many questions of one kind; the kinds are told apart by a key."""
        self._ask = ask
        self._lanes: dict[Key, _Lane[Found]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, key: Key, wanted: UUID) -> Found | None:
        """What there is under this id, None if there is nothing. Raises what asking raises."""
        loop = asyncio.get_running_loop()
        place: asyncio.Future[Found | None] = loop.create_future()
        lane = self._lanes.setdefault(key, _Lane())
        lane.waiting.setdefault(wanted, []).append(place)
        if not lane.called and lane.under_way < _AT_ONCE:
            lane.called = True  # after all that is ready now
            loop.call_soon(self._send, key, lane)
        return await place

    def _send(self, key: Key, lane: _Lane[Found]) -> None:
        lane.called = False
        while lane.waiting and lane.under_way < _AT_ONCE:
            some = list(lane.waiting)[:_MOST]
            asked = {wanted: lane.waiting.pop(wanted) for wanted in some}
            lane.under_way += 1
            task = asyncio.create_task(self._answer(key, lane, asked))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        if not lane.under_way and self._lanes.get(key) is lane:
            del self._lanes[key]

    async def _answer(
        self, key: Key, lane: _Lane[Found], asked: Mapping[UUID, list[asyncio.Future[Found | None]]]
    ) -> None:
        """A task of its own: one who leaves takes nothing from the others."""
        try:
            found = await self._ask(key, asked.keys())
        except BaseException as error:
            for place in (place for places in asked.values() for place in places if not place.done()):
                if isinstance(error, Exception):
                    place.set_exception(error)
                else:
                    place.cancel()
            if not isinstance(error, Exception):
                raise
        else:
            for wanted, places in asked.items():
                for place in places:
                    if not place.done():  # otherwise its caller left
                        place.set_result(found.get(wanted))
        finally:
            lane.under_way -= 1
            self._send(key, lane)
