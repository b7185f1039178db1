"""When the client tries again: exponential pauses with jitter, `Retry-After` honoured, the whole bounded in time."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TypeVar

from tenacity import AsyncRetrying, RetryCallState, retry_if_exception
from tenacity.wait import wait_random_exponential

from services.errors import ArtifactStoreError, PushBackError, UnavailableError

Answer = TypeVar("Answer")

Notify = Callable[[ArtifactStoreError, float], None]
"""Told before each pause: why, and how many seconds it takes."""

_logger = logging.getLogger(__name__)


def log_retry(error: ArtifactStoreError, seconds: float) -> None:
    """Say in the log that another attempt follows."""
    _logger.warning("%s; trying again in %.1f s", error.detail, seconds)


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How long and how often to try, in seconds.

    `total_seconds` bounds a request and its retries together; for a transfer of file bytes, which may rightly take
    long, it bounds the time from its first failure. `idle_seconds` is how long an answer may keep still before the
    attempt counts as lost. Pauses grow from `first_pause_seconds` to `longest_pause_seconds`, each drawn at random
    below the bound that it has reached.
    """

    total_seconds: float = 60.0
    idle_seconds: float = 30.0
    connect_seconds: float = 10.0
    first_pause_seconds: float = 0.1
    longest_pause_seconds: float = 5.0


class GivenUpError(UnavailableError):
    """A failure after which another attempt could do harm or cannot help."""


async def with_retries(
    policy: RetryPolicy,
    attempt: Callable[[], Awaitable[Answer]],
    *,
    transfer: bool = False,
    notify: Notify | None = None,
    repeatable: Callable[[], bool] = lambda: True,
) -> Answer:
    """Call `attempt` until it answers, is refused for good or the policy's time is over; then raise its last error.

    Retried are UnavailableError and PushBackError, but not GivenUpError, for as long as it is `repeatable`.
    """
    budget = _Budget(policy.total_seconds, counts_from_start=not transfer)
    jitter = wait_random_exponential(multiplier=policy.first_pause_seconds, max=policy.longest_pause_seconds)

    def pause(state: RetryCallState) -> float:
        asked = getattr(_failure(state), "retry_after", 0.0)
        return float(asked) + jitter(state)

    def stop(state: RetryCallState) -> bool:
        return state.upcoming_sleep >= budget.left()

    def announce(state: RetryCallState) -> None:
        failure = _failure(state)
        if notify is not None and failure is not None:
            notify(failure, state.upcoming_sleep)

    def worth_a_retry(error: BaseException) -> bool:
        may_pass = isinstance(error, UnavailableError | PushBackError) and not isinstance(error, GivenUpError)
        return may_pass and repeatable()

    last: UnavailableError | None = None

    async def once() -> Answer:
        nonlocal last
        try:
            if transfer:
                return await attempt()
            async with asyncio.timeout(budget.left()):
                return await attempt()
        except UnavailableError as error:
            last = error
            raise
        except TimeoutError:
            # What went wrong before says more than that there was no time for one more attempt.
            raise last or no_answer(policy.total_seconds) from None
        finally:
            budget.attempted()

    retrying = AsyncRetrying(
        stop=stop, wait=pause, retry=retry_if_exception(worth_a_retry), before_sleep=announce, reraise=True
    )
    try:
        return await retrying(once)
    except PushBackError:
        if last is None:
            raise
        raise last from None  # an earlier attempt may have been carried out, which a refusal of this one denies


def no_answer(seconds: float) -> UnavailableError:
    """The error of an attempt that got no answer in time. Its outcome is unknown."""
    return unavailable(f"the gateway did not answer within {seconds:g} s; the outcome is unknown")


def unavailable(detail: str) -> UnavailableError:
    """An UnavailableError that asks for no pause of its own."""
    error = UnavailableError(detail)
    error.retry_after = 0.0
    return error


class _Budget:
    """Seconds that are left, from the start or from the end of the first attempt."""

    def __init__(self, seconds: float, *, counts_from_start: bool) -> None:
        self._seconds = seconds
        self._since = time.monotonic() if counts_from_start else None

    def attempted(self) -> None:
        if self._since is None:
            self._since = time.monotonic()

    def left(self) -> float:
        spent = 0.0 if self._since is None else time.monotonic() - self._since
        return max(0.0, self._seconds - spent)


def _failure(state: RetryCallState) -> ArtifactStoreError | None:
    failure = state.outcome.exception() if state.outcome is not None else None
    return failure if isinstance(failure, ArtifactStoreError) else None
