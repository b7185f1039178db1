"""The requests that wait for the thread of a partition's writer, and the answers other than acknowledgements.

`RequestQueue` is the bounded queue between the event loop and the thread. `Deadlines` answers what waits too long.
Every error says whether the log may hold the command nevertheless. `Counts` are the totals that metrics show.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from threading import Condition, Lock
from typing import Any
from uuid import UUID

from artifact_store.errors import (
    ArtifactStoreError,
    ConfigurationError,
    ConflictError,
    CorruptError,
    LogIdentityError,
    LogLostError,
    PackageQuarantinedError,
    PushBackError,
    RejectedError,
    UnavailableError,
)
from artifact_store.models import Acknowledgement
from services.core.decide import Command, CreatePackage, IngestCheck, IngestFiles
from services.log.port import HeldError, NotAppendedError, PartitionNotOwnedError
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
        """The span of appending its events, from when they are decided until they are in the log."""
        self.came = time.monotonic()
        self.failures = 0
        """How many transactions with it have failed."""
        self.last_failure = "unknown"
        """Why the last of these transactions failed."""
        self.spoiled = False
        """Whether its records were the cause of the last failure, so that the next transaction will fail too."""
        self.events = 1
        """The most events that it may become."""
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
        """When the expected commands were announced, oldest first."""
        self._closed = False
        self._woken = False

    def __len__(self) -> int:
        return len(self._queue)

    def put(self, request: Request) -> None:
        """Add a request. Raises PushBackError if the queue is full, PartitionNotOwnedError if it is closed."""
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
                self._announced.pop()  # the newest, so that announced commands that never come expire
            if self._waited_for and (self._questions or self._waits_until() <= request.came or len(self._queue) == 1):
                self._changed.notify()

    def put_back(self, requests: Iterable[Request]) -> None:
        """Put requests that were taken back at the front of the queue, in their order."""
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
        """Make `take` return, even if there is no request."""
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
        """Accept no more requests, and end `take`. Requests that still wait are left for `drain`."""
        with self._changed:
            self._closed = True
            self._changed.notify()

    def drain(self) -> list[Request]:
        """Remove and return all requests that still wait."""
        with self._changed:
            left = list(self._queue)
            self._queue.clear()
            self._size = self._questions = 0
            return left

    def _waits_until(self) -> float:
        """The time until which the oldest request waits for announced commands; in the past if it does not wait."""
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


REFUSE_SECONDS = 10.0
"""After an error that an operator has to fix, refuse every request for this long, then take over again."""

HELD_SECONDS = 1.0
"""The same after `Driver.require` has refused. It is shorter, because asking again costs nothing."""

Outcome = Acknowledgement | Exception | int | str
"""The answer to a request once its batch is appended. To a command, an acknowledgement; to an `IngestCheck`, the
package's retention class; to an `EndQuestion`, the offset where the partition ends; to any of them, an error."""

_UNKNOWN = "the outcome is unknown"


@dataclass(slots=True)
class Counts:
    """Totals over all writers of a process. Any thread may read and increase them."""

    takeovers: Counter[str] = field(default_factory=Counter)
    """Take-overs, by what the state was restored from."""
    takeover_seconds: float = 0.0
    """The total time of all take-overs."""
    failed_takeovers: int = 0
    """Leases and take-overs that failed. Each is followed by another take-over."""
    pushed_back: int = 0
    """Requests that were answered with PushBackError."""
    appended: int = 0
    """Appended events."""
    transactions: int = 0
    """Transactions that appended events."""


def in_doubt(detail: str) -> UnavailableError:
    """The answer to a command when it is unknown whether the log holds it."""
    if _UNKNOWN in detail:  # the process to which it was forwarded says so already
        return UnavailableError(detail)
    return UnavailableError(f"{detail}; {_UNKNOWN}, retry with the same command id")


def lost(partition: int) -> LogLostError:
    """The answer to every request while the partition lacks acknowledged events."""
    return LogLostError(
        f"partition {partition} lost events that it had acknowledged, so nothing is appended to it until an operator "
        "restores the topic or accepts the loss; `artifact-store status` says which"
    )


def refused(error: Exception) -> tuple[ArtifactStoreError, float] | None:
    """The error to refuse every request with, and for how many seconds; None if another take-over may help at once."""
    if isinstance(error, LogIdentityError):
        return UnavailableError(error.detail), math.inf  # nothing is wrong with the requests
    if isinstance(error, CorruptError):
        return error, math.inf
    if isinstance(error, HeldError):
        return error, REFUSE_SECONDS if error.own_clock else HELD_SECONDS
    if isinstance(error, ConfigurationError):
        return error, REFUSE_SECONDS  # an operator may fix it, such as a missing right or topic
    return None


def unrecorded(partition: int, error: ArtifactStoreError) -> ArtifactStoreError:
    """The answer to an operator's confirmation that was not recorded because of `error`.

    A PushBackError stays one if trying again may help: the cause may pass, or not exist in another process. If only an
    operator can fix the cause, the answer is a ConflictError.
    """
    held = isinstance(error, HeldError) and not error.own_clock
    if isinstance(error, RejectedError | PushBackError) and not held:
        return error
    return ConflictError(f"nothing is recorded in partition {partition} until this is mended: {error.detail}")


def quarantined(cause: str) -> PackageQuarantinedError:
    """The answer to a command that would add to a package whose history the log contradicts."""
    return PackageQuarantinedError(
        f"nothing is added to a package whose history the log contradicts ({cause}): publish it as another one"
    )


def told(request: Request, outcome: Outcome) -> Outcome:
    """The answer for the caller: `outcome`, or that the outcome is unknown.

    It is unknown if a transaction with the command has failed, and `outcome` is an error that came before the command
    was decided again: the log may hold the command.
    """
    if not request.failures or isinstance(request.asked, IngestCheck):
        return outcome
    if isinstance(outcome, PartitionNotOwnedError | PushBackError | CorruptError | ConfigurationError):
        return in_doubt(outcome.detail)
    return outcome


def given_up(request: Request, done: int) -> Exception:
    """The answer to a command whose transactions failed, with others and alone. The log holds `done` of its events."""
    if request.spoiled and request.events == 1:
        return RejectedError("Kafka refuses an event of this command; nothing is recorded")
    # Each event may be small enough for the topic while a batch of them is too large.
    cause = "max.message.bytes of the topic is too small for it" if request.spoiled else request.last_failure
    failed = f"the command's transaction failed {request.failures} times ({cause})"
    if done:
        return UnavailableError(f"{failed}; {done} of its events are recorded")
    return NotAppendedError(f"{failed}; nothing is recorded")


class Deadlines:
    """Sets an error on futures that have no answer after `seconds`, or earlier if asked. For use on the event loop.

    Futures are answered roughly in the order in which they came, so answered ones are forgotten soon.
    """

    def __init__(self, seconds: float, late: Callable[[], Exception]) -> None:
        """`late` makes the error."""
        self._seconds = seconds
        self._late = late
        self._open: list[tuple[float, int, asyncio.Future[Any]]] = []
        """A heap: by the time of the event loop, then in the order in which they came."""
        self._came = count()
        self._timer: asyncio.Handle | None = None
        self._rings = math.inf
        """When the timer rings, by the event loop's clock (s); infinity without one."""

    @property
    def remembered(self) -> int:
        """How many futures are remembered, including answered ones."""
        return len(self._open)

    def unanswered(self) -> list[asyncio.Future[Any]]:
        """The futures without an answer."""
        return [answer for _, _, answer in self._open if not answer.done()]

    def watch(self, answer: asyncio.Future[Any], until: float = math.inf) -> None:
        """Expect an answer within `seconds` from now, and before `until` on the event loop's clock (s)."""
        loop, waiting = answer.get_loop(), self._open
        while waiting and waiting[0][2].done():
            heappop(waiting)
        until = min(until, loop.time() + self._seconds)
        heappush(waiting, (until, next(self._came), answer))
        if until < self._rings:
            self._ring(loop, until)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now, waiting = loop.time(), self._open
        while waiting and (waiting[0][2].done() or waiting[0][0] <= now):
            _, _, answer = heappop(waiting)
            if not answer.done():
                answer.set_exception(self._late())
        self._ring(loop, waiting[0][0] if waiting else math.inf)

    def _ring(self, loop: asyncio.AbstractEventLoop, at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = loop.call_at(at, self._expire, loop) if at < math.inf else None
        self._rings = at
