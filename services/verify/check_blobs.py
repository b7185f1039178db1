"""Checking the blob store: every blob that events name exists and, if bytes are read, has the acknowledged digests.

A damaged object is set aside, because an upload of the same bytes would find it under its key and store nothing. Before
that, the intact files in it (a damaged pack may hold many) are stored under their own content-addressed keys, where
readers look when a location fails.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterable, Callable, Sequence
from dataclasses import replace
from datetime import datetime
from itertools import groupby

from blake3 import blake3

from artifact_store.errors import ArtifactStoreError, CorruptError, UnavailableError
from artifact_store.manifest import content_key, digest_of_key
from artifact_store.models import Declared
from services.blobs.port import BlobStore
from services.blobs.resumable.states import UploadStates
from services.verify.notes import Claim, Notes
from services.verify.report import Report

_LOOKED_AT_ONCE = 16
_READ_AT_ONCE = 4


class BlobCheck:
    """One pass over every key that the log names. Its memory does not depend on the number of keys."""

    def __init__(
        self, blobs: BlobStore, notes: Notes, report: Report, *, check_bytes: bool, progress: Callable[[Report], None]
    ) -> None:
        self._blobs = blobs
        self._notes = notes
        self._report = report
        self._check_bytes = check_bytes
        self._progress = progress
        self._read_bytes = 0

    async def run(self) -> None:
        """Check every blob. Raises UnavailableError if the store as a whole cannot be used."""
        report = self._report
        report.expected_blobs, size = self._notes.totals()
        if self._check_bytes:
            report.bytes, report.expected_bytes = 0, size
        most = _READ_AT_ONCE if self._check_bytes else _LOOKED_AT_ONCE
        waiting: set[asyncio.Task[None]] = set()
        try:
            for key in self._notes.claimed_keys():
                waiting.add(asyncio.create_task(self._check(key)))
                if len(waiting) >= most:
                    waiting = await self._reap(waiting)
            while waiting:
                waiting = await self._reap(waiting)
        finally:
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)

    async def _reap(self, waiting: set[asyncio.Task[None]]) -> set[asyncio.Task[None]]:
        done, left = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
        self._progress(self._report)
        return left

    async def _check(self, key: str) -> None:
        claims = self._notes.claims(key)
        self._report.blobs += 1
        try:
            size = await self._blobs.size(key)
        except CorruptError as error:
            for claim in claims:
                self._report.add("blob-key", claim.place, error.detail)
            return
        except UnavailableError as error:
            await self._complain_unreadable(claims, error)
            return
        if size is None:
            await self._complain(claims, "blob-missing", "is missing")
        elif self._check_bytes:
            await self._check_content(key, size, claims)
        else:
            short = [claim for claim in claims if not _fits(claim, size)]
            await self._complain(short, "blob-damaged", f"has {size:,} bytes")

    async def _check_content(self, key: str, size: int, claims: Sequence[Claim]) -> None:
        try:
            found = await self._read(key, size, claims)
        except CorruptError as error:  # it was removed or truncated while it was read
            await self._complain(claims, "blob-damaged", f"changed while it was read: {error.detail}")
            return
        except UnavailableError as error:
            await self._complain_unreadable(claims, error)
            return
        address = digest_of_key(key)
        damaged = bool(found.broken) and not found.sound if address is None else found.digest != address
        if not damaged:
            await self._complain(found.broken, "blob-claim", "is whole and has other digests")
            return
        moved = await self._set_aside(key, claims, found.sound)
        if moved is None:
            return  # sound meanwhile
        await self._complain(found.broken, "blob-damaged", f"does not have the digests that were acknowledged; {moved}")
        if not found.broken:
            self._report.add("blob-damaged", claims[0].place, f"blob {key} is not what its key says; {moved}")

    async def _set_aside(self, key: str, claims: Sequence[Claim], sound: Sequence[Claim]) -> str | None:
        """Move the object away. Returns what became of it, as text; None if its bytes are right after all.

        They are right if an upload replaced the object meanwhile, or if they were read wrongly before. So the moved
        object is read once more, and everything intact in it is stored where readers look for it.
        """
        aside = None
        try:
            await self._keep(key, sound)
            aside = await self._blobs.set_aside(key)
            if aside is None:
                return "it went away meanwhile"
            size = await self._blobs.size(aside) or 0  # an upload may have put bytes of another length there
            again = await self._read(aside, size, claims)
            await self._keep(aside, [claim for claim in again.sound if claim not in sound])
            address = digest_of_key(key)
            if again.digest == address:
                whole = self._blobs.read(aside, 0, size)
                await self._blobs.store(whole, declared=Declared(size, address), max_bytes=size)
            if again.digest == address or (address is None and again.sound):
                return None
        except ArtifactStoreError as error:
            if aside is None:
                return f"it could not be set aside: {error.detail}"
            self._note(key, aside)
            return f"it was set aside as {aside}, and what is good in it could not be kept: {error.detail}"
        self._note(key, aside)
        return f"it was set aside as {aside}"

    def _note(self, key: str, aside: str) -> None:
        if len(self._report.set_aside) < self._report.kept:
            self._report.set_aside[key] = aside

    async def _keep(self, key: str, sound: Sequence[Claim]) -> None:
        """Store the intact files of an object under their own content-addressed keys."""
        for claim in sound:
            await self._lies_elsewhere(claim)  # sets a damaged copy aside: otherwise `store` would store nothing
            body = self._blobs.read(key, claim.start, claim.length)
            declared = Declared(claim.length, claim.blake3, claim.sha256 or None)
            await self._blobs.store(body, declared=declared, max_bytes=claim.length)

    async def _complain_unreadable(self, claims: Sequence[Claim], error: UnavailableError) -> None:
        await self._blobs.check()  # raises, and so ends the verification, if the cause is the store and not this object
        await self._complain(claims, "blob-damaged", f"cannot be read, and stays where it is: {error.detail}")

    async def _complain(self, broken: Sequence[Claim], kind: str, wrong: str) -> None:
        for claim in broken:
            if await self._lies_elsewhere(claim):
                self._report.healed += 1
            else:
                self._report.add(kind, claim.place, f"blob {claim.key}, {claim.what}, {wrong}")

    async def _lies_elsewhere(self, claim: Claim) -> bool:
        """Whether the bytes lie under their content-addressed key, where readers look next."""
        key = content_key(claim.blake3)
        there = replace(claim, key=key, start=0, whole=True)
        try:
            if key == claim.key or await self._blobs.size(key) != claim.length:
                return False
            if not self._check_bytes:
                return True
            found = await self._read(key, claim.length, [there])
        except CorruptError:
            return False
        except UnavailableError:
            await self._blobs.check()
            return False
        if found.digest != claim.blake3:
            return await self._set_aside(key, [there], []) is None
        return bool(found.sound)

    async def _read(self, key: str, size: int, claims: Sequence[Claim]) -> Rehash:
        found = Rehash(size, claims)
        await found.read(self._blobs.read(key, 0, size), self._count)
        return found

    def _count(self, length: int) -> None:
        self._report.bytes = (self._report.bytes or 0) + length
        self._progress(self._report)


def _fits(claim: Claim, size: int) -> bool:
    return size == claim.length if claim.whole else size >= claim.start + claim.length


_log = logging.getLogger(__name__)


async def keys_to_come(blobs: BlobStore) -> frozenset[str] | None:
    """The keys of uploads that an event may yet name; None if they cannot be determined. Raises UnavailableError.

    Call this before the log is read. The event of an upload that completes meanwhile may lie after the end up to which
    the log is read, and the object may look old (Amazon S3 dates an object to the start of its upload).
    """
    try:
        return await blobs.fresh_uploads() | await UploadStates(blobs).blob_keys()
    except CorruptError as error:  # an upload's state cannot be read, so its blob's key is unknown
        _log.error("orphans are not looked for: %s", error.detail)
        return None


async def find_orphans(
    blobs: BlobStore,
    notes: Notes,
    report: Report,
    *,
    before: datetime,
    spared: frozenset[str] | None,
    remove: bool,
) -> None:
    """Count the orphans that were stored before that time and, with `remove`, remove them. Raises UnavailableError.

    Does nothing if anything is wrong with the log: an unreadable event may name a blob, and so may the retry of an
    unfinished command. Also does nothing if `spared` is None: see `keys_to_come`.
    """
    if not report.clean or spared is None:
        return

    def orphaned(key: str) -> bool:
        if notes.is_claimed(key) or key in spared:
            return False
        report.orphans += 1
        return remove

    removed = await blobs.remove_uploads(before=before, orphaned=orphaned)
    report.removed = removed if remove else None


_INLINE_BYTES = 64 * 1024  # up to this size, hashing takes less time than handing the work to a thread


class Rehash:
    """Hashes an object of `size` bytes. `sound` are the claims that its bytes match, `broken` the others."""

    def __init__(self, size: int, claims: Sequence[Claim]) -> None:
        """`claims` must be sorted by start, then by length."""
        ordered = [
            (place, list(same)) for place, same in groupby(claims, key=lambda claim: (claim.start, claim.length))
        ]
        self._waiting = [_Range(start, length, same) for (start, length), same in ordered]
        self._waiting.reverse()
        self._reading: list[_Range] = []
        self._size = size
        self._at = 0
        self._whole = blake3()
        self.sound: list[Claim] = []
        self.broken: list[Claim] = []
        self.digest = b""
        """BLAKE3 of the whole object (32 raw bytes)."""

    async def read(self, chunks: AsyncIterable[bytes], count: Callable[[int], None]) -> None:
        """Read the object to its end. `count` is called with each chunk's length. Raises whatever `chunks` raises."""
        async for chunk in chunks:
            if len(chunk) <= _INLINE_BYTES:
                self._feed(chunk)
            else:
                await asyncio.to_thread(self._feed, chunk)
            count(len(chunk))
        for range_ in (*self._reading, *self._waiting):
            self._finish(range_)
        self.digest = self._whole.digest()

    def _feed(self, chunk: bytes) -> None:
        begin, end = self._at, self._at + len(chunk)
        view = memoryview(chunk)
        while self._waiting and self._waiting[-1].start < end:
            self._reading.append(self._waiting.pop())
        self._whole.update(view)
        for range_ in self._reading:
            range_.feed(view[max(range_.start - begin, 0) : max(range_.end - begin, 0)])
            if range_.end <= end:
                self._finish(range_)
        self._reading = [range_ for range_ in self._reading if range_.end > end]
        self._at = end

    def _finish(self, range_: _Range) -> None:
        for claim in range_.claims:
            whole = not claim.whole or self._size == claim.length
            (self.sound if whole and range_.bears_out(claim) else self.broken).append(claim)


class _Range:
    def __init__(self, start: int, length: int, claims: list[Claim]) -> None:
        self.start = start
        self.end = start + length
        self.claims = claims
        self._left = length
        self._blake3 = blake3()
        self._sha256 = hashlib.sha256()

    def feed(self, data: memoryview) -> None:
        self._left -= len(data)
        self._blake3.update(data)
        self._sha256.update(data)

    def bears_out(self, claim: Claim) -> bool:
        found = self._blake3.digest() == claim.blake3 and claim.sha256 in (b"", self._sha256.digest())
        return found and not self._left
