"""The bounded queue of requests from the event loop to the thread of a partition's writer."""

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
from services.core.access import EVERYTHING, Grants
from services.core.decide import Command, CreatePackage, IngestFiles
from services.log.port import PartitionNotOwnedError
from services.runtime.tracing import Span

MAX_WAITING_BYTES = 32 << 20
"""Push a request back if the waiting requests of its partition would take more memory than about this."""

LONGEST_WAIT_SECONDS = 10.0
"""Push requests back while the first in the queue has waited for longer than this."""

CHECK_SECONDS = 5.0
"""How long a question may wait for its answer. Nothing is recorded, so it can be asked again later."""

MAX_BATCH_EVENTS = 1_000
"""The most events in one transaction. A command with more events gets a transaction of its own."""

MAX_BATCH_BYTES = 8 << 20
"""The same in bytes, roughly. Events are in memory several times: decided, encoded, in the client, read back."""

GATHER_SECONDS = 0.05
"""How long a command waits at most for announced commands, to share a transaction with them."""

ANNOUNCED_SECONDS = 0.2
"""How long after an `IngestCheck` its command is expected."""

ENOUGH_TOGETHER = 32
"""With this many commands in the queue, none waits for others: each one's share of a transaction is small."""

FAILURES_BEFORE_ALONE = 2
"""After this many failed transactions with others, a command gets a transaction of its own."""

_EVENT_BYTES = 1_500


@dataclass(frozen=True, slots=True)
class IngestCheck:
    """Asks whether files with these paths could be ingested now."""

    package_id: UUID
    relative_paths: Sequence[str]
    command_id: UUID | None
    grants: Grants = EVERYTHING
    principal: str | None = None
    """Who would send them in another's name; see `services.core.decide`."""


class EndQuestion(IngestCheck):
    """Asks where the partition ends. It concerns no package, but is queued and timed like an `IngestCheck`."""

    def __init__(self) -> None:
        super().__init__(UUID(int=0), (), None)


class Request:
    """A command or a question, with the future that its caller awaits."""

    __slots__ = (
        "answer",
        "asked",
        "came",
        "events",
        "failures",
        "last_failure",
        "size",
        "span",
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
        self.span: Span | None = None
        """That of appending its events, from when they are decided until they are in the log."""
        self.came = time.monotonic()
        self.failures = 0
        """How many transactions with it have failed."""
        self.last_failure = "unknown"
        """Why the last of them failed."""
        self.spoiled = False
        """Whether the records of the last of them were the cause, so that the next one will fail too."""
        self.events = 1
        """How many events it becomes at most."""
        self.size = size_of(asked)
        """About how many bytes of memory it takes."""
        if isinstance(asked, IngestFiles):
            self.events = len(asked.files)

    def failed(self, kind: str, *, spoiled: bool) -> None:
        """Count one more failed transaction."""
        if self.span is not None:
            self.span.end(error=kind)
            self.span = None
        self.failures += 1
        self.last_failure = kind
        self.spoiled = spoiled


def size_of(asked: Command | IngestCheck) -> int:
    """About how many bytes of memory a request takes."""
    if isinstance(asked, IngestFiles):
        return _EVENT_BYTES * (1 + len(asked.files))
    if isinstance(asked, CreatePackage):
        return _EVENT_BYTES + len(asked.metadata)
    if isinstance(asked, IngestCheck):
        return _EVENT_BYTES + 100 * len(asked.relative_paths)
    return _EVENT_BYTES


def runs_of(batch: Sequence[Request]) -> list[list[Request]]:
    """Group commands that add files to the same package. The order within each package is kept."""
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

    A transaction with one command costs about as much as one with many. Most commands that ingest a file are announced:
    by an `IngestCheck` that passed, or by `announce`. Commands in the queue wait a moment for those that are announced.
    A caller that sends one file after the other never waits: when its command comes, nothing else is announced.
    """

    def __init__(self) -> None:
        self._lock = Lock()
        self._changed = Condition(self._lock)
        self._waited_for = False
        self._queue: deque[Request] = deque()
        self._size = 0
        self._questions = 0
        self._announced: deque[float] = deque()
        """When the commands that are expected were announced, the oldest first."""
        self._closed = False
        self._woken = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, request: Request) -> None:
        """Add a request. Raises PushBackError when the queue is full, PartitionNotOwnedError when it is closed."""
        with self._lock:
            if self._closed:
                raise PartitionNotOwnedError("this process no longer writes to the package's partition")
            if self._queue:
                if self._size + request.size > MAX_WAITING_BYTES:
                    raise PushBackError("too many commands wait for the package's partition", 2.0)
                if request.came - self._queue[0].came > LONGEST_WAIT_SECONDS:
                    raise PushBackError(
                        "the package's partition makes no progress with the commands that wait for it", 5.0
                    )
            self._queue.append(request)
            self._size += request.size
            if isinstance(request.asked, IngestCheck):
                self._questions += 1
            elif isinstance(request.asked, IngestFiles) and self._announced:
                self._announced.pop()  # the newest, so that a command that never comes is forgotten when it is old
            if self._waited_for and (self._questions or self._waits_until() <= request.came or len(self._queue) == 1):
                self._changed.notify()

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests that were taken before back to the front, in their order."""
        with self._changed:
            for request in reversed(list(requests)):
                self._queue.appendleft(request)
                self._size += request.size
                self._questions += isinstance(request.asked, IngestCheck)
            self._changed.notify()

    def announce(self, commands: int) -> None:
        """Expect this many commands soon."""
        if commands:
            with self._lock:
                self._announced.extend([time.monotonic()] * commands)

    def wake(self) -> None:
        """Make `take` return, even with nothing."""
        with self._changed:
            self._woken = True
            self._changed.notify()

    def take(self, timeout: float) -> list[Request] | None:
        """Wait up to `timeout` seconds for requests, and take those that fit into one transaction.

        Returns None once the queue is closed. The list may be empty when the time is over or `wake` was called. A
        request that must be tried alone is returned alone. Questions do not wait for announced commands.
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
        """Accept nothing more, and end `take`. What still waits is left for `drain`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self) -> list[Request]:
        """Remove and return everything that still waits."""
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._size = self._questions = 0
            return left

    def _waits_until(self) -> float:
        """Until when the oldest request waits for announced commands; in the past if it does not wait."""
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
            alone = request.failures >= FAILURES_BEFORE_ALONE
            full = events + request.events > MAX_BATCH_EVENTS or size + request.size > MAX_BATCH_BYTES
            if batch and (alone or full):
                break
            self._queue.popleft()
            self._size -= request.size
            self._questions -= isinstance(request.asked, IngestCheck)
            if request.answer.done():
                continue  # its caller gave up
            batch.append(request)
            events += request.events
            size += request.size
            if alone:
                break
        return batch
