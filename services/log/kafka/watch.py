"""What is looked after while the log is read: that it is still the same one, and that something comes."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping
from uuid import UUID

from services.errors import LogIdentityError, UnavailableError

IDENTITY_SECONDS = 10.0
"""How often a reader looks whether the topic is still the same one; it also does when it has come to its end."""

PATIENCE_SECONDS = 30.0
"""How long reading up to an end may make no progress; leaders are found anew, and brokers start, in less."""


class Watch:
    """Of one pass over the log. `took` is for the thread that reads, `check` for the event loop, by turns."""

    def __init__(self, identity: UUID, ask: Callable[[], Awaitable[UUID]]) -> None:
        """`ask` says what the log's identity is now."""
        self._identity = identity
        self._ask = ask
        self._looked = time.monotonic()
        self._reached: Mapping[int, int] = {}
        self._still = 0.0

    def took(self, reached: Mapping[int, int], seconds: float) -> None:
        """Reading took so long and has come this far. Only for who reads to an end: elsewhere silence is no news."""
        self._still = self._still + seconds if reached == self._reached else 0.0
        self._reached = reached

    async def check(self, *, at_end: bool = False) -> None:
        """Call it after every read, before anything of it is passed on.

        Raises:
            LogIdentityError: the topic was made anew meanwhile: what was read may be of either.
            UnavailableError: nothing has come for PATIENCE_SECONDS, or nobody says which topic it is.
            ConfigurationError: the topic is gone.
        """
        stuck = self._still > PATIENCE_SECONDS
        if at_end or stuck or time.monotonic() > self._looked + IDENTITY_SECONDS:
            now = await self._ask()
            if now != self._identity:
                raise LogIdentityError(f"the topic was made anew while it was read: it was {self._identity}, is {now}")
            self._looked = time.monotonic()
        if stuck:
            raise UnavailableError(
                f"the log cannot be read to its end: no broker has sent anything for {PATIENCE_SECONDS:g} s"
            )
