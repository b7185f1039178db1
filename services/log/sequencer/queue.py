"""Requests that wait for a partition's writer: a bounded queue from the event loop to the writer's thread."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from threading import Condition, Lock
from uuid import UUID

from artifact_store.errors import PushBackError
from artifact_store.models import Acknowledgement
from services.core.commands import Command, CreatePackage, IngestFiles
from services.log.port import PartitionNotOwnedError

MAX_WAITING_BYTES = 32 << 20
"""About how much memory the requests of one partition may wait in; the next one is pushed back."""

LONGEST_WAIT_SECONDS = 10.0
"""Nothing is taken in behind a request that has waited for so long; it is pushed back instead."""

CHECK_SECONDS = 5.0
"""How long a question waits for its answer; nothing is recorded, so that it may as well be asked again later."""

MAX_BATCH_EVENTS = 1_000
"""How many events one transaction takes, or one command if it alone has more."""

MAX_BATCH_BYTES = 8 << 20
"""About how many bytes; what is appended is held several times: decided, encoded, by the client, read back."""

GATHER_SECONDS = 0.05
"""How long a command waits at most for those that were announced, so that they share its transaction."""

ANNOUNCED_SECONDS = 0.2
"""How long after the question whether a file could be ingested its command is expected."""

ENOUGH_TOGETHER = 32
"""So many commands are enough for a transaction: what one costs is small for each of them."""

TOGETHER = 2
"""How often a command fails together with others before it is tried alone."""

_EVENT_BYTES = 1_500


@dataclass(frozen=True, slots=True)
class IngestCheck:
    """The question whether files of these paths could be ingested now."""

    package_id: UUID
    relative_paths: Sequence[str]
    command_id: UUID | None


class EndQuestion(IngestCheck):
    """The question where the partition ends; it is about no package."""

    def __init__(self) -> None:
        super().__init__(UUID(int=0), (), None)


class Request:
    """A command or a question, and who waits for the answer."""

    __slots__ = (
        "answer",
        "asked",
        "came",
        "events",
        "failures",
        "last_failure",
        "size",
        "spoiled",
        "traceparent",
    )

    def __init__(
        self,
        asked: Command | IngestCheck,
        answer: asyncio.Future[Acknowledgement | str],
        traceparent: str | None = None,
    ) -> None:
        self.asked = asked
        self.answer = answer
        self.traceparent = traceparent
        self.came = time.monotonic()
        self.failures = 0
        """How many transactions failed with it."""
        self.last_failure = "unknown"
        """The kind of the last of these failures,"""
        self.spoiled = False
        """and whether it was for what is in the records."""
        self.events = 1
        """How many events it may become."""
        self.size = size_of(asked)
        """About how many bytes it takes while it waits."""
        if isinstance(asked, IngestFiles):
            self.events = len(asked.files)

    def failed(self, kind: str, *, spoiled: bool) -> None:
        """Count one more transaction that failed with it."""
        self.failures += 1
        self.last_failure = kind
        self.spoiled = spoiled


def size_of(asked: Command | IngestCheck) -> int:
    """About how many bytes a request takes while it waits."""
    if isinstance(asked, IngestFiles):
        return _EVENT_BYTES * (1 + len(asked.files))
    if isinstance(asked, CreatePackage):
        return _EVENT_BYTES + len(asked.metadata)
    if isinstance(asked, IngestCheck):
        return _EVENT_BYTES + 100 * len(asked.relative_paths)
    return _EVENT_BYTES


def runs_of(batch: Sequence[Request]) -> list[list[Request]]:
    """The requests in an order that keeps that of each package: commands that add files to one stand together."""
    runs: list[list[Request]] = []
    open_runs: dict[UUID, list[Request]] = {}
    for request in batch:
        package_id = request.asked.package_id
        if not isinstance(request.asked, IngestFiles) or request.failures:
            open_runs.pop(package_id, None)
            runs.append([request])
        elif package_id in open_runs:
            open_runs[package_id].append(request)
        else:
            runs.append([request])
            open_runs[package_id] = runs[-1]
    return runs


class RequestQueue:
    """The queue of one partition. `put` never blocks, `take` does.

    A transaction of one command costs client and brokers about as much as one of many. A file's command follows the
    question whether it could be ingested; while such commands are expected, those that are there wait a moment for
    them.
    A caller that sends one file after the other is never held up: nothing is expected when its command comes.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._waited_for = False
        self._queue: deque[Request] = deque()
        self._size = 0
        self._questions = 0
        self._announced: deque[float] = deque()
        """When commands were announced that have not come yet, the oldest first."""
        self._closed = False
        self._woken = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, request: Request) -> None:
        """Raises PushBackError when the queue is full, PartitionNotOwnedError when it is closed."""
        with self._lock:
            if self._closed:
                raise PartitionNotOwnedError("this process does not write to the package's partition any more")
            if self._queue:
                if self._size + request.size > MAX_WAITING_BYTES:
                    raise PushBackError("too many commands wait for the package's partition", 2.0)
                if request.came - self._queue[0].came > LONGEST_WAIT_SECONDS:
                    raise PushBackError("the package's partition does not get on with what waits for it", 5.0)
            self._queue.append(request)
            self._size += request.size
            if isinstance(request.asked, IngestCheck):
                self._questions += 1
            elif isinstance(request.asked, IngestFiles) and self._announced:
                self._announced.pop()  # the newest: one that never comes grows old and is forgotten
            if self._waited_for and (self._questions or self._waits_until() <= request.came or len(self._queue) == 1):
                self._changed.notify()

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests that were taken already before all others, in their order."""
        with self._changed:
            for request in reversed(list(requests)):
                self._queue.appendleft(request)
                self._size += request.size
                self._questions += isinstance(request.asked, IngestCheck)
            self._changed.notify()

    def announce(self, commands: int) -> None:
        """So many questions were answered with yes: as many commands are expected soon."""
        if commands:
            with self._lock:
                self._announced.extend([time.monotonic()] * commands)

    def wake(self) -> None:
        """Let `take` return, with nothing if need be."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def take(self, timeout: float) -> list[Request] | None:
        """Wait `timeout` seconds for requests and take what fits into one transaction; None once the queue is closed.

        A request that failed before together with others comes alone; questions do not wait for commands that do.
        Empty when the time is over or `wake` was called.
        """
        with self._changed:
            now = time.monotonic()
            give_up = now + timeout
            self._waited_for = True
            while not self._closed and not self._woken and not self._questions:
                until = self._waits_until() if self._queue else give_up
                if until <= now:
                    break
                self._changed.wait(until - now)
                now = time.monotonic()
            self._waited_for = False
            if self._closed:
                return None
            alone = self._questions and not self._woken and self._waits_until() > now
            self._woken = False
            return self._questions_alone() if alone else self._next_batch()

    def close(self) -> None:
        """Take no more, and let nothing be taken; what waits is left for `drain`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self) -> list[Request]:
        """Everything that still waits."""
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._size = self._questions = 0
            return left

    def _waits_until(self) -> float:
        """When the oldest request has waited long enough for what is announced; a time that is over if nothing is."""
        oldest = self._queue[0].came
        while self._announced and self._announced[0] < oldest - ANNOUNCED_SECONDS:
            self._announced.popleft()
        return oldest + GATHER_SECONDS if self._announced and len(self._queue) < ENOUGH_TOGETHER else oldest

    def _questions_alone(self) -> list[Request]:
        questions = [request for request in self._queue if isinstance(request.asked, IngestCheck)]
        self._queue = deque(request for request in self._queue if not isinstance(request.asked, IngestCheck))
        self._questions = 0
        self._size -= sum(request.size for request in questions)
        return [request for request in questions if not request.answer.done()]

    def _next_batch(self) -> list[Request]:
        batch: list[Request] = []
        events = size = 0
        while self._queue:
            request = self._queue[0]
            alone = request.failures >= TOGETHER
            full = events + request.events > MAX_BATCH_EVENTS or size + request.size > MAX_BATCH_BYTES
            if batch and (alone or full):
                break
            self._queue.popleft()
            self._size -= request.size
            self._questions -= isinstance(request.asked, IngestCheck)
            if request.answer.done():
                continue  # nobody waits any more
            batch.append(request)
            events += request.events
            size += request.size
            if alone:
                break
        return batch
