"""Answers other than acknowledgements: the errors, and the deadlines after which a caller gets one.

Every error says whether the log may hold the command nevertheless. `Counts` are the totals that metrics show.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from typing import Any

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
from services.log.port import HeldError, NotAppendedError, PartitionNotOwnedError
from services.log.sequencer.queue import IngestCheck, Request

REFUSE_SECONDS = 10.0
"""After an error that an operator has to fix, refuse every request for this long, then take over again."""

HELD_SECONDS = 1.0
"""The same after `Driver.require` has refused, which costs nothing to ask again."""

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
    """How long all take-overs took together."""
    failed_takeovers: int = 0
    """Leases and take-overs that failed. Each is followed by another take-over."""
    pushed_back: int = 0
    """Requests that were answered with PushBackError."""
    appended: int = 0
    """Events that were appended."""
    transactions: int = 0
    """Transactions that appended them."""


def in_doubt(detail: str) -> UnavailableError:
    """The answer to a command when it is unknown whether the log holds it."""
    if _UNKNOWN in detail:  # the process that it was forwarded to says so already
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

    A PushBackError stays one where trying again may help: the cause may pass, or another process may have none. What
    only an operator can mend is a ConflictError.
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
        return RejectedError("Kafka does not take an event of this command; nothing is recorded")
    # Each event may be small enough for the topic while a batch of them is too large.
    cause = "max.message.bytes of the topic is too small for it" if request.spoiled else request.last_failure
    failed = f"the command's transaction failed {request.failures} times ({cause})"
    if done:
        return UnavailableError(f"{failed}; {done} of its events are recorded")
    return NotAppendedError(f"{failed}; nothing is recorded")


class Deadlines:
    """Sets an error on futures that have no answer after `seconds`, or earlier where asked. For use on the event loop.

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
