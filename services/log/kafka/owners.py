"""Who owns which partition, as the group of writers says; the last answer stands while the group cannot be asked.

The group's coordinator may be away while all owners are well. A process that has lost a partition since the last answer
refuses its commands (PartitionNotOwnedError), so asking it costs time and never an event.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import TypeVar

from services.errors import ArtifactStoreError, ConfigurationError, UnavailableError
from services.log.kafka.group import WriterGroup

_LOOK_SECONDS = 1.0
"""How often it is looked whether a forwarded command's owner still is: a frozen one neither answers nor refuses."""

_FRESH_SECONDS = 1.0
_UNSETTLED_SECONDS = 0.1
"""After so long the group may have something new to say."""

_FAILED_SECONDS = 0.5
"""The pause before the group is asked again after it did not answer."""

_PATIENCE_SECONDS = 1.0
"""How long callers wait for the group's answer while an earlier answer is known."""

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
        # A thread of its own: a group that keeps still must not hold up what else is asked.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-owners")
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._closed = False
        self._known: dict[int, Owner] | None = None
        """The group's last answer."""
        self._failure: ArtifactStoreError | None = None
        """Why there was no answer to the last question."""
        self._until = 0.0
        """When the group is asked again,"""
        self._least = 0.0
        """and before when it is not, even if what is known has proved wrong."""

    async def all(self) -> Mapping[int, Owner]:
        """Owner by partition, without those that nobody owns.

        While the group cannot be asked, those that it named last. Raises UnavailableError or ConfigurationError when it
        has not named any yet.
        """
        if self._closed:
            raise UnavailableError("this process asks for no owners any more")
        if time.monotonic() >= self._until:
            if self._question is None or self._question.done():
                self._question = asyncio.create_task(self._ask(), name="log-owners")
                self._asked_at = time.monotonic()
            known = self._known is not None
            patience = max(0.0, self._asked_at + _PATIENCE_SECONDS - time.monotonic()) if known else None
            await asyncio.wait([self._question], timeout=patience)
            if self._closed:
                raise UnavailableError("this process asks for no owners any more")
            if self._question.done():
                self._question.result()
        if self._known is not None:
            return self._known
        if self._failure is not None:
            raise type(self._failure)(self._failure.detail)
        return {}

    async def _ask(self) -> None:
        try:
            members = await asyncio.get_running_loop().run_in_executor(self._thread, self._group.members)
        except (UnavailableError, ConfigurationError) as error:
            self._failure = error
            self._until = self._least = time.monotonic() + _FAILED_SECONDS
            return
        self._failure = None
        # Between two assignments most partitions stay where they were.
        if members is not None:
            self._known = {
                p: Owner(m.client_id if m.client_id.startswith("http") else None, self._group.is_self(m))
                for m in members
                for p in m.partitions
            }
        self._until = time.monotonic() + (_FRESH_SECONDS if members is not None else _UNSETTLED_SECONDS)
        self._least = time.monotonic() + _UNSETTLED_SECONDS

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
        if self._question is not None:
            self._question.cancel()
        self._thread.shutdown(wait=False)

    def forget(self) -> None:
        """What is remembered has proved wrong; the group is asked again, unless that was a moment ago."""
        self._until = min(self._until, self._least)
