"""The S3 adapter of the blob port, for any store that speaks S3; MinIO is tested first.

A body that fits into one part is hashed, checked and sent to its content-addressed key in one request. A longer one is
sent in parts with bounded memory: to its content-addressed key if its BLAKE3 digest is declared, and otherwise to a
separate key under `uploads/`. It becomes an object only after its digests have been checked.
"""

from __future__ import annotations

import asyncio
import base64
import logging
import zlib
from collections.abc import AsyncIterable, AsyncIterator, Callable
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import TypeVar
from uuid import uuid4

from minio import Minio
from minio.commonconfig import CopySource

from artifact_store.errors import ConfigurationError, CorruptError, UnavailableError
from artifact_store.manifest import content_key
from artifact_store.models import Declared
from artifact_store.rules import parse_number
from services.blobs.intake import (
    LOOK_SECONDS,
    MAX_PARTS,
    MIB,
    PIECE_BYTES,
    READ_FIRST_BYTES,
    Cleanups,
    Intake,
    Mistrusted,
    Pace,
    PartPlan,
)
from services.blobs.memory import TURN_SECONDS, ByteBudget, PartBuffer, Share
from services.blobs.port import (
    DAMAGED,
    IDLE_SECONDS,
    PROVEN_SECONDS,
    UPLOADS,
    Digests,
    PartStore,
    StoredBlob,
    checked_key,
    checked_object_key,
    checked_removable_key,
)
from services.blobs.resumable.states import sweep_states
from services.blobs.s3.multipart import (
    RECORDS,
    MultipartUpload,
    UploadRecord,
    fill,
    remove_upload,
)
from services.blobs.s3.parts import PROBE_KEY, DirectAccess, S3Parts
from services.blobs.s3.requests import (
    ANSWER_SECONDS,
    ATTEMPTS,
    CHECKSUM_CRC32,
    CHECKSUM_SHA256,
    TELL_CHECKSUM,
    AccessRefusedError,
    Endpoint,
    S3Requests,
    StoreSilentError,
    StoreTroubleError,
    crc32_text,
    find_object,
    patience,
)
from services.runtime.clock import Clock, StoreClock, system_clock

_ASK_FIRST_BYTES = 256 * 1024  # from this size on, asking whether a blob exists costs less than sending it
_READ_PAUSE_SECONDS = 0.2
_LISTED_AT_ONCE = 1000
_COPY_SECONDS = 900.0  # a store answers once it has copied all of a large object
_OK = frozenset({200})
_log = logging.getLogger(__name__)
_T = TypeVar("_T")


class S3BlobStore:
    """Blobs as objects of one bucket. Belongs to one event loop."""

    def __init__(
        self,
        endpoint: Endpoint,
        *,
        part_bytes: int = 8 * MIB,
        held_bytes: int = 32 * MIB,
        max_parts: int = MAX_PARTS,
        memory: ByteBudget | None = None,
        connections: int = 256,
        attempts: int = ATTEMPTS,
        turn_seconds: float = TURN_SECONDS,
        look_seconds: float = LOOK_SECONDS,
        clock: Callable[[], datetime] | None = None,
        own_clock: Clock = system_clock,
        public: Endpoint | None = None,
    ) -> None:
        """Connects at the first request.

        Args:
            part_bytes: size of the first parts, and the maximum of a body that is sent in one request; at least 5 MiB.
            held_bytes: maximum number of bytes that one upload holds in memory.
            max_parts: maximum number of parts of one upload.
            memory: what all uploads together may hold; by default 96 MiB, and at least `held_bytes`.
            connections: maximum number of connections to the store.
            attempts: how often a request is tried before UnavailableError.
            turn_seconds: how long an upload waits for its first memory before PushBackError.
            look_seconds: how often slow uploads are looked for while others wait for memory.
            clock: the time that is written into records of uploads (aware); by default the store's.
            own_clock: this machine's clock, with which the store's is compared.
            public: where clients reach the store, and the key that signs for it, if clients send parts themselves.
        """
        self._part_bytes = part_bytes
        self._held_bytes = held_bytes
        self._max_parts = max_parts
        self._memory = memory or ByteBudget(max(96 * MIB, held_bytes))
        if self._memory.limit < held_bytes:
            raise ValueError("the memory of all uploads must be enough for one")
        self._requests = S3Requests(endpoint, connections=connections, attempts=attempts, own_clock=own_clock)
        self._attempts = attempts
        self._turn_seconds = turn_seconds
        self._look_seconds = look_seconds
        self._clock = clock or self._requests.clock.now
        self._cleanups = Cleanups()
        self._mistrusted = Mistrusted[str]()
        public_requests = None if public is None else S3Requests(public, own_clock=own_clock)
        self._direct = None if public_requests is None else DirectAccess(self._requests, public_requests)
        self._parts = S3Parts(
            self,
            self._requests,
            part_bytes=part_bytes,
            held_bytes=held_bytes,
            max_parts=max_parts,
            memory=self._memory,
            direct=self._direct,
        )

    @property
    def backend_id(self) -> str:
        """`s3`."""
        return "s3"

    @property
    def parts(self) -> PartStore:
        """See the port."""
        return self._parts

    async def store(self, body: AsyncIterable[bytes], *, declared: Declared, max_bytes: int) -> StoredBlob:
        """See the port."""
        if declared.size_bytes is not None and declared.size_bytes <= READ_FIRST_BYTES:
            return await self._store_small(Intake(body, declared=declared, max_bytes=max_bytes), declared.size_bytes)
        plan = PartPlan(self._part_bytes, self._held_bytes, declared.size_bytes, self._max_parts)
        pace = Pace(body, lambda: self._memory.contended, size=len, look_seconds=self._look_seconds)
        intake = Intake(pace, declared=declared, max_bytes=max_bytes)
        with self._memory.share() as share:
            if plan.relayed(1):
                return await self._store_parts(intake, None, declared, plan, share)
            await share.take_in_turn(plan.size(1), seconds=self._turn_seconds)
            async with pace:
                return await self._store_held(intake, declared, plan, share)

    async def store_bytes(self, data: bytes, digests: Digests) -> StoredBlob:
        """See the port."""
        key = content_key(digests.blake3)
        await self._put(key, data, digests)
        return self._stored(key, digests)

    async def read(self, key: str, offset: int, length: int) -> AsyncIterator[bytes]:
        """See the port. A lost connection is replaced, and reading continues at the same offset."""
        checked_key(key)
        end = offset + length
        if length == 0:
            self._demand(key, end, await self.size(key))
        fruitless = 0
        while offset < end:
            before = offset
            try:
                async with self._requests.get(key, offset, end - 1) as response:
                    # With 416, only some stores give the length in Content-Range.
                    partial = response.status == 206
                    total = _total(response.headers.get("Content-Range")) if partial else await self.size(key)
                    self._demand(key, end, total)
                    async for chunk in response.content.iter_chunked(PIECE_BYTES):
                        offset += len(chunk)
                        yield chunk
            except StoreSilentError:
                raise
            except StoreTroubleError as error:
                trouble = error
            else:
                trouble = StoreTroubleError(str(self._requests.unavailable("ends its answers early")))
            fruitless = fruitless + 1 if offset == before else 0
            if offset < end and fruitless >= self._attempts:
                raise trouble
            if fruitless:
                await asyncio.sleep(_READ_PAUSE_SECONDS * fruitless)

    async def size(self, key: str) -> int | None:
        """See the port."""
        found = await find_object(self._requests, checked_key(key))
        return None if found is None else found.length

    async def secure(self, key: str) -> None:
        """See the port. An object that a store shows is durable (AWS: "Amazon S3 data consistency model")."""

    def mistrust(self, key: str) -> None:
        """See the port."""
        self._mistrusted.add(key)

    async def set_aside(self, key: str) -> str | None:
        """See the port. S3 has no rename: the store copies the object, then deletes the original."""
        bucket, aside = self._requests.endpoint.bucket, f"{DAMAGED}{checked_key(key)}"
        found = await self._requests.send("HEAD", key, frozenset({200, 404}))
        if found.status == 404:
            return None
        etag = found.headers["ETag"]

        def copy(sdk: Minio) -> None:
            sdk.copy_object(bucket, aside, CopySource(bucket, key, match_etag=etag.strip('"')))

        await self._with_sdk(copy, seconds=_COPY_SECONDS)
        # Not every store heeds a condition on a deletion. An upload may repair the blob at this moment: a second check
        # limits the risk for it to the time of one request.
        again = await self._requests.send("HEAD", key, frozenset({200, 404}))
        if again.status == 200 and again.headers["ETag"] == etag:
            await self._requests.send("DELETE", key, frozenset({200, 204, 404, 412}), headers={"If-Match": etag})
        return aside

    async def fresh_uploads(self) -> frozenset[str]:
        """See the port. The record of such an upload has its name and outlives it by a day."""
        return frozenset(f"{UPLOADS}{key.removeprefix(RECORDS)}" for key in await self._with_sdk(self._keys(RECORDS)))

    async def remove_uploads(self, *, before: datetime, orphaned: Callable[[str], bool]) -> int:
        """See the port."""
        removed, last = 0, ""
        while listed := await self._with_sdk(partial(self._uploads_behind, last)):
            for key, stored_at in listed:
                if stored_at is not None and stored_at < before and orphaned(key):
                    await self._requests.send("DELETE", key, frozenset({200, 204, 404}))
                    removed += 1
            last = listed[-1][0]
        return removed

    async def put_object(self, key: str, data: bytes) -> None:
        """See the port."""
        buffer = PartBuffer(len(data))
        try:
            buffer.append(data)
            await self._requests.send("PUT", checked_object_key(key), _OK, body=buffer)
        finally:
            buffer.close()

    async def create_object(self, key: str, data: bytes) -> bool:
        """See the port. Needs a store that heeds `If-None-Match: *`."""
        checked_object_key(key)

        async def attempt() -> bool:
            headers = {"If-None-Match": "*"}
            expect = frozenset({200, 409, 412})
            answer = await self._requests.send("PUT", key, expect, headers=headers, body=data, attempts=1)
            # The existing one may come from an earlier attempt of this call whose answer was lost.
            if answer.status == 200 or (found := await self.get_object(key)) == data:
                return True
            if found is None:  # another writer is just creating it, or has just removed it
                raise StoreTroubleError(str(self._requests.unavailable("is busy with an object")))
            return False

        return await self._requests.retry(attempt)

    async def get_object(self, key: str) -> bytes | None:
        """See the port."""
        checked_object_key(key)

        async def attempt() -> bytes | None:
            answer = await self._requests.send("GET", key, frozenset({200, 404}), headers=TELL_CHECKSUM, attempts=1)
            if answer.status == 404:
                return None
            told = answer.headers.get(CHECKSUM_CRC32)
            if told is not None and told != crc32_text(zlib.crc32(answer.body)):
                raise StoreTroubleError(str(self._requests.unavailable(f"gave other bytes of {key} than it keeps")))
            return answer.body

        return await self._requests.retry(attempt)

    async def list_objects(self, prefix: str) -> list[str]:
        """See the port."""
        return sorted(await self._with_sdk(self._keys(checked_object_key(prefix))))

    async def delete_object(self, key: str) -> None:
        """See the port."""
        await self._requests.send("DELETE", checked_removable_key(key), frozenset({200, 204, 404}))

    async def migrate(self) -> None:
        """See the port."""
        bucket, region = self._requests.endpoint.bucket, self._requests.endpoint.region

        def create(sdk: Minio) -> None:
            if not sdk.bucket_exists(bucket):
                sdk.make_bucket(bucket, location=region)

        try:
            await self._with_sdk(create)
        except AccessRefusedError as error:
            raise ConfigurationError(str(error)) from None

    async def check(self) -> None:
        """See the port. Writes a small object `health/write-probe`, since a store that is full still answers reads."""
        if self._requests.wrote_within(PROVEN_SECONDS):
            await self._requests.send("HEAD", PROBE_KEY, frozenset({200, 404}), attempts=1, seconds=5.0)
        else:
            await self._requests.send("PUT", PROBE_KEY, _OK, body=b"ok", attempts=1, seconds=5.0)

    @property
    def clock(self) -> StoreClock:
        """See the port. Every answer of an S3 store has a `Date`."""
        return self._requests.clock

    async def now(self) -> datetime:
        """See the port."""
        # A store refuses a request that is signed by a clock far from its own, and says its time with the refusal.
        await self._requests.send("HEAD", PROBE_KEY, frozenset({200, 403, 404}), attempts=1, seconds=5.0)
        return self.clock.now()

    async def sweep(self, *, now: datetime, idle_seconds: float = IDLE_SECONDS) -> int:
        """See the port. An unreadable record is logged and left for people to look at."""
        swept, idle = 0, timedelta(seconds=idle_seconds)
        for record_key, written_at in await self._with_sdk(self._records):
            if written_at is not None and now - written_at < idle:  # spares one request for each upload of the last day
                continue
            answer = await self._requests.send("GET", record_key, frozenset({200, 404}))
            if answer.status == 404:  # removed meanwhile
                continue
            try:
                record = UploadRecord.decode(answer.body)
            except CorruptError as error:
                _log.error("%s: %s", record_key, error)
                continue
            if now - record.active_at >= idle:
                await remove_upload(self._requests, record_key, record)
                swept += not record.completed
        return swept + await sweep_states(self, now=now, idle_seconds=idle_seconds)

    async def close(self) -> None:
        """See the port."""
        await self._cleanups.drain()
        if self._direct is not None:
            await self._direct.close()
        await self._requests.close()

    async def _store_small(self, intake: Intake, size: int) -> StoredBlob:
        """Store a body that is read at once. It holds memory while it is sent, never while its client is slow."""
        data = await intake.take(size)
        if not await intake.at_end():
            await intake.take(1)  # raises if the body is longer than declared
        digests = await intake.digests()
        with self._memory.share() as share:
            await share.take_in_turn(max(1, size), seconds=self._turn_seconds)
            return await self.store_bytes(data, digests)

    async def _store_held(self, intake: Intake, declared: Declared, plan: PartPlan, share: Share) -> StoredBlob:
        """Store a body through memory; the share has room for its first part."""
        first = await fill(intake, plan.size(1))
        try:
            if not await intake.at_end():
                return await self._store_parts(intake, first, declared, plan, share)
            digests = await intake.digests()
            key = content_key(digests.blake3)
            await self._put(key, first, digests)
            return self._stored(key, digests)
        finally:
            first.close()

    async def _store_parts(
        self, intake: Intake, first: PartBuffer | None, declared: Declared, plan: PartPlan, share: Share
    ) -> StoredBlob:
        addressed = declared.blake3 is not None
        key = content_key(declared.blake3) if declared.blake3 is not None else f"{UPLOADS}{uuid4()}"
        anew = key in self._mistrusted
        if addressed and not anew and declared.size_bytes is not None:
            there = await find_object(self._requests, key)
            # An object without a checksum of the whole is stored again: nothing else shows cheaply what it holds.
            if there is not None and there.length == declared.size_bytes and there.crc32 is not None:
                return await self._store_known(intake, first, key)
        upload = MultipartUpload(self._requests, key, plan, share, self._clock)
        try:
            await upload.begin()
            await upload.send(intake, first)
            digests = await intake.digests()
            await upload.complete(digests.length)
            self._mistrusted.discard(key)
        except BaseException:
            await self._cleanups.run(self._abandon(upload, None if addressed else key))
            raise
        return self._stored(key, digests)

    async def _store_known(self, intake: Intake, first: PartBuffer | None, key: str) -> StoredBlob:
        """Take a body that seems to be stored already. It must match its declaration, and the object must have the
        same bytes."""
        crc32 = 0 if first is None else first.crc32
        while piece := await intake.take(PIECE_BYTES):
            crc32 = zlib.crc32(piece, crc32)
        stored = self._stored(key, await intake.digests())
        there = await find_object(self._requests, key)
        if there is None:
            raise UnavailableError(f"blob {key} was set aside as damaged while it was sent again: retry")
        if (there.length, there.crc32) != (stored.length, crc32_text(crc32)):
            self.mistrust(key)
            raise UnavailableError(f"blob {key} does not hold its own bytes: retry, so that they are replaced")
        return stored

    async def _abandon(self, upload: MultipartUpload, own_key: str | None) -> None:
        await upload.abandon()
        if own_key is not None:  # nobody else knows this key, and the completion may have succeeded
            await self._requests.send("DELETE", own_key, frozenset({200, 204, 404}))

    async def _put(self, key: str, data: bytes | PartBuffer, digests: Digests) -> None:
        sha256 = base64.b64encode(digests.sha256).decode()

        async def present() -> bool:
            there = await find_object(self._requests, key, attempts=1)
            return there is not None and (there.length, there.sha256) == (len(data), sha256)

        async def put(expect: frozenset[int], **condition: str) -> int:
            headers = {CHECKSUM_SHA256: sha256, **condition}
            return (await self._requests.send("PUT", key, expect, headers=headers, body=data, attempts=1)).status

        anew = key in self._mistrusted

        async def attempt() -> None:
            if not anew:
                if len(data) >= _ASK_FIRST_BYTES and await present():
                    return
                if await put(frozenset({200, 409, 412}), **{"If-None-Match": "*"}) == 200 or await present():
                    return
            # The existing object is unproven, or is just being removed; these bytes are verified.
            await put(_OK)

        await self._requests.retry(attempt, seconds=patience(len(data)))
        self._mistrusted.discard(key)

    def _stored(self, key: str, digests: Digests) -> StoredBlob:
        return StoredBlob(self.backend_id, key, 0, digests.length, digests.blake3, digests.sha256)

    def _demand(self, key: str, end: int, total: int | None) -> None:
        if total is None:
            raise CorruptError(f"blob {key} is missing")
        if total < end:
            raise CorruptError(f"blob {key} has {total} bytes, {end} are expected")

    def _keys(self, prefix: str) -> Callable[[Minio], list[str]]:
        def keys(sdk: Minio) -> list[str]:
            found = sdk.list_objects(self._requests.endpoint.bucket, prefix=prefix, recursive=True)
            return [item.object_name for item in found if item.object_name is not None]

        return keys

    def _records(self, sdk: Minio) -> list[tuple[str, datetime | None]]:
        """The keys of all records, and when each was last written. Blocks."""
        found = sdk.list_objects(self._requests.endpoint.bucket, prefix=RECORDS, recursive=True)
        return [(str(item.object_name), item.last_modified) for item in found]

    def _uploads_behind(self, last: str, sdk: Minio) -> list[tuple[str, datetime | None]]:
        """Some keys below `uploads/`, after `last`, and when each was stored. Blocks."""
        found = sdk.list_objects(self._requests.endpoint.bucket, prefix=UPLOADS, recursive=True, start_after=last)
        return [(str(item.object_name), item.last_modified) for item in islice(found, _LISTED_AT_ONCE)]

    async def _with_sdk(self, act: Callable[[Minio], _T], *, seconds: float = ANSWER_SECONDS) -> _T:
        with self._requests.sdk_errors():
            return await asyncio.to_thread(lambda: act(self._requests.endpoint.sdk(seconds)))


def _total(content_range: str | None) -> int:
    """Length of the whole from `bytes 0-9/100` (RFC 9110 §14.4)."""
    total = parse_number((content_range or "").rpartition("/")[2])
    if total is None:
        raise UnavailableError(f"the blob store names no length in Content-Range {(content_range or '')[:80]!r}")
    return total
