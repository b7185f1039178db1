"""What callers are told, and when: errors in place of acknowledgements, deadlines, and counts of both.

Every error says whether the log may hold the command all the same.
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from artifact_store.errors import (
    ConfigurationError,
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
"""How long everything is refused before it is looked whether somebody has mended what was wrong."""

HELD_SECONDS = 1.0
"""How long everything is refused before the guard is asked again, which costs nothing."""

Outcome = Acknowledgement | Exception | int | str
"""The answer to a request once its batch is appended. A string: a check passed, and the package is of this retention
class; an int: the offset where the log ends."""

_UNKNOWN = "the outcome is unknown"


@dataclass(slots=True)
class Counts:
    """Totals over all writers of a process; read and added to by any thread."""

    takeovers: Counter[str] = field(default_factory=Counter)
    """By what the state was restored from."""
    takeover_seconds: float = 0.0
    """Of all of them together."""
    failed_takeovers: int = 0
    """How often a lease or a take-over failed, so that a take-over followed."""
    pushed_back: int = 0
    """Requests that were told to come again later."""


def in_doubt(detail: str) -> UnavailableError:
    """The answer to a command that the log may hold or not."""
    if _UNKNOWN in detail:  # as the process says that it was forwarded to
        return UnavailableError(detail)
    return UnavailableError(f"{detail}; {_UNKNOWN}, retry with the same command id")


def lost(partition: int) -> LogLostError:
    """What everyone is told while the partition lacks what it had acknowledged."""
    return LogLostError(
        f"partition {partition} lost events that it had acknowledged, so nothing is appended to it until an operator "
        "restores the topic or accepts the loss; `artifact-store status` says which"
    )


def refused(error: Exception) -> tuple[Exception, float] | None:
    """What everyone is told, and for how long (s), when taking over again at once cannot help; None if it may."""
    if isinstance(error, LogIdentityError):
        return UnavailableError(error.detail), math.inf  # nothing is wrong with what was asked
    if isinstance(error, CorruptError):
        return error, math.inf
    if isinstance(error, HeldError):
        return error, REFUSE_SECONDS if error.own_clock else HELD_SECONDS
    if isinstance(error, ConfigurationError):
        return error, REFUSE_SECONDS  # somebody may mend it: a right that was taken away, a topic
    return None


def quarantined(cause: str) -> PackageQuarantinedError:
    """The answer to whatever would add to a package whose history is contradicted."""
    return PackageQuarantinedError(
        f"nothing is added to a package whose history the log contradicts ({cause}): publish it as another one"
    )


def told(request: Request, outcome: Outcome) -> Outcome:
    """What the caller hears: a command whose transaction failed may be in the log, unless it was decided since then."""
    if not request.failures or isinstance(request.asked, IngestCheck):
        return outcome
    if isinstance(outcome, PartitionNotOwnedError | PushBackError | CorruptError | ConfigurationError):
        return in_doubt(outcome.detail)
    return outcome


def given_up(request: Request, done: int) -> Exception:
    """The answer to a command that failed together with others and alone, and of which the log holds `done` events."""
    if request.spoiled and request.events == 1:
        return RejectedError("Kafka does not take an event of this command; nothing is recorded")
    # Each of several events may be small enough for the topic, but not what the client sends of them at once.
    cause = "max.message.bytes of the topic is too small for it" if request.spoiled else request.last_failure
    failed = f"the command's transaction failed {request.failures} times ({cause})"
    if done:
        return UnavailableError(f"{failed}; {done} of its events are recorded")
    return NotAppendedError(f"{failed}; nothing is recorded")


class Deadlines:
    """Futures of one partition, which get an error when `seconds` are over; for use on the event loop.

    They are answered about in the order in which they came, so that few are remembered beyond their answer.
    """

    def __init__(self, seconds: float, late: Callable[[], Exception]) -> None:
        """`late` makes the error."""
        self._seconds = seconds
        self._late = late
        self._open: deque[tuple[float, asyncio.Future[Any]]] = deque()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def remembered(self) -> int:
        """How many futures are held, answered ones included."""
        return len(self._open)

    def unanswered(self) -> list[asyncio.Future[Any]]:
        """Those that still wait."""
        return [answer for _, answer in self._open if not answer.done()]

    def watch(self, answer: asyncio.Future[Any]) -> None:
        """Give the future `seconds` from now."""
        loop, waiting = answer.get_loop(), self._open
        while waiting and waiting[0][1].done():
            waiting.popleft()
        waiting.append((loop.time() + self._seconds, answer))
        if self._timer is None:
            self._timer = loop.call_later(self._seconds, self._expire, loop)

    def _expire(self, loop: asyncio.AbstractEventLoop) -> None:
        now, waiting = loop.time(), self._open
        while waiting and (waiting[0][1].done() or waiting[0][0] <= now):
            _, answer = waiting.popleft()
            if not answer.done():
                answer.set_exception(self._late())
        self._timer = loop.call_at(waiting[0][0], self._expire, loop) if waiting else None
