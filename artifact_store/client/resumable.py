"""A large file sent in as many requests as it takes, by tus 1.0: bytes that have arrived are never sent again.

The upload has the command id of its file. Whoever knows that id finds the upload where it stands, at any gateway: so
does a later run of an interrupted push, which needs to remember nothing else.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass
from uuid import UUID

from artifact_store.client.bodies import BodySource, Sending
from artifact_store.client.direct_parts import DirectParts
from artifact_store.client.transport import Answer, Transport, read_answer, unavailable, with_retries
from artifact_store.documents import resumable_uploads as names
from artifact_store.documents.resumable_uploads import UploadAnswer, encode_metadata
from artifact_store.documents.shapes import FileIngestedAnswer
from artifact_store.errors import ArtifactStoreError, CorruptError, PushBackError, UnavailableError, UploadNotFoundError
from artifact_store.errors import UploadOffsetError as MovedError
from artifact_store.rules import parse_number

RESUMABLE_BYTES = 64 << 20
"""Files from this length on are sent in this way, if they can be read from any offset."""

_BEGINNINGS = 3
_READ_BACK_BYTES_PER_SECOND = 32 << 20
_log = logging.getLogger(__name__)
_TUS = {names.TUS_RESUMABLE: names.VERSION}


@dataclass(frozen=True, slots=True)
class _Where:
    path: str
    offset: int
    direct_part_bytes: int | None
    """How large parts are that may go straight to the blob store; None if they may not."""


async def send_resumably(
    transport: Transport,
    package_id: UUID,
    relative_path: str,
    media_type: str,
    source: BodySource,
    length: int,
    fields: Mapping[str, str],
) -> FileIngestedAnswer:
    """Send the missing bytes until the file is in its package. `fields` are the headers of a single request.

    It continues while bytes arrive. Raises UnavailableError or PushBackError once none did for the policy's
    `total_seconds`; what reading the source raises; what the gateway refuses the file for. TooLargeError: the gateway
    takes no upload of this length in several requests.
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
        except UploadNotFoundError:  # it expired or its bytes were refused; beginning again shows which
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

    async def send(self) -> FileIngestedAnswer:
        """Add what is missing until the file is there."""
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
        """Send parts straight to the blob store as long as that moves the upload on."""
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
        """Ask how far the upload is. If that fails now, the next round asks again."""
        try:
            self._offset = (await self._show()).offset
        except (UnavailableError, PushBackError) as error:
            self._tell(error, 0.0)

    async def _outcome(self) -> FileIngestedAnswer:
        found = await self._show()
        if found.file is None:
            self._offset = found.offset
            raise unavailable(f"the upload of {found.relative_path!r} stands at {found.offset:,} bytes")
        return found.file

    async def _show(self) -> UploadAnswer:
        answer = await self._transport.attempt("GET", self._path, headers=_TUS, answer_seconds=self._patience)
        return read_answer(UploadAnswer, answer)

    def _tell(self, error: ArtifactStoreError, seconds: float) -> None:
        if self._transport.notify is not None:
            self._transport.notify(error, seconds)
