"""Sending the body of a request. It is sent again after a lost connection if it can be read again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from contextlib import aclosing, asynccontextmanager
from types import AsyncGeneratorType
from uuid import UUID

from blake3 import blake3

from artifact_store.client.bodies import BodySource
from artifact_store.client.transport import Answer, GivenUpError, Transport, no_answer, with_retries
from artifact_store.errors import ContentMismatchError, UnavailableError

EXPECT_CONTINUE_BYTES = 1 << 20
"""Larger bodies, and those of unknown length, wait for `100 Continue`, so a refusal comes before the bytes go."""


class Sending(AsyncIterable[bytes]):
    """The body of one request over all its attempts. Each iteration is one attempt."""

    def __init__(
        self,
        body: AsyncIterable[bytes],
        size_bytes: int | None,
        answer_seconds: float | None = None,
        *,
        hashed: bool = True,
    ) -> None:
        """`answer_seconds` is how long the answer may take after everything is sent, if longer than usual.

        A body with a declared digest need not be `hashed` here, because the gateway refuses other bytes.
        """
        self._body = body
        self._hashed = hashed
        self.size_bytes = size_bytes
        self.expect = size_bytes is None or size_bytes > EXPECT_CONTINUE_BYTES
        """Whether to wait for `100 Continue`; false after it did not come in time."""
        self._answer_seconds = answer_seconds
        self._limit: asyncio.Timeout | None = None
        self._idle_seconds = 0.0
        self._reading = False
        self._empty = False
        self._pieces: AsyncGenerator[bytes, None] | None = None
        self.began = False
        """Whether reading has begun. A stream that was abandoned while it waited for bytes may be at its end."""
        self.failure: Exception | None = None
        """The exception that reading the body raised."""
        self.digest: bytes | None = None
        """BLAKE3 of the whole body after an attempt has sent everything; None if it is not hashed."""

    @asynccontextmanager
    async def attempt(self, idle_seconds: float) -> AsyncIterator[None]:
        """One attempt. Raises UnavailableError if the gateway accepts no byte and does not answer for `idle_seconds`.

        The HTTP library only limits the time for answers. Time spent on reading the body's source does not count.
        """
        self._idle_seconds = idle_seconds
        self._reading = False
        try:
            async with asyncio.timeout(idle_seconds) as self._limit:
                yield
        except TimeoutError:
            self.expect = self.expect and self._reading  # the other side may not know `100 Continue`
            raise no_answer(idle_seconds) from None
        finally:
            self._limit = None
            # If a task is waiting for a piece, its cancellation ends the generator.
            if isinstance(self._pieces, AsyncGeneratorType) and not self._pieces.ag_running:
                await self._pieces.aclose()

    @property
    def repeatable(self) -> bool:
        """Whether the body can be sent from its beginning."""
        return isinstance(self._body, BodySource) or not self.began or self._empty

    async def data(self) -> AsyncIterable[bytes] | bytes:
        """The data for the HTTP library: this object, or no bytes if the body has proved to be empty."""
        if self.size_bytes != 0:
            return self
        if not self._empty:
            async with aclosing(self._read()) as pieces:
                async for _ in pieces:
                    raise AssertionError("a byte of a body of length 0 is refused")
            self._empty = True
        return b""

    def __aiter__(self) -> AsyncIterator[bytes]:
        self._pieces = self._read()
        return self._pieces

    async def _read(self) -> AsyncGenerator[bytes, None]:
        """The body. Its last piece is held back until the body has ended without error, as the gateway then answers."""
        self.began = self._reading = True
        self.digest = None
        hashed = blake3()
        sent, held = 0, b""
        try:
            self._allow(None)
            async with _closing(self._body) as chunks:
                async for chunk in chunks:
                    if not chunk:
                        continue
                    if self._hashed:
                        hashed.update(chunk)
                    sent += len(chunk)
                    self._check(sent, done=False)
                    if held:
                        self._allow(self._idle_seconds)
                        yield held
                        self._allow(None)
                    held = chunk
            self._check(sent, done=True)
        except Exception as error:
            # The HTTP library would report a lost connection, which would be retried in vain.
            self.failure = error
            raise
        self.digest = hashed.digest() if self._hashed else None
        if held:
            self._allow(self._idle_seconds)
            yield held
        # Allow time for the bytes that are still in buffers, and for the answer.
        self._allow(self._idle_seconds + max(self._idle_seconds, self._answer_seconds or 0.0))

    def _allow(self, seconds: float | None) -> None:
        if self._limit is not None and not self._limit.expired():
            self._limit.reschedule(None if seconds is None else asyncio.get_running_loop().time() + seconds)

    def _check(self, sent: int, *, done: bool) -> None:
        if self.size_bytes is not None and (sent > self.size_bytes or (done and sent < self.size_bytes)):
            raise ContentMismatchError(
                f"the body has {'more' if sent > self.size_bytes else 'fewer'} bytes than declared"
            )


@asynccontextmanager
async def _closing(body: AsyncIterable[bytes]) -> AsyncIterator[AsyncIterator[bytes]]:
    """Read a body. An iterator that was opened only for this is closed afterwards."""
    if not isinstance(body, BodySource):
        yield aiter(body)
        return
    async with aclosing(aiter(body)) as chunks:
        yield chunks


async def send_body(
    transport: Transport,
    method: str,
    path: str,
    headers: Mapping[str, str],
    sending: Sending,
    *,
    what: str,
    command_id: UUID,
) -> Answer:
    """Send a body until there is an answer; send it again while it is repeatable. If not, `what` names what was lost.

    Raises whatever reading the body raises, and the error in the answer. UnavailableError: a body that cannot be read
    again was lost, and the outcome is unknown.
    """

    async def attempt() -> Answer:
        data = await sending.data()
        try:
            async with transport.turn(), sending.attempt(transport.policy.idle_seconds):
                return await transport.attempt(method, path, headers=headers, data=data, expect100=sending.expect)
        except UnavailableError as error:
            if sending.failure is not None:
                raise sending.failure from None
            if not sending.repeatable:
                raise GivenUpError(
                    f"{what}; the outcome is unknown: look for it, or send it again with command id {command_id}"
                ) from error
            raise

    return await with_retries(
        transport.policy, attempt, transfer=True, notify=transport.notify, repeatable=lambda: sending.repeatable
    )
