"""Uploads that span requests, as multipart uploads of a bucket: see `PartStore`.

Parts come through a gateway, or straight from clients to the store. In both cases they become one object, under a key
that belongs to the upload. Only a gateway can complete the upload. The object is then read back and hashed.

The address of a part is signed for one number of one multipart upload, and for the part's length and CRC-32. Some
stores accept headers that were not signed: with `x-amz-copy-source` the request would copy another object into the
part, with the rights of the key that signed it, and its answer would contain the MD5 of any range of that object. So
gateways try exactly that on a separate upload before they hand out an address, and again from time to time.
"""

from __future__ import annotations

import asyncio
import logging
import zlib
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from uuid import UUID, uuid4

from minio.error import S3Error
from urllib3 import BaseHTTPResponse

from artifact_store.errors import (
    ContentMismatchError,
    CorruptError,
    TooLargeError,
    UnavailableError,
    UploadNotFoundError,
)
from artifact_store.models import Declared
from services.blobs.intake import MIB, BodyHash, Cleanups, check_declared
from services.blobs.memory import ByteBudget, PartBuffer
from services.blobs.port import (
    ADDRESS_SECONDS,
    UPLOADS,
    BlobStore,
    Digests,
    DirectPart,
    Part,
    PartAddress,
    PartsKey,
    StoredBlob,
)
from services.blobs.resumable.object_parts import ObjectParts
from services.blobs.s3.multipart import (
    GONE,
    OK,
    PartsRefusedError,
    begin_upload,
    complete_upload,
    part_tag,
    put_part,
)
from services.blobs.s3.requests import ATTEMPTS, CHECKSUM_CRC32, S3Requests, StoreTroubleError, crc32_text, find_object

PROBE_KEY = "health/write-probe"
_AGAIN_SECONDS = 600.0
"""How long a successful check is valid."""

_PAUSE_SECONDS = 60.0
"""How long a failed check is valid."""

_CHECK_SECONDS = 5.0
_PAUSE_BETWEEN_READS = 0.2
_PROBE = b"ok"
_log = logging.getLogger(__name__)


class DirectAccess:
    """Addresses of parts at the store's public URL. Belongs to one event loop."""

    def __init__(self, requests: S3Requests, public: S3Requests) -> None:
        """`public` signs for the URL that clients use, perhaps with a separate key; `requests` are the gateway's."""
        self._requests = requests
        self._public = public
        self._checking = asyncio.Lock()
        self._usable = False
        self._checked_until = 0.0
        self._trouble: str | None = None

    async def usable(self) -> bool:
        """Whether clients may be sent to the store. Tests the store for at most 5 s, unless that was done recently."""
        clock = asyncio.get_running_loop().time
        async with self._checking:
            if clock() >= self._checked_until:
                trouble = await self._find_trouble()
                if trouble is not None and trouble != self._trouble:
                    _log.warning("large files come through the gateways, not straight to the store: %s", trouble)
                self._usable, self._trouble = trouble is None, trouble
                self._checked_until = clock() + (_AGAIN_SECONDS if self._usable else _PAUSE_SECONDS)
            return self._usable

    def address(self, key: str, upload_id: str, part: DirectPart) -> PartAddress:
        """The address of one part of a multipart upload to `key`."""
        headers = {"Content-Length": str(part.length), CHECKSUM_CRC32: crc32_text(part.crc32)}
        query = {"partNumber": str(part.number), "uploadId": upload_id}
        # By the store's clock, because the store decides whether the address has expired.
        url = self._public.presign(key, query, headers, ADDRESS_SECONDS, self._requests.clock.now())
        return PartAddress(url, headers)

    async def close(self) -> None:
        """Close the connections."""
        await self._public.close()

    async def _find_trouble(self) -> str | None:
        """Why clients cannot be sent to the store; None if they can."""
        try:
            async with asyncio.timeout(_CHECK_SECONDS):
                return await self._probe()
        except TimeoutError:
            return f"{self._public.endpoint.host} gave no answer within {_CHECK_SECONDS:g} s"
        except UnavailableError as error:
            return error.detail

    async def _probe(self) -> str | None:
        key = f"{UPLOADS}{uuid4()}"
        await self._requests.send("PUT", PROBE_KEY, OK, body=_PROBE, attempts=1)
        upload_id = await begin_upload(self._requests, key)
        try:
            address = self.address(key, upload_id, DirectPart(1, len(_PROBE), zlib.crc32(_PROBE)))
            found = await self._public.put_presigned(address.url, address.headers, _PROBE)
            if found.status != 200:
                return (
                    f"{self._public.endpoint.host} answered {found.status} {found.code} to a signed part: check "
                    "ARTIFACT_STORE_S3_PUBLIC_URL, its keys, and ARTIFACT_STORE_S3_REGION"
                )
            copying = {**address.headers, "x-amz-copy-source": f"/{self._requests.endpoint.bucket}/{PROBE_KEY}"}
            found = await self._public.put_presigned(address.url, copying, _PROBE)
            if found.status != 403:
                return (
                    f"{self._public.endpoint.host} would copy other objects for who holds the address of a part: set "
                    "ARTIFACT_STORE_S3_PUBLIC_ACCESS_KEY and its secret to a key that cannot read (s3-direct.json)"
                )
            return None
        finally:
            await self._requests.send("DELETE", key, GONE, query={"uploadId": upload_id})


_READERS = ThreadPoolExecutor(max_workers=4, thread_name_prefix="blob-read-back")
_READ_BYTES = 1 << 20
_TURN_BYTES = 64 << 20
_STALLED_SECONDS = 60.0


class _ReadBack:
    """Reads an object for its digests and CRC-32. Runs once.

    One thread reads and hashes: pieces that the event loop reads and hands to a thread took half as much processor
    time again.
    """

    def __init__(self, requests: S3Requests, key: str, length: int) -> None:
        self._requests = requests
        self._sdk = requests.endpoint.sdk()
        self._key = key
        self._length = length
        self._hash = BodyHash()
        self._read = 0
        self._left = False  # whether nobody waits for the thread any more
        self.crc32 = 0
        """Of the bytes so far."""

    async def run(self) -> Digests:
        """Read the first `length` bytes. A lost connection is replaced, and reading continues at the same offset.

        Raises CorruptError: there are fewer; UnavailableError.
        """
        loop = asyncio.get_running_loop()
        fruitless, moved_at = 0, loop.time()
        try:
            while self._read < self._length:
                before = self._read
                try:
                    await loop.run_in_executor(_READERS, self._read_on)
                except UnavailableError:
                    fruitless += 1
                    if self._read > before:
                        fruitless, moved_at = 0, loop.time()
                    if fruitless >= ATTEMPTS or loop.time() - moved_at > _STALLED_SECONDS:
                        raise
                    await asyncio.sleep(_PAUSE_BETWEEN_READS * fruitless)
        finally:
            self._left = True
        return self._hash.digests()

    def _read_on(self) -> None:
        """Read the next bytes, not all of them at a time: other objects wait for a thread. Blocks."""
        end = min(self._read + _TURN_BYTES, self._length)
        with self._requests.sdk_errors():
            answer = self._get(end)
            try:
                if answer.status != 206:
                    raise self._requests.unavailable(f"answered {answer.status} to a request for a range")
                for piece in answer.stream(_READ_BYTES, decode_content=False):
                    if self._left:
                        return
                    self._hash.update(piece)
                    self.crc32 = zlib.crc32(piece, self.crc32)
                    self._read += len(piece)
            finally:
                answer.close()  # first: a connection with unread bytes must not be used again
                answer.release_conn()
        if self._read != end:
            raise self._requests.unavailable("ends its answers early")

    def _get(self, end: int) -> BaseHTTPResponse:
        bucket, start = self._requests.endpoint.bucket, self._read
        try:
            return self._sdk.get_object(bucket, self._key, offset=start, length=end - start)
        except S3Error as error:
            if error.code in ("NoSuchKey", "InvalidRange"):
                raise CorruptError(f"blob {self._key} is missing, or has fewer than {end:,} bytes") from None
            raise


_BEFORE_UPLOAD_ID = "/"  # between the name and the id of the multipart upload
_SPARE = 5  # one number in this many is reserved, because interruptions waste numbers


class S3Parts:
    """See `PartStore`."""

    def __init__(
        self,
        blobs: BlobStore,
        requests: S3Requests,
        *,
        part_bytes: int,
        held_bytes: int,
        max_parts: int,
        memory: ByteBudget,
        direct: DirectAccess | None = None,
    ) -> None:
        """The bounds are those of `S3BlobStore`. With `direct` access, clients can send parts themselves."""
        self._blobs = blobs
        self._requests = requests
        self._part_bytes = part_bytes
        self._held_bytes = held_bytes
        self._max_parts = max_parts
        self._memory = memory
        self._direct = direct
        self._cleanups = Cleanups()
        self._small = ObjectParts(blobs, part_bytes=part_bytes, memory=memory)

    @property
    def memory(self) -> ByteBudget:
        """See the port."""
        return self._memory

    @property
    def longest(self) -> int:
        """See the port."""
        return self._planned * self._held_bytes

    @property
    def max_number(self) -> int:
        """See the port."""
        return self._max_parts

    def part_bytes(self, length: int) -> int:
        """See the port."""
        if length > self.longest:
            raise TooLargeError(f"an upload that can be resumed may have {self.longest:,} bytes here: send it by PUT")
        fitting = -(-length // self._planned)
        return min(self._held_bytes, max(self._part_bytes, -(-fitting // MIB) * MIB))

    async def begin(self, upload_id: UUID, length: int) -> str:
        """See the port. If cancelled, it still waits for the multipart upload's id and ends it: nobody else could."""
        if length <= self.part_bytes(length):
            return await self._small.begin(upload_id, length)
        name = uuid4()
        key = f"{UPLOADS}{name}"
        beginning = asyncio.ensure_future(begin_upload(self._requests, key))
        try:
            upload = await asyncio.shield(beginning)
        except asyncio.CancelledError:
            await self._cleanups.run(self._end(key, beginning))
            raise
        return f"{name}{_BEFORE_UPLOAD_ID}{upload}"

    async def _end(self, key: str, beginning: asyncio.Future[str]) -> None:
        await self._requests.send("DELETE", key, GONE, query={"uploadId": await beginning})

    async def put(self, where: PartsKey, number: int, part: PartBuffer) -> str:
        """See the port."""
        key, upload = _place(where)
        if key is None:
            return await self._small.put(where, number, part)
        async with self._upload(key, upload):
            return await put_part(self._requests, key, upload, number, part)

    async def takes_direct(self, where: PartsKey) -> bool:
        """See the port."""
        return self._direct is not None and _place(where)[0] is not None and await self._direct.usable()

    def addresses(self, where: PartsKey, parts: Sequence[DirectPart]) -> list[PartAddress]:
        """See the port."""
        key, upload = _place(where)
        if key is None or self._direct is None:
            raise ValueError("this upload takes no parts from clients")
        return [self._direct.address(key, upload, part) for part in parts]

    def sent(self, part: DirectPart, etag: str) -> Part:
        """See the port."""
        return Part(part.number, part_tag(part.crc32, etag))

    async def assemble(
        self, where: PartsKey, parts: Sequence[Part], *, declared: Declared, digests: Digests | None = None
    ) -> StoredBlob:
        """See the port."""
        key, upload = _place(where)
        if key is None:
            return await self._small.assemble(where, parts, declared=declared)
        if declared.size_bytes is None:
            raise ValueError("the length of an upload is known")
        length = declared.size_bytes
        listed = sorted((part.number, part.etag) for part in parts)
        async with self._upload(key, upload):
            await complete_upload(self._requests, key, upload, listed, length)
        if digests is None:
            reading = _ReadBack(self._requests, key, length)
            digests = await reading.run()
            check_declared(digests, declared)
            there = await find_object(self._requests, key)
            if there is not None and there.length != length:
                raise ContentMismatchError(f"the parts have {there.length:,} bytes, {length:,} were declared")
            if there is not None and there.crc32 not in (None, crc32_text(reading.crc32)):
                raise StoreTroubleError(str(self._requests.unavailable(f"gave other bytes of {key} than were put")))
        else:
            check_declared(digests, declared)
        return StoredBlob(self._blobs.backend_id, key, 0, digests.length, digests.blake3, digests.sha256)

    def blob_key(self, where: PartsKey) -> str | None:
        """See the port."""
        return _place(where)[0]

    async def discard(self, where: PartsKey, *, blob: bool) -> None:
        """See the port."""
        key, upload = _place(where)
        if key is None:
            await self._small.discard(where, blob=blob)
            return
        await self._requests.send("DELETE", key, GONE, query={"uploadId": upload})
        if blob:
            await self._requests.send("DELETE", key, GONE)

    @asynccontextmanager
    async def _upload(self, key: str, upload: str) -> AsyncIterator[None]:
        """Raises UploadNotFoundError if the block fails because the store has neither the upload nor its object, or
        because the store has different parts than were named: a client may have replaced one.

        Stores remove multipart uploads by themselves, even active ones: MinIO 24 hours after they were begun.
        """
        try:
            yield
        except PartsRefusedError:
            raise UploadNotFoundError("parts of this upload were replaced or removed: begin a new one") from None
        except StoreTroubleError:
            raise
        except UnavailableError:
            query = {"uploadId": upload, "max-parts": "1"}
            answer = await self._requests.send("GET", key, frozenset({200, 404}), query=query, attempts=1)
            if answer.code != "NoSuchUpload" or await find_object(self._requests, key, attempts=1) is not None:
                raise
            raise UploadNotFoundError("the blob store has removed what came of this upload: begin a new one") from None

    @property
    def _planned(self) -> int:
        return max(1, self._max_parts - self._max_parts // _SPARE)


def _place(where: PartsKey) -> tuple[str | None, str]:
    """Key and id of the multipart upload. The key is None if the parts are objects."""
    name, multipart, upload = where.token.partition(_BEFORE_UPLOAD_ID)
    return (f"{UPLOADS}{name}", upload) if multipart else (None, "")
