"""One multipart upload, from its beginning until it is completed or aborted.

While it runs, a small record object `multipart/<uuid>` names its key and upload id, because stores do not list
unfinished uploads reliably. The record is written before the first part and renewed while parts arrive, so that
`sweep` can tell a stalled upload from a long one. If a body has a key of its own, the sweep removes its record a day
after its completion: until then the record shows that an event may still name the key.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from uuid import uuid4
from xml.sax.saxutils import escape

from artifact_store.errors import CorruptError, UnavailableError
from services.blobs.intake import PIECE_BYTES, Intake, PartPlan
from services.blobs.memory import PartBuffer, Share
from services.blobs.port import UPLOADS
from services.blobs.s3.requests import (
    Relay,
    S3Requests,
    StoreTroubleError,
    crc32_text,
    find_object,
    parse_xml,
)

RECORDS = "multipart/"
RENEW_SECONDS = 3600.0  # far below the day after which an upload counts as idle
_COMPLETE_SECONDS = 120.0  # a store may have to put thousands of parts together
OK = frozenset({200})
GONE = frozenset({200, 204, 404})
_BETWEEN = " "  # CRC-32 and ETag in the tag of a part
_REFUSED_PARTS = {"InvalidPart", "InvalidPartOrder", "EntityTooSmall", "InvalidArgument", "MalformedXML"}
_log = logging.getLogger(__name__)


class PartsRefusedError(UnavailableError):
    """The store does not have the named parts: they were replaced, removed, or never sent."""


@dataclass(frozen=True, slots=True)
class UploadRecord:
    """The content of an upload's record object. `active_at` is the time of its last known progress or its
    completion."""

    key: str
    upload_id: str
    started_at: datetime
    active_at: datetime
    completed: bool = False

    def encode(self) -> bytes:
        """The record as JSON."""
        return json.dumps(
            {
                "key": self.key,
                "upload_id": self.upload_id,
                "started_at": self.started_at.isoformat(),
                "active_at": self.active_at.isoformat(),
                "completed": self.completed,
            }
        ).encode()

    @classmethod
    def decode(cls, text: bytes) -> UploadRecord:
        """Raises CorruptError if the text is not such a record."""
        try:
            fields = json.loads(text)
            started_at, active_at = (datetime.fromisoformat(fields[name]) for name in ("started_at", "active_at"))
            if started_at.tzinfo is None or active_at.tzinfo is None:
                raise ValueError("a time lacks its offset from UTC")
            completed = fields.get("completed") is True
            return cls(str(fields["key"]), str(fields["upload_id"]), started_at, active_at, completed)
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise CorruptError(f"not the record of an upload: {error}") from error


class MultipartUpload:
    """A multipart upload to `key`. `begin`, then `send`, then `complete`; after any failure `abandon`."""

    def __init__(
        self, requests: S3Requests, key: str, plan: PartPlan, share: Share, clock: Callable[[], datetime]
    ) -> None:
        self._requests = requests
        self._key = key
        self._plan = plan
        self._share = share
        self._clock = clock
        self._record_key = f"{RECORDS}{key.removeprefix(UPLOADS) if key.startswith(UPLOADS) else uuid4()}"
        self._record: UploadRecord | None = None
        self._opening: asyncio.Task[None] | None = None
        self._sending: set[asyncio.Task[None]] = set()
        self._tags: dict[int, str] = {}

    async def begin(self) -> None:
        """Start the upload and write its record. Raises UnavailableError."""
        self._opening = asyncio.create_task(self._open())
        await asyncio.shield(self._opening)  # interrupted in the middle, it would leave an upload whose id nobody knows

    async def send(self, intake: Intake, first: PartBuffer | None) -> None:
        """Send `first` (which the share already counts) as the first part, and all that follows in `intake`.

        Closes `first`, which is None where even the first part is relayed.

        Raises:
            UnavailableError, TooLargeError: a part cannot be stored.
            Whatever the body raises.
        """
        number = 0
        if first:
            number = 1
            self._start(number, first, self._share.held)
        while not await intake.at_end():
            number += 1
            size = self._plan.size(number)
            if self._plan.relayed(number):
                await self._settle()
                await self._relay(number, size, intake)
            else:
                await self._room(size)
                await self._share.take(size)
                self._start(number, await fill(intake, size), size)
            await self._renew()
        await self._settle()

    async def complete(self, length: int) -> None:
        """Complete the upload as an object of `length` bytes, replacing an existing one. Raises UnavailableError."""
        await complete_upload(self._requests, self._key, self._opened().upload_id, sorted(self._tags.items()), length)
        try:
            if self._key.startswith(UPLOADS):
                await self._write_record(completed=True)
            else:
                await self._remove()
        except UnavailableError as error:
            _log.warning("the record of a completed upload stays as it is until the sweep: %s", error)

    async def abandon(self) -> None:
        """Stop everything in progress and remove every trace. Raises UnavailableError: something may be left."""
        for task in self._sending:
            task.cancel()
        if self._opening is not None:
            await asyncio.gather(self._opening, *self._sending, return_exceptions=True)
        await self._remove()

    async def _open(self) -> None:
        upload_id = await begin_upload(self._requests, self._key)
        now = self._clock()
        self._record = UploadRecord(self._key, upload_id, now, now)
        await self._write_record()

    async def _renew(self) -> None:
        if (self._clock() - self._opened().active_at).total_seconds() >= RENEW_SECONDS:
            await self._write_record()

    async def _write_record(self, *, completed: bool = False) -> None:
        """Write the record as of now."""
        self._record = replace(self._opened(), active_at=self._clock(), completed=completed)
        await self._requests.send("PUT", self._record_key, OK, body=self._record.encode())

    async def _remove(self) -> None:
        if self._record is not None:
            await remove_upload(self._requests, self._record_key, self._record)

    def _start(self, number: int, part: PartBuffer, reserved: int) -> None:
        def sent(_: asyncio.Task[None]) -> None:
            part.close()
            self._share.give(reserved)

        task = asyncio.create_task(self._put(number, part))
        self._sending.add(task)
        # A callback, because a task that is cancelled before it begins would skip its `finally`.
        task.add_done_callback(sent)

    async def _put(self, number: int, body: PartBuffer | Relay) -> None:
        self._tags[number] = await put_part(self._requests, self._key, self._opened().upload_id, number, body)

    async def _relay(self, number: int, size: int, intake: Intake) -> None:
        failure: list[Exception] = []

        async def pieces() -> AsyncIterator[bytes]:
            left = size
            try:
                while left and (piece := await intake.take(left)):
                    left -= len(piece)
                    yield piece
                if left:
                    await intake.digests()  # shorter than declared: says so
            except Exception as error:  # kept, because the connection would wrap it in its own error
                failure.append(error)
                raise

        try:
            await self._put(number, Relay(pieces(), size, PIECE_BYTES))
        except StoreTroubleError:
            if failure:
                raise failure[0] from None
            raise

    async def _room(self, size: int) -> None:
        while self._sending and self._share.held + size > self._plan.held_bytes:
            await self._reap()

    async def _settle(self) -> None:
        while self._sending:
            await self._reap()

    async def _reap(self) -> None:
        done, _ = await asyncio.wait(self._sending, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()  # a failed one stays in the set, and `abandon` handles it
            self._sending.discard(task)

    def _opened(self) -> UploadRecord:
        if self._record is None:
            raise RuntimeError("the upload has not begun")
        return self._record


async def fill(intake: Intake, size: int) -> PartBuffer:
    """The next `size` bytes of a body, fewer at its end, in a buffer that the caller closes."""
    part = PartBuffer(size)
    try:
        while len(part) < size and (piece := await intake.take(size - len(part))):
            part.append(piece)
    except BaseException:
        part.close()
        raise
    return part


async def begin_upload(requests: S3Requests, key: str) -> str:
    """Begin a multipart upload and return its id. Raises UnavailableError.

    The store is asked to check the CRC-32 of each part, and to keep the CRC-32 of the whole.
    """
    wanted = {"x-amz-checksum-algorithm": "CRC32", "x-amz-checksum-type": "FULL_OBJECT"}
    answer = await requests.send("POST", key, OK, query={"uploads": ""}, headers=wanted)
    root = parse_xml(answer.body)
    upload_id = root.findtext("UploadId") if root is not None else None
    if not upload_id:
        raise requests.unavailable("began an upload without naming it")
    return upload_id


async def put_part(requests: S3Requests, key: str, upload_id: str, number: int, body: PartBuffer | Relay) -> str:
    """Store a part and return its tag: CRC-32 and ETag, for `complete_upload`. Raises UnavailableError."""
    query = {"uploadId": upload_id, "partNumber": str(number)}
    answer = await requests.send("PUT", key, OK, query=query, body=body)
    return part_tag(body.crc32, answer.headers.get("ETag", ""))


def part_tag(crc32: int, etag: str) -> str:
    """A part's CRC-32 and the ETag that the store gave it, as `complete_upload` takes them."""
    return f"{crc32_text(crc32)}{_BETWEEN}{etag}"


async def complete_upload(
    requests: S3Requests, key: str, upload_id: str, parts: Iterable[tuple[int, str]], length: int
) -> None:
    """Join parts (number and tag, by number) into an object of `length` bytes, replacing an existing one.

    Returns if the object is there, whoever completed the upload. Raises UnavailableError, PartsRefusedError.
    """
    tags = [(number, *_parted(tag)) for number, tag in parts]
    body = f"<CompleteMultipartUpload>{''.join(_listed(*tag) for tag in tags)}</CompleteMultipartUpload>".encode()

    async def finish() -> None:
        answer = await requests.send(
            "POST",
            key,
            frozenset({200, 400, 404}),
            query={"uploadId": upload_id},
            body=body,
            attempts=1,
            seconds=_COMPLETE_SECONDS,
        )
        if answer.code in _REFUSED_PARTS:
            raise PartsRefusedError(str(requests.unavailable(f"has not the parts of an upload ({answer.code})")))
        root = parse_xml(answer.body)
        if answer.status != 404 and (root is None or root.tag == "Error"):
            # The status is sent before the outcome is known (S3 API, CompleteMultipartUpload).
            raise StoreTroubleError(
                str(requests.unavailable(f"failed to complete an upload ({answer.code or 'no reason given'})"))
            )
        if answer.status == 404:  # it may be completed, by a request whose answer was lost
            there = await find_object(requests, key, attempts=1)
            ours = there is not None and (key.startswith(UPLOADS) or there.etag == _whole_etag(tags))
            if there is None or not ours or there.length != length:
                raise requests.unavailable(f"lost an upload ({answer.code}) before its completion")

    await requests.retry(finish, seconds=_COMPLETE_SECONDS)


def _parted(tag: str) -> tuple[str, str]:
    """CRC-32 and ETag from a part's tag. The CRC-32 is missing if an older release stored the part."""
    crc32, between, etag = tag.partition(_BETWEEN)
    return (crc32, etag) if between else ("", tag)


def _listed(number: int, crc32: str, etag: str) -> str:
    checksum = f"<ChecksumCRC32>{crc32}</ChecksumCRC32>" if crc32 else ""
    return f"<Part><PartNumber>{number}</PartNumber><ETag>{escape(etag)}</ETag>{checksum}</Part>"


def _whole_etag(tags: Sequence[tuple[int, str, str]]) -> str | None:
    """The ETag of the whole if the parts' ETags are their MD5, as in stores that do not encrypt."""
    try:
        digests = b"".join(bytes.fromhex(etag.strip('"')) for _, _, etag in tags)
    except ValueError:
        return None
    return f'"{hashlib.md5(digests, usedforsecurity=False).hexdigest()}-{len(tags)}"'


async def remove_upload(requests: S3Requests, record_key: str, record: UploadRecord) -> None:
    """Abort an upload, then remove its record. An upload that is already completed or aborted stays so."""
    await requests.send("DELETE", record.key, GONE, query={"uploadId": record.upload_id})
    await requests.send("DELETE", record_key, GONE)
