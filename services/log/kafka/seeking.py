"""Bringing a request to the writer of its partition, in this process or another, for as long as it takes to find it.

Retrying is safe, for a command carries its id. But once a writer may have tried a command, the log may hold it: that
another writer has no room for it, or cannot write, is then no answer to it.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TypeVar, cast

from services.core.commands import Acknowledgement, Command
from services.errors import ArtifactStoreError, PushBackError, RejectedError, UnavailableError
from services.log.kafka.context import Counts
from services.log.kafka.outcomes import in_doubt
from services.log.kafka.owners import Owners
from services.log.kafka.requests import IngestCheck
from services.log.port import Forwarder, NotAppendedError, PartitionNotOwnedError

CHECK_SECONDS = 12.0
"""How long a question may look for the owner: twice as long as it takes until another owns what a killed one did."""

MAX_BYTES = 32 << 20
"""About how much memory commands of one partition may take that seek its writer or wait for another process's."""

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5

_T = TypeVar("_T")

There = Callable[[Forwarder, str], Awaitable[_T]]
"""Asks the process at this URL."""

Here = Callable[[Command | IngestCheck, int], "asyncio.Future[Acknowledgement | None]"]
"""Lets this process's writer of the partition carry it out; PartitionNotOwnedError when there is none."""


class Seeking:
    """Of one process; belongs to its event loop."""

    def __init__(
        self,
        owners: Owners,
        forwarder: Forwarder | None,
        here: Here,
        foreign: Callable[[], str | None],
        counts: Counts,
        seconds: float,
    ) -> None:
        """`foreign` says what makes the topic another log by now; a command is sought for so many seconds."""
        self._owners = owners
        self._forwarder = forwarder
        self._here = here
        self._foreign = foreign
        self._counts = counts
        self._seconds = seconds
        self._held: dict[int, int] = {}
        """Bytes of requests that are under way, by partition."""

    @contextmanager
    def room(self, partition: int, size: int) -> Iterator[None]:
        """Hold memory for a request that seeks the partition's writer. Raises PushBackError when others hold it."""
        held = self._held.get(partition, 0)
        if held and held + size > MAX_BYTES:
            self._counts.pushed_back += 1
            raise PushBackError("too many commands seek the writer of the package's partition", 2.0)
        self._held[partition] = held + size
        try:
            yield
        finally:
            self._held[partition] -= size

    async def answer(self, partition: int, asked: Command | IngestCheck, there: There[_T], *, doubtful: bool) -> _T:
        """Seek the partition's writer until it has answered. The log may hold a command that is `doubtful`.

        Raises as `CommandWriter.submit`; ConfigurationError, CorruptError: the writer cannot write.
        """
        loop, pause = asyncio.get_running_loop(), _FIRST_PAUSE
        check = isinstance(asked, IngestCheck)
        deadline = loop.time() + (min(CHECK_SECONDS, self._seconds) if check else self._seconds)
        while True:
            if (foreign := self._foreign()) is not None:
                raise in_doubt(foreign) if doubtful else UnavailableError(foreign)
            try:
                return await self._once(partition, asked, there, deadline)
            except (RejectedError, NotAppendedError):
                raise
            except PartitionNotOwnedError as error:
                trouble = error.detail
            except TimeoutError:
                trouble, doubtful = "the partition's writer gave no answer in time", not check
            except UnavailableError as error:
                trouble, doubtful = error.detail, not check
            except ArtifactStoreError as error:
                if not doubtful:
                    raise
                trouble = error.detail
            self._owners.forget()
            if loop.time() + pause > deadline:
                if check:
                    self._counts.pushed_back += 1
                    raise PushBackError(trouble, 2.0)
                raise in_doubt(trouble)
            await asyncio.sleep(pause * random.uniform(0.5, 1.5))
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _once(self, partition: int, asked: Command | IngestCheck, there: There[_T], deadline: float) -> _T:
        """What the writer answers, as far as it is known who that is.

        Raises what it does; PartitionNotOwnedError: nobody has tried it; TimeoutError: another process gave no answer.
        """
        with suppress(PartitionNotOwnedError):
            return cast("_T", await self._here(asked, partition))
        try:
            owner = (await self._owners.all()).get(partition)
        except UnavailableError as error:
            raise PartitionNotOwnedError(error.detail) from error
        if owner is None or owner.is_self:
            raise PartitionNotOwnedError(f"partition {partition} has no writer now")
        if owner.url is None or self._forwarder is None:
            raise PartitionNotOwnedError(f"partition {partition} is written by another process that cannot be reached")
        async with asyncio.timeout_at(deadline):
            return await self._owners.while_owned(partition, owner, there(self._forwarder, owner.url))
