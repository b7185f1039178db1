"""One body on its way to a gateway: hashed, held to its length, and known to be repeatable or not."""

from __future__ import annotations

from collections.abc import AsyncIterable, AsyncIterator

from blake3 import blake3

from services.client.sources import BodySource
from services.errors import ContentMismatchError


class Sending(AsyncIterable[bytes]):
    """The body of one ingest over all its attempts; each iteration is an attempt."""

    def __init__(self, body: AsyncIterable[bytes], size_bytes: int | None) -> None:
        self._body = body
        self._size = size_bytes
        self._began = False
        self.failure: Exception | None = None
        """What the body itself raised while it was read."""
        self.digest: bytes | None = None
        """BLAKE3 of the whole, once an attempt has sent it all."""

    @property
    def repeatable(self) -> bool:
        """Whether the body can be sent from its beginning now."""
        return isinstance(self._body, BodySource) or not self._began

    async def __aiter__(self) -> AsyncIterator[bytes]:
        self.digest = None
        hashed = blake3()
        sent = 0
        try:
            async for chunk in self._body:
                self._began = True
                if not chunk:
                    continue
                hashed.update(chunk)
                sent += len(chunk)
                self._check(sent, done=False)
                yield chunk
            self._began = True
            self._check(sent, done=True)
        except Exception as error:
            # The HTTP library would report this as a lost connection, after which a retry makes no sense.
            self.failure = error
            raise
        self.digest = hashed.digest()

    def _check(self, sent: int, *, done: bool) -> None:
        if self._size is not None and (sent > self._size or (done and sent < self._size)):
            raise ContentMismatchError(f"the body has {'more' if sent > self._size else 'fewer'} bytes than declared")
