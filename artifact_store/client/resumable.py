"""Sending a large file in as many requests as needed, by tus 1.0: bytes that have arrived are never sent again.

The upload has the command id of its file. With that id, a client can continue the upload at any gateway. A later run of
an interrupted push does so, and needs to remember nothing else.

Parts may be sent straight to the blob store, to addresses that the gateway has signed. The gateway is only told which
parts were sent, so the bytes never pass through it. If the store cannot be reached from here, or refuses a part, that
is not an error: the remaining bytes are sent through the gateway.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
import zlib
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import takewhile
from uuid import UUID

from artifact_store.client.bodies import BodySource
from artifact_store.client.sending import Sending
from artifact_store.client.transport import Answer, Transport, read_answer, unavailable, with_retries
from artifact_store.documents import answers
from artifact_store.documents import resumable_uploads as names
from artifact_store.documents.resumable_uploads import (
    DirectPartAnswer,
    DirectPartsAnswer,
    DirectPartsRequest,
    SentPart,
    UploadAnswer,
    WantedPart,
    encode_metadata,
)
from artifact_store.errors import ArtifactStoreError, CorruptError, PushBackError, UnavailableError, UploadNotFoundError
from artifact_store.errors import UploadOffsetError as MovedError
from artifact_store.models import Acknowledgement
from artifact_store.rules import parse_number

_BEGINNINGS = 3
_READ_BACK_BYTES_PER_SECOND = 32 << 20
_log = logging.getLogger(__name__)
_TUS = {names.TUS_RESUMABLE: names.VERSION}


@dataclass(frozen=True, slots=True)
class _Where:
    path: str
    offset: int
    direct_part_bytes: int | None
    """The size of parts that may be sent straight to the blob store; None if they may not."""


async def send_resumably(
    transport: Transport,
    package_id: UUID,
    relative_path: str,
    media_type: str,
    source: BodySource,
    length: int,
    fields: Mapping[str, str],
) -> Acknowledgement:
    """Send the missing bytes until the file is in its package. `fields` are the headers of a single request.

    It continues while bytes arrive. Raises UnavailableError or PushBackError if none arrived for the policy's
    `total_seconds`; whatever reading the source raises; the error with which the gateway refuses the file.
    TooLargeError: the gateway does not accept uploads of this length in several requests.
    """
    said = encode_metadata({names.RELATIVE_PATH[0]: relative_path, names.MEDIA_TYPE[0]: media_type})
    headers = {**fields, **_TUS, names.UPLOAD_LENGTH: str(length), names.UPLOAD_METADATA: said}
    headers["Content-Length"] = "0"
    # A gateway may have to read the whole file again before it answers.
    patience = transport.policy.idle_seconds + length / _READ_BACK_BYTES_PER_SECOND
    for left in reversed(range(_BEGINNINGS)):
        try:
            where = await _begin(transport, package_id, headers, patience)
            return await _Upload(transport, where, source, length, patience).send()
        except UploadNotFoundError:  # it expired, or its bytes were refused: beginning again shows which
            if not left:
                raise
    raise AssertionError("the last beginning returns or raises")


async def _begin(transport: Transport, package_id: UUID, headers: Mapping[str, str], patience: float) -> _Where:
    async def begin() -> Answer:
        path = f"/v1/packages/{package_id}/uploads"
        return await transport.attempt("POST", path, headers=headers, answer_seconds=patience)

    answer = await with_retries(transport.policy, begin, notify=transport.notify, transfer=True)
    path, offset = answer.headers.get("Location", ""), parse_number(answer.headers.get(names.UPLOAD_OFFSET, ""))
    if not path.startswith("/") or offset is None:
        raise CorruptError("the gateway's answer does not name an upload: is this the URL of a gateway?")
    return _Where(path, offset, parse_number(answer.headers.get(names.UPLOAD_DIRECT, "")) or None)


class _Upload:
    """One upload. Belongs to one task."""

    def __init__(self, transport: Transport, where: _Where, source: BodySource, length: int, patience: float) -> None:
        self._transport = transport
        self._path = where.path
        self._offset = where.offset
        self._direct_part_bytes = where.direct_part_bytes
        self._source = source
        self._length = length
        self._patience = patience
        self._expect = True

    async def send(self) -> Acknowledgement:
        """Send the missing bytes until the file is in its package."""
        stalled_since: float | None = None
        pause = self._transport.policy.first_pause_seconds
        while True:
            try:
                if self._offset < self._length and self._direct_part_bytes is not None:
                    await self._add_directly(self._direct_part_bytes)
                if self._offset < self._length:
                    await self._add()
                return await self._outcome()
            except (UnavailableError, PushBackError, MovedError) as error:
                stood = self._offset
                now = time.monotonic()
                since = now if stalled_since is None else stalled_since
                wait = getattr(error, "retry_after", 0.0) + random.uniform(0, pause)
                if now + wait - since > self._transport.policy.total_seconds:
                    raise
                self._tell(error, wait)
                await asyncio.sleep(wait)
                await self._ask()
                moved = self._offset > stood
                stalled_since = None if moved else since
                pause = (
                    self._transport.policy.first_pause_seconds
                    if moved
                    else min(2 * pause, self._transport.policy.longest_pause_seconds)
                )

    async def _add_directly(self, part_bytes: int) -> None:
        """Send parts straight to the blob store for as long as the upload makes progress."""
        while self._offset < self._length and self._transport.may_use_store:
            stood = self._offset
            parts = DirectParts(self._transport, self._path, self._source, stood, part_bytes, self._patience)
            try:
                await parts.send()
            finally:
                self._offset = parts.offset
            if self._offset == stood:
                _log.info("the blob store does not accept parts from here: sending them through the gateway")
                self._transport.store_failed()

    async def _add(self) -> None:
        left = self._length - self._offset
        sending = Sending(self._source.behind(self._offset), left, self._patience, hashed=False)
        sending.expect = sending.expect and self._expect
        headers = {
            **_TUS,
            names.UPLOAD_OFFSET: str(self._offset),
            "Content-Type": names.CONTENT_TYPE,
            "Content-Length": str(left),
        }
        try:
            async with self._transport.turn(), sending.attempt(self._transport.policy.idle_seconds):
                await self._transport.attempt(
                    "PATCH",
                    self._path,
                    headers=headers,
                    data=sending,
                    expect100=sending.expect,
                    answer_seconds=self._patience,
                )
        except UnavailableError:
            if sending.failure is not None:
                raise sending.failure from None
            raise
        finally:
            self._expect = sending.expect
        self._offset = self._length

    async def _ask(self) -> None:
        """Ask for the upload's offset. If that fails now, the next round asks again."""
        try:
            self._offset = (await self._show()).offset
        except (UnavailableError, PushBackError) as error:
            self._tell(error, 0.0)

    async def _outcome(self) -> Acknowledgement:
        found = await self._show()
        if found.file is None:
            self._offset = found.offset
            raise unavailable(f"the upload of {found.relative_path!r} stands at {found.offset:,} bytes")
        return answers.ingested(found.file.model_dump_json().encode())

    async def _show(self) -> UploadAnswer:
        answer = await self._transport.attempt("GET", self._path, headers=_TUS, answer_seconds=self._patience)
        return read_answer(UploadAnswer, answer)

    def _tell(self, error: ArtifactStoreError, seconds: float) -> None:
        if self._transport.notify is not None:
            self._transport.notify(error, seconds)


_BATCH_BYTES = 32 << 20
"""How many bytes are sent at a time, in concurrent parts. The same amount is read meanwhile."""


class HeldPart(BodySource):
    """A part in memory, with its CRC-32."""

    def __init__(self) -> None:
        self._chunks: list[bytes] = []
        self.size_bytes: int = 0
        self.crc32 = 0

    def append(self, chunk: bytes) -> None:
        """Append bytes."""
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
        """`path` is the upload's path at the gateway, which may take `patience` seconds to read back all bytes."""
        self._transport = transport
        self._path = f"{path}/parts"
        self._source = source
        self._part_bytes = part_bytes
        self._patience = patience
        self.offset = offset
        """How many bytes in the store the gateway knows of."""

    async def send(self) -> None:
        """Send parts until the source ends or the store refuses one, and report the accepted ones to the gateway.

        Raises whatever reading the source raises, and the gateway's errors: UploadOffsetError, UnavailableError, ….
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
                    for part, address in zip(batch, given, strict=False)  # there may be fewer addresses
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
        if last:  # outside of the turn, because after the last parts the gateway reads everything back
            await self._name(last, [])

    async def _read(self, parts: AsyncIterator[HeldPart]) -> list[HeldPart]:
        """The next parts; empty at the end."""
        found: list[HeldPart] = []
        while len(found) < max(1, _BATCH_BYTES // self._part_bytes) and (part := await anext(parts, None)) is not None:
            found.append(part)
        return found

    async def _name(self, sent: list[SentPart], wanted: Sequence[HeldPart]) -> list[DirectPartAnswer]:
        """Report the sent parts to the gateway, and get addresses for others."""
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
        """Send one part. Returns None if the store did not accept it."""
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
    """Parts of this many bytes each; the last may be shorter."""
    part = HeldPart()
    async for chunk in chunks:
        rest = chunk
        while rest:
            room = part_bytes - part.size_bytes
            piece, rest = rest[:room], rest[room:]  # which copies nothing of a chunk that fits
            part.append(piece)
            if part.size_bytes == part_bytes:
                yield part
                part = HeldPart()
    if part.size_bytes:
        yield part
