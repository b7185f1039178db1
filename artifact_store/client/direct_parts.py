"""Parts of a large file that go straight to the blob store, to addresses that the gateway has signed.

The gateway hears only which parts there are: so the bytes cross the client's line once, and no line of the gateway's.
A store that cannot be reached from here, or refuses, is no error: what it did not take goes through the gateway.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from itertools import takewhile

from artifact_store.client.bodies import BodySource, Sending
from artifact_store.client.transport import Transport, read_answer
from artifact_store.documents.resumable_uploads import (
    DirectPartAnswer,
    DirectPartsAnswer,
    DirectPartsRequest,
    SentPart,
    WantedPart,
)
from artifact_store.errors import UnavailableError

_BATCH_BYTES = 32 << 20
"""What is sent at a time, in parts that go side by side. As much again is read meanwhile."""


class HeldPart(BodySource):
    """A part in memory, with its CRC-32."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self.size_bytes: int = 0
        self.crc32 = 0

    def append(self, chunk: bytes) -> None:
        """Add bytes at its end."""
        self._chunks.append(chunk)
        self.size_bytes += len(chunk)
        self.crc32 = zlib.crc32(chunk, self.crc32)

    async def __aiter__(self) -> AsyncGenerator[bytes, None]:
        for chunk in self._chunks:
            yield chunk


class DirectParts:
    """The parts of one upload from an offset on. Belongs to one task."""

    def __init__(
        self, transport: Transport, path: str, source: BodySource, offset: int, part_bytes: int, patience: float
    ) -> None:
        """`path` is the upload's at the gateway, which may take `patience` seconds to read back all of `source`."""
        self._transport = transport
        self._path = f"{path}/parts"
        self._source = source
        self._part_bytes = part_bytes
        self._patience = patience
        self.offset = offset
        """How many bytes the gateway knows to be in the store."""

    async def send(self) -> None:
        """Send parts until the source ends or the store does not take one, and name those that it took.

        Raises what reading the source raises, and what the gateway answers: UploadOffsetError, UnavailableError, ….
        """
        last: list[SentPart] = []
        async with (
            self._transport.store_turn(),
            aclosing(aiter(self._source.behind(self.offset))) as chunks,
            aclosing(_parts(chunks, self._part_bytes)) as parts,
        ):
            batch = await self._read(parts)
            while batch:
                given = await self._name(last, batch)
                sending = [
                    asyncio.create_task(self._put(part, address))
                    for part, address in zip(batch, given, strict=False)  # there may be no addresses any more
                ]
                try:
                    following = await self._read(parts)
                    taken = await asyncio.gather(*sending)
                finally:
                    for task in sending:
                        task.cancel()
                    await asyncio.gather(*sending, return_exceptions=True)
                last = [found for found in takewhile(bool, taken) if found is not None]  # the next would leave a gap
                batch = following if len(last) == len(batch) else []
        if last:  # outside of the turn: when these are the last ones, the gateway reads all of them
            await self._name(last, [])

    async def _read(self, parts: AsyncIterator[HeldPart]) -> list[HeldPart]:
        """The next parts, none at the end."""
        found: list[HeldPart] = []
        while len(found) < max(1, _BATCH_BYTES // self._part_bytes) and (part := await anext(parts, None)) is not None:
            found.append(part)
        return found

    async def _name(self, sent: list[SentPart], wanted: Sequence[HeldPart]) -> list[DirectPartAnswer]:
        """Tell the gateway which parts were sent, and get addresses for others."""
        asked = DirectPartsRequest(
            offset=self.offset,
            sent=sent,
            wanted=[WantedPart(length=part.size_bytes, crc32=part.crc32) for part in wanted],
        )
        seconds = None if wanted else self._patience
        answer = await self._transport.attempt("POST", self._path, json=asked.model_dump(), answer_seconds=seconds)
        found = read_answer(DirectPartsAnswer, answer)
        self.offset = found.offset
        return found.parts

    async def _put(self, part: HeldPart, address: DirectPartAnswer) -> SentPart | None:
        """Send one part; None if the store did not take it."""
        sending = Sending(part, part.size_bytes, hashed=False)
        try:
            async with sending.attempt(self._transport.policy.idle_seconds):
                etag = await self._transport.put_to_store(address.url, address.headers, sending)
        except UnavailableError:
            return None
        if etag is None:
            return None
        return SentPart(number=address.number, length=part.size_bytes, crc32=part.crc32, etag=etag)


async def _parts(chunks: AsyncIterator[bytes], part_bytes: int) -> AsyncGenerator[HeldPart, None]:
    """The bytes in parts of this size, the last one of what is left."""
    part = HeldPart()
    async for chunk in chunks:
        rest = memoryview(chunk)
        while rest:
            piece, rest = rest[: part_bytes - part.size_bytes], rest[part_bytes - part.size_bytes :]
            part.append(bytes(piece))
            if part.size_bytes == part_bytes:
                yield part
                part = HeldPart()
    if part.size_bytes:
        yield part
