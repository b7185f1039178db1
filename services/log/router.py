"""Brings a request to the writer of its partition, in this process or another, and retries until that one answers.

Retrying is safe, because a command carries its id. But once a writer may have tried a command, the log may hold it. A
refusal by another writer (it is full, or cannot write) is then no answer to the command.

The router stands above the sequencers. A sequencer that cannot answer says so by an error: PartitionNotOwnedError when
nobody has tried the command, UnavailableError when the log may hold it. The router then asks elsewhere.

The group of writers says who owns which partition. Its coordinator may be away while all owners are well, so the last
answer is used meanwhile. A process that lost a partition since then refuses its commands: an old answer costs time and
never an event.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TypeVar

from artifact_store.errors import ArtifactStoreError, ConfigurationError, PushBackError, RejectedError, UnavailableError
from artifact_store.models import Acknowledgement
from services.core.decide import Command
from services.log.port import Forwarder, NotAppendedError, PartitionNotOwnedError
from services.log.sequencer.partition_writer import PartitionWriter
from services.log.sequencer.queue import Counts, EndQuestion, IngestCheck, in_doubt, size_of

MAX_BYTES = 64 << 20
"""About how much memory requests for one partition may take: twice what its queue holds, for those that are being
decided or wait for another process."""

_FIRST_PAUSE = 0.02
_LONGEST_PAUSE = 0.5

_T = TypeVar("_T")

Answer = Acknowledgement | str | int | None
"""To a command; to an `IngestCheck`, the retention class; to an `EndQuestion`, the offset. None: the release of the
owner does not know the question."""


class Router:
    """One for each process. Used on its event loop."""

    def __init__(self, owners: Owners, forwarder: Forwarder | None, counts: Counts, seconds: float) -> None:
        """`seconds` is how long a request may take, with all retries."""
        self.writers: dict[int, PartitionWriter] = {}
        """The writers of this process, by partition. Whoever starts and stops them updates this, from any thread."""
        self.foreign: str | None = None
        """Why the topic is no longer the same log; nothing is written then."""
        self._owners = owners
        self._forwarder = forwarder
        self._counts = counts
        self._seconds = seconds
        self._held: dict[int, int] = {}
        """Memory of the requests that wait for an answer (bytes), by partition."""
        self._under_way = 0
        self._idle = asyncio.Event()
        self.closing = False
        """Whether nothing is taken any more."""

    async def answer(self, partition: int, asked: Command | IngestCheck) -> Answer:
        """Ask the partition's writer, wherever it is, until it answers.

        Raises as `CommandWriter.submit`, and ConfigurationError or CorruptError when the writer cannot write.
        """
        if self.closing:
            raise PushBackError("this gateway is being shut down")
        with self._room(partition, size_of(asked)), self._counted():
            return await self._sought(partition, asked)

    async def answer_here(self, partition: int, asked: Command | IngestCheck) -> Answer:
        """As `answer`, but PartitionNotOwnedError when this process is not the partition's writer."""
        if self.closing:
            raise PartitionNotOwnedError("this process hands its partitions over")
        with self._counted():
            return await self._here(partition, asked)

    async def close(self) -> None:
        """Take nothing more; returns when everything that was taken is answered."""
        self.closing = True
        while self._under_way:
            self._idle.clear()
            await self._idle.wait()

    @contextmanager
    def _counted(self) -> Iterator[None]:
        self._under_way += 1
        try:
            yield
        finally:
            self._under_way -= 1
            if not self._under_way:
                self._idle.set()

    @contextmanager
    def _room(self, partition: int, size: int) -> Iterator[None]:
        """Count the request's memory. Raises PushBackError when there is too little left."""
        held = self._held.get(partition, 0)
        if held and held + size > MAX_BYTES:
            self._counts.pushed_back += 1
            raise PushBackError("too many commands are looking for the writer of the package's partition", 2.0)
        self._held[partition] = held + size
        try:
            yield
        finally:
            self._held[partition] -= size

    async def _sought(self, partition: int, asked: Command | IngestCheck) -> Answer:
        loop, pause, doubtful = asyncio.get_running_loop(), _FIRST_PAUSE, False
        check = isinstance(asked, IngestCheck)
        deadline = loop.time() + self._seconds
        while True:
            if self.foreign is not None:
                raise in_doubt(self.foreign) if doubtful else UnavailableError(self.foreign)
            own = self.writers.get(partition)
            try:
                return await self._once(partition, asked, deadline)
            except (RejectedError, NotAppendedError):
                raise
            except PartitionNotOwnedError as error:
                trouble = error.detail
            except TimeoutError:
                trouble, doubtful = "the partition's writer gave no answer in time", not check
            except UnavailableError as error:
                if own is not None and not own.ended:
                    raise  # the partition is still this process's, so this is its writer's answer
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

    async def _once(self, partition: int, asked: Command | IngestCheck, deadline: float) -> Answer:
        """Ask whoever is known as the partition's writer.

        Raises what the writer raises; PartitionNotOwnedError: nobody has tried the request; TimeoutError: another
        process did not answer.
        """
        with suppress(PartitionNotOwnedError):
            return await self._here(partition, asked, deadline)
        try:
            async with asyncio.timeout_at(deadline):
                owner = (await self._owners.all()).get(partition)
        except UnavailableError as error:
            raise PartitionNotOwnedError(error.detail) from error
        except TimeoutError:
            raise PartitionNotOwnedError("the group of writers did not say in time who owns the partition") from None
        if owner is None or owner.is_self:
            raise PartitionNotOwnedError(f"partition {partition} has no writer now")
        if owner.url is None or self._forwarder is None:
            raise PartitionNotOwnedError(f"partition {partition} is written by another process that cannot be reached")
        there = _asking(self._forwarder, owner.url, partition, asked)
        async with asyncio.timeout_at(deadline):
            return await self._owners.while_owned(partition, owner, there)

    def _here(
        self, partition: int, asked: Command | IngestCheck, deadline: float = math.inf
    ) -> asyncio.Future[Acknowledgement | str]:
        """Let this process's writer answer. Raises PartitionNotOwnedError, and as `PartitionWriter.submit`."""
        if self.foreign is not None:
            raise UnavailableError(self.foreign)
        writer = self.writers.get(partition)
        if writer is None:
            raise PartitionNotOwnedError("this process does not write to the package's partition")
        return writer.submit(asked, deadline)


def _asking(forwarder: Forwarder, url: str, partition: int, asked: Command | IngestCheck) -> Awaitable[Answer]:
    """Ask the process at this URL."""
    if isinstance(asked, EndQuestion):
        return forwarder.end(url, partition)
    if isinstance(asked, IngestCheck):
        return forwarder.check_ingest(
            url, asked.package_id, asked.relative_paths, asked.command_id, asked.grants, asked.principal
        )
    return forwarder.submit(url, asked)


_LOOK_SECONDS = 1.0
"""How often to check that the owner of a forwarded command still is: a frozen process never answers."""

_FRESH_SECONDS = 1.0
_UNSETTLED_SECONDS = 0.1
"""How old an answer of the group may be: usually, and while it rebalances."""

_FAILED_SECONDS = 0.5
"""How long to wait before asking a group again that did not answer."""

_PATIENCE_SECONDS = 1.0
"""How long callers wait for a new answer of the group before they use the earlier one."""


@dataclass(frozen=True, slots=True)
class Owner:
    """A member of the group. `url` is None if others cannot reach it."""

    url: str | None
    is_self: bool


class Owners:
    """Asks the group who owns which partition, once for all callers that wait at the same time."""

    def __init__(self, ask: Callable[[], Mapping[int, Owner] | None]) -> None:
        """`ask` blocks. It returns None while the group rebalances, and raises UnavailableError, ConfigurationError."""
        self._ask_group = ask
        # A thread of its own: a group that does not answer must not hold up other questions.
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-owners")
        self._question: asyncio.Task[None] | None = None
        self._asked_at = 0.0
        self._closed = False
        self._known: Mapping[int, Owner] | None = None
        """The group's last answer."""
        self._failure: ArtifactStoreError | None = None
        """Why the last question got no answer."""
        self._until = 0.0
        """When to ask the group again, on the monotonic clock (s)."""
        self._least = 0.0
        """The earliest time to ask it again if its answer has proved wrong."""

    async def all(self) -> Mapping[int, Owner]:
        """The owners by partition. Partitions without an owner are absent.

        While the group does not answer, these are the owners that it named last. Raises UnavailableError or
        ConfigurationError if it has not answered yet.
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
            found = await asyncio.get_running_loop().run_in_executor(self._thread, self._ask_group)
        except (UnavailableError, ConfigurationError) as error:
            self._failure = error
            self._until = self._least = time.monotonic() + _FAILED_SECONDS
            return
        self._failure = None
        # While the group rebalances, most partitions stay where they were.
        if found is not None:
            self._known = found
        self._until = time.monotonic() + (_FRESH_SECONDS if found is not None else _UNSETTLED_SECONDS)
        self._least = time.monotonic() + _UNSETTLED_SECONDS

    async def while_owned(self, partition: int, owner: Owner, answer: Awaitable[_T]) -> _T:
        """Wait for the answer of a partition's owner. Raises UnavailableError once the partition has another owner."""
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
        """Return once the group names another owner of the partition."""
        while True:
            # No answer does not mean that the partition has another owner.
            with suppress(UnavailableError, ConfigurationError):
                if (await self.all()).get(partition, owner) != owner:
                    return
            await asyncio.sleep(_LOOK_SECONDS)

    def close(self) -> None:
        """Stop asking. Does not wait for a running question."""
        self._closed = True
        if self._question is not None:
            self._question.cancel()
        self._thread.shutdown(wait=False)

    def forget(self) -> None:
        """Ask the group again, unless it was asked a moment ago: its answer has proved wrong."""
        self._until = min(self._until, self._least)
