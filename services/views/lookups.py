"""Questions about single files, of which those that wait at the same time are put to the database together."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from uuid import UUID

_MOST = 500
"""Most files of one question."""

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(slots=True)
class _Lane(Generic[Found]):
    """Those who wait for answers of one kind."""

    waiting: dict[UUID, list[asyncio.Future[Found | None]]] = field(default_factory=dict)
    busy: bool = False
    """Whether a question is under way, or about to be sent."""


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
        if not lane.busy:
            lane.busy = True
            loop.call_soon(self._send, key, lane)  # after all that is ready now
        return await place

    def _send(self, key: Key, lane: _Lane[Found]) -> None:
        """Ask for all who wait, if any. One question is under way at a time: many files cost little more than one."""
        if not lane.waiting:
            del self._lanes[key]
            return
        some = list(lane.waiting)[:_MOST]
        asked = {wanted: lane.waiting.pop(wanted) for wanted in some}
        task = asyncio.create_task(self._answer(key, lane, asked))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

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
            self._send(key, lane)
