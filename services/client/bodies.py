"""One body on its way to a gateway: hashed, held to its length, and known to be repeatable or not."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterable, AsyncIterator
from contextlib import asynccontextmanager

from blake3 import blake3

from services.client.retries import no_answer
from services.client.sources import BodySource
from services.errors import ContentMismatchError


class Sending(AsyncIterable[bytes]):
    """The body of one ingest over all its attempts; each iteration is an attempt."""

    def __init__(self, body: AsyncIterable[bytes], size_bytes: int | None) -> None:
        self._body = body
        self._size = size_bytes
        self._limit: asyncio.Timeout | None = None
        self._idle_seconds = 0.0
        self.began = False
        """Whether a byte of it was read."""
        self.failure: Exception | None = None
        """What the body itself raised while it was read."""
        self.digest: bytes | None = None
        """BLAKE3 of the whole, once an attempt has sent it all."""

    @asynccontextmanager
    async def attempt(self, idle_seconds: float) -> AsyncIterator[None]:
        """An attempt, which raises UnavailableError when the other side takes no byte and gives no answer for so long.

        The HTTP library watches over answers only. Time that the body's own source takes does not count.
        """
        self._idle_seconds = idle_seconds
        try:
            async with asyncio.timeout(idle_seconds) as self._limit:
                yield
        except TimeoutError:
            raise no_answer(idle_seconds) from None
        finally:
            self._limit = None

    @property
    def repeatable(self) -> bool:
        """Whether the body can be sent from its beginning now."""
        return isinstance(self._body, BodySource) or not self.began

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.digest = None
        hashed = blake3()
        sent = 0
        try:
            self._allow(None)
            async for chunk in self._body:
                self.began = True
                if not chunk:
                    continue
                hashed.update(chunk)
                sent += len(chunk)
                self._check(sent, done=False)
                self._allow(self._idle_seconds)
                yield chunk
                self._allow(None)
            self.began = True
            self._check(sent, done=True)
        except Exception as error:
            # The HTTP library would report this as a lost connection, after which a retry makes no sense.
            self.failure = error
            raise
        self.digest = hashed.digest()
        self._allow(2 * self._idle_seconds)  # for what is still in the buffers, and for the answer

    def _allow(self, seconds: float | None) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def _check(self, sent: int, *, done: bool) -> None:
        if self._size is not None and (sent > self._size or (done and sent < self._size)):
            raise ContentMismatchError(f"the body has {'more' if sent > self._size else 'fewer'} bytes than declared")
