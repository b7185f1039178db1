"""Where the log ends, as far as a gateway has to know it for the positions in its answers to writes.

A writer knows the offset of its own partition alone. A reader that goes on after a write must begin in the other
partitions where they ended before the write, or earlier: what others did because of it came later.
"""

from __future__ import annotations

import asyncio
import math
import time
from contextlib import suppress

from artifact_store.errors import ArtifactStoreError
from artifact_store.position import Position
from services.log.port import Log

FRESH_SECONDS = 1.0
"""How old the known end may be: so much of other packages may be read again."""

PATIENCE_SECONDS = 0.2
"""How long writes wait for an answer of the log. They do not depend on it: partitions of others may be away."""


class KnownEnd:
    """Asks where the log ends, once a second at most, and only while there are writes. Belongs to one event loop."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._known: Position | None = None
        self._since = -math.inf
        """When the question was asked whose answer is known, on the monotonic clock (s)."""
        self._question: asyncio.Task[None] | None = None
        self._asked = -math.inf
        self._alone = False
        """Whether the log has one partition, so that writers know all."""

    async def before_write(self) -> Position | None:
        """An end of the log that is not later than now; None when it is not known, or need not be."""
        if self._alone:
            return None
        now = time.monotonic()
        idle = self._question is None or self._question.done()
        if idle and now > max(self._since, self._asked) + FRESH_SECONDS / 2:
            self._question = asyncio.create_task(self._ask(now), name="log-end")
            self._asked = now
        if self._question is not None and now > self._since + FRESH_SECONDS:
            await asyncio.wait([self._question], timeout=max(0.0, self._asked + PATIENCE_SECONDS - now))
        return self._known

    def after(self, written: Position | None, before: Position | None) -> Position | None:
        """The position after a write: `written` names its own partition alone, `before` is of `before_write`."""
        if written is None or self._alone:
            return written
        if before is None or before.log != written.log:
            return None
        ((partition, offset),) = written.offsets.items()
        known = self._known
        if known is not None and known.log == written.log and known.offsets.get(partition, 0) < offset:
            self._known = known.after(partition, offset - 1)
        return before.after(partition, offset - 1)

    async def _ask(self, now: float) -> None:
        with suppress(ArtifactStoreError):  # writes have their own errors
            self._alone = await self._log.partitions() == 1
            if not self._alone:
                self._known, self._since = await self._log.end(self._known), now

    async def close(self) -> None:
        """Stop asking; returns once that is done."""
        if self._question is not None:
            self._question.cancel()
            await asyncio.wait([self._question])
