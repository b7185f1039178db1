"""Downloads: a file's bytes, over as many connections as needed and checked as a whole, and a package's manifest."""

from __future__ import annotations

import re
from collections.abc import AsyncIterator, Mapping

import aiohttp
from blake3 import blake3

from artifact_store.client.transport import Transport, unavailable
from artifact_store.errors import CorruptError, UnavailableError
from artifact_store.rules import parse_number

_BARREN_CONNECTIONS = 5
"""Give up after this many connections in a row without a byte."""

MAX_MANIFEST_BYTES = 1 << 30
"""The longest manifest. A file takes at most 6 KB in its longer form, and a gateway allows 100,000 files by default."""

_CONTENT_RANGE = re.compile(r"bytes ([0-9]{1,19})-([0-9]{1,19})/(?:[0-9]{1,19}|\*)")


class ContentStream(AsyncIterator[bytes]):
    """The bytes of a file from `offset` on. After a lost connection it continues where that broke off.

    Iterating raises UnavailableError if the gateway stays down, CorruptError if it answers with another range.
    """

    def __init__(self, transport: Transport, path: str, offset: int, length: int | None) -> None:
        self._transport = transport
        self._path = path
        self._position = offset
        self._end = None if length is None else offset + length
        self._whole = offset == 0 and length is None
        self._response: aiohttp.ClientResponse | None = None
        self._barren = 0
        self.address: str | None = None
        """The content address of the whole file, from the gateway's `ETag`."""

    async def open(self) -> ContentStream:
        """Send the request, so that its errors appear here and not while iterating. Raises the error in the answer."""
        ranged = not (self._whole and self._position == 0)
        last = "" if self._end is None else str(self._end - 1)
        asked = {"Range": f"bytes={self._position}-{last}"} if ranged else {}
        response = await self._transport.open(self._path, headers=asked)
        try:
            self._learn(response, ranged=ranged)
        except CorruptError:
            response.close()
            raise
        self._response = response
        return self

    async def __anext__(self) -> bytes:
        while True:
            if self._end is not None and self._position >= self._end:
                self.close()
                raise StopAsyncIteration
            try:
                if self._response is None:
                    await self.open()
                chunk = await self._read()
            except UnavailableError:
                self.close()
                self._barren += 1
                if self._barren >= _BARREN_CONNECTIONS:
                    raise
                continue
            if not chunk:
                self.close()
                raise StopAsyncIteration
            self._barren = 0
            self._position += len(chunk)
            return chunk

    async def aclose(self) -> None:
        """Close the connection without reading the rest."""
        self.close()
        self._end = self._position

    def close(self) -> None:
        """Close the connection."""
        if self._response is not None:
            self._response.close()
            self._response = None

    def __del__(self) -> None:
        # A caller may drop an iterator without starting it, which must not keep its connection until the session ends.
        self.close()

    async def _read(self) -> bytes:
        if self._response is None:
            raise unavailable("the connection is closed")
        chunk = await self._transport.read_chunk(self._response)
        if not chunk and self._end is not None and self._position < self._end:
            raise unavailable("the gateway ended the answer before its end")
        return chunk

    def _learn(self, response: aiohttp.ClientResponse, *, ranged: bool) -> None:
        """Read the end and the address from the answer's headers. Raises CorruptError if it is another range."""
        tag = response.headers.get("ETag", "").removeprefix("W/").strip('"')
        self.address = tag if tag.startswith("blake3:") else self.address
        if not ranged:
            if (length := response.headers.get("Content-Length")) is not None:
                self._end = parse_number(length)
                if self._end is None:
                    raise CorruptError("the gateway's answer has a Content-Length that is not a number")
            return
        found = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
        if response.status != 206 or found is None or int(found[1]) != self._position:
            raise CorruptError("the gateway did not answer with the requested range")
        # A range that extends beyond the end is truncated (RFC 9110 §14.1.2).
        self._end = int(found[2]) + 1


async def receive_manifest(
    transport: Transport, path: str, query: Mapping[str, object], headers: Mapping[str, str]
) -> bytes:
    """Fetch a manifest, for as long as its bytes keep coming. After a lost connection it starts over.

    Raises the error in the answer, and CorruptError if the manifest is longer than MAX_MANIFEST_BYTES.
    """
    for left in reversed(range(_BARREN_CONNECTIONS)):
        response = await transport.open(path, query=query, headers=headers)
        try:
            found = bytearray()
            while chunk := await transport.read_chunk(response):
                found += chunk
                if len(found) > MAX_MANIFEST_BYTES:
                    raise CorruptError("the gateway sent more bytes than a manifest can have")
            return bytes(found)
        except UnavailableError:
            if not left:
                raise
        finally:
            response.close()
    raise AssertionError("the last connection returns or raises")


async def verified(chunks: AsyncIterator[bytes], digest: bytes, size_bytes: int | None = None) -> AsyncIterator[bytes]:
    """Pass on the chunks of a whole file, and check its BLAKE3 (32 raw bytes) and length at the end.

    Raises CorruptError, after the last chunk or as soon as there are too many bytes.
    """
    hashed = blake3()
    count = 0
    async for chunk in chunks:
        hashed.update(chunk)
        count += len(chunk)
        if size_bytes is not None and count > size_bytes:
            raise CorruptError(f"the file has more than the {size_bytes:,} bytes that it should have")
        yield chunk
    if size_bytes is not None and count != size_bytes:
        raise CorruptError(f"the file has {count:,} bytes, but should have {size_bytes:,}")
    if hashed.digest() != digest:
        raise CorruptError(f"the bytes that arrived are not those of blake3:{digest.hex()}")
