"""Lookups of single files by id. Those that wait at the same time are sent to the database in one query."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Set
from dataclasses import dataclass, field
from typing import Generic, TypeVar
from uuid import UUID

_MOST = 500
"""The most ids in one query."""

Key = TypeVar("Key")
Found = TypeVar("Found")


@dataclass(slots=True)
class _Lane(Generic[Found]):
    """The callers that wait for answers of one kind, by id."""

    waiting: dict[UUID, list[asyncio.Future[Found | None]]] = field(default_factory=dict)
    busy: bool = False
    """Whether a query is running or about to be sent."""


class Lookups(Generic[Key, Found]):
    """Finds things by id. Belongs to one event loop.

    A call of `find` never gets the result of a query that was sent before the call.
    """

    def __init__(self, ask: Callable[[Key, Set[UUID]], Awaitable[Mapping[UUID, Found]]]) -> None:
        """`ask` finds many ids of one kind in one query. A key says which kind."""
        self._ask = ask
        self._lanes: dict[Key, _Lane[Found]] = {}
        self._tasks: set[asyncio.Task[None]] = set()

    async def find(self, key: Key, wanted: UUID) -> Found | None:
        """The thing with this id, or None. Raises whatever `ask` raises."""
        loop = asyncio.get_running_loop()
        place: asyncio.Future[Found | None] = loop.create_future()
        lane = self._lanes.setdefault(key, _Lane())
        lane.waiting.setdefault(wanted, []).append(place)
        if not lane.busy:
            lane.busy = True
            loop.call_soon(self._send, key, lane)  # after the callbacks that are ready now
        return await place

    def _send(self, key: Key, lane: _Lane[Found]) -> None:
        """Send a query for all ids that are waited for, if any. Only one runs at a time: many ids cost little more."""
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
        """Run the query and give out its results. Runs as a task, so that a cancelled caller does not affect others."""
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
                    if not place.done():  # otherwise its caller was cancelled
                        place.set_result(found.get(wanted))
        finally:
            self._send(key, lane)
