"""Who owns which partition, as the group of writers says; remembered for a moment."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from services.errors import ConfigurationError, UnavailableError
from services.log.kafka.group import WriterGroup

_LOOK_SECONDS = 1.0
"""How often it is looked whether a forwarded command's owner still is: a frozen one neither answers nor refuses."""

_FRESH_SECONDS = 1.0
_UNSETTLED_SECONDS = 0.1
"""After so long the group may have something new to say."""

_FAILED_SECONDS = 0.5
"""So long nobody asks again after the group did not answer, for which each has waited for seconds already."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Owner:
    """A member of the group. `url` is None when it cannot be reached by others."""

    url: str | None
    is_self: bool


class Owners:
    """Asks the group once for all who want to know at the same time."""

    def __init__(self, group: WriterGroup) -> None:
        self._group = group
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-owners")
        self._asking = asyncio.Lock()
        self._closed = False
        self._known: dict[int, Owner] = {}
        self._failure: UnavailableError | None = None
        self._until = 0.0
        """How long what is known, or that nobody can say it, is believed,"""
        self._least = 0.0
        """and how long at least, even if it has proved wrong."""

    async def all(self) -> Mapping[int, Owner]:
        """Owner by partition, without those that nobody owns. Raises UnavailableError, ConfigurationError."""
        async with self._asking:
            if self._closed:
                raise UnavailableError("this process asks for no owners any more")
            if time.monotonic() >= self._until:
                try:
                    # A thread of its own: a group that keeps still must not hold up what else is asked.
                    members = await asyncio.get_running_loop().run_in_executor(self._thread, self._group.members)
                except UnavailableError as error:
                    self._failure = error
                    self._until = self._least = time.monotonic() + _FAILED_SECONDS
                    raise
                self._failure = None
                # Between two assignments most partitions stay where they were.
                fresh = _FRESH_SECONDS if members is not None else _UNSETTLED_SECONDS
                if members is not None:
                    self._known = {
                        p: Owner(m.client_id if m.client_id.startswith("http") else None, self._group.is_self(m))
                        for m in members
                        for p in m.partitions
                    }
                self._until = time.monotonic() + fresh
                self._least = time.monotonic() + _UNSETTLED_SECONDS
            if self._failure is not None:
                raise UnavailableError(self._failure.detail)
            return self._known

    async def while_owned(self, partition: int, owner: Owner, answer: Awaitable[_T]) -> _T:
        """Wait for the answer of a partition's owner. Raises UnavailableError once another owns the partition."""
        waiting = asyncio.ensure_future(answer)
        looking: asyncio.Future[None] | None = None
        try:
            if not (await asyncio.wait([waiting], timeout=_LOOK_SECONDS))[0]:
                looking = asyncio.ensure_future(self._goes_elsewhere(partition, owner))
                await asyncio.wait([waiting, looking], return_when=asyncio.FIRST_COMPLETED)
                if not waiting.done():
                    await looking
                    raise UnavailableError("the partition went to another process")
            return await waiting
        finally:
            waiting.cancel()
            if looking is not None:
                looking.cancel()

    async def _goes_elsewhere(self, partition: int, owner: Owner) -> None:
        """Return once the group says that another owns the partition."""
        while True:
            # Who cannot say who owns it does not say that it went elsewhere.
            with suppress(UnavailableError, ConfigurationError):
                if (await self.all()).get(partition, owner) != owner:
                    return
            await asyncio.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Ask no more. Does not wait for a question that is under way."""
        self._closed = True
        self._thread.shutdown(wait=False)

    def forget(self) -> None:
        """What is remembered has proved wrong; the group is asked again, unless that was a moment ago."""
        self._until = min(self._until, self._least)
