"""Exports every event of a log, or of some of its packages, into an archive, and the bytes that the events name.

The archive holds each event of a package once. All other records are left out and counted: records that an operator has
confirmed not to be events, repeated events, and administrative records, which name offsets of their own log. Views and
subscribers skip all of them. Partitions are read one after another, up to the end of the log when the export began.
Blobs are read after all events, so that every blob that an event names exists.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

from blake3 import blake3

from artifact_store.archives.bundle import PACK_BYTES
from artifact_store.byte_streams import joined
from artifact_store.errors import CorruptError, PackageNotFoundError
from artifact_store.events import Event, FileIngested, PackageFinalized
from artifact_store.manifest import content_key, digest_of_key
from schemas.codec import EVENT_TYPES, fingerprint_of, schema_fingerprint, schema_text
from services.archive.archive_file import ArchivedRecord, ArchiveWriter, BlobPiece, Contents
from services.archive.chains import PackageChains, scanned
from services.blobs.port import BlobStore
from services.blobs.verified_reads import SoundReads
from services.log.port import Log
from services.log.records import BadRecord, Skips, is_administrative, read_record
from services.verify.notes import Claim, Notes

_READ_AT_ONCE = 8
"""How many blobs of at most PACK_BYTES are read at a time."""

_LET_OTHERS_RUN = 1_000


@dataclass(frozen=True, slots=True)
class Progress:
    """The current step, how much of it is done, and how much there is in all, if that is known."""

    doing: str
    done: int
    total: int | None = None


Tell = Callable[[Progress], None]


async def export_log(
    log: Log,
    path: Path,
    *,
    packages: Sequence[UUID] | None = None,
    blobs: BlobStore | None = None,
    progress: Tell = lambda _: None,
) -> Contents:
    """Write an archive of the log as it is now to the new file `path`; if `packages` are given, of these alone.

    With `blobs` the archive also holds the bytes that the events name. Memory is bounded: temporary files hold the
    rest. The file gets the name `path` only when all is written: an interrupted export starts again from the beginning.

    Raises:
        ConflictError: `path` exists. PackageNotFoundError: the log has no event of a package.
        BadRecordError: a record is not an event, and no operator has confirmed that.
        CorruptError: a package's events do not follow one another, or bytes that an event names are gone.
        UnavailableError; OSError: the file cannot be written.
    """
    end = await log.end()
    contents = Contents(
        log=end.log,
        partitions=await log.partitions(),
        end=dict(end.offsets),
        packages=packages,
        backend=None if blobs is None else blobs.backend_id,
    )
    schemas = {schema_fingerprint(event_type): schema_text(event_type) for event_type in EVENT_TYPES}
    with Notes() as notes, ArchiveWriter(path, contents, schemas) as archive:
        events = _Events(log, contents, notes, archive)
        await events.add(progress)
        if blobs is not None:
            await _add_blobs(notes, blobs, archive, contents, progress)
        return archive.finish()


class _Events:
    """The events of one export."""

    def __init__(self, log: Log, contents: Contents, notes: Notes, archive: ArchiveWriter) -> None:
        self._log = log
        self._contents = contents
        self._notes = notes
        self._archive = archive
        self._skips = Skips(log)
        self._chains = PackageChains(notes)
        self._types: dict[bytes, tuple[str, int]] = {}
        wanted = contents.packages
        self._keys = None if wanted is None else {str(package).encode(): package for package in wanted}
        self._left_out = {"skipped": 0, "repeated": 0, "administrative": 0}

    async def add(self, progress: Tell) -> None:
        """Add all of them. Raises as `export_log`."""
        contents, seen = self._contents, set[UUID]()
        total = None if self._keys is not None else sum(contents.end.values())
        for partition in self._wanted():
            async for record in scanned(self._log, {partition: contents.end[partition]}, headers=True):
                if self._keys is not None and record.key not in self._keys:
                    continue
                found = read_record(record, self._log.partition_of)
                event = await self._event(found)
                if event is None:
                    continue
                if not self._chains.follow(event, f"at offset {record.offset} of partition {partition}"):
                    self._left_out["repeated"] += 1
                    continue
                self._note(event, fingerprint_of(record.value))
                if self._keys is not None:
                    seen.add(event.package_id)
                self._archive.add(
                    ArchivedRecord(partition, record.offset, event.created_at, record.key, record.value, record.headers)
                )
                if contents.events % _LET_OTHERS_RUN == 0:
                    progress(Progress("events", contents.events, total))
                    await asyncio.sleep(0)
        if self._keys is not None and (missing := set(self._keys.values()) - seen):
            raise PackageNotFoundError(f"the log has no event of package {min(missing, key=str)}")
        contents.package_count = self._chains.packages
        contents.schemas = self._types
        contents.left_out = {} if self._keys is not None else self._left_out

    def _wanted(self) -> Sequence[int]:
        if self._keys is None:
            return sorted(self._contents.end)
        return sorted({self._log.partition_of(package) for package in self._keys.values()})

    async def _event(self, found: Event | BadRecord) -> Event | None:
        if isinstance(found, BadRecord):
            if not await self._skips.covers(found):
                raise found.error
            self._left_out["skipped"] += 1
            return None
        if is_administrative(found):
            self._left_out["administrative"] += 1
            return None
        return found

    def _note(self, event: Event, mark: bytes) -> None:
        _, count = self._types.get(mark, ("", 0))
        self._types[mark] = event.event_type, count + 1
        backend = self._contents.backend
        if backend is None:
            return
        match event.payload:
            case FileIngested() as file:
                if file.receipt.backend_id != backend:
                    raise CorruptError(
                        f"event {event.sequence} of package {event.package_id} names bytes in the storage backend "
                        f"{file.receipt.backend_id}, and ARTIFACT_STORE_BLOBS_URL names one of {backend}"
                    )
                self._notes.note_claim(Claim.of_file(event, file))
            case PackageFinalized(manifest_key=str(key)):
                digest, package, sequence = event.payload_digest, event.package_id, event.sequence
                self._notes.note_claim(Claim(key, 0, -1, digest, b"", True, package, sequence, ""))


async def _add_blobs(
    notes: Notes, blobs: BlobStore, archive: ArchiveWriter, contents: Contents, progress: Tell
) -> None:
    """Add the bytes that events name: all objects for a whole log, only the bytes of their files for some packages.

    Packages may share an object, and the archive of one package must not hold bytes of another.
    """
    total, _ = notes.totals()
    reads = _Reads(blobs, objects=contents.packages is None)
    ahead: deque[asyncio.Task[list[_Blob]]] = deque()
    keys = notes.claimed_keys()
    done = 0
    try:
        while True:
            while len(ahead) < _READ_AT_ONCE and (key := next(keys, None)) is not None:
                ahead.append(asyncio.create_task(reads.of_key(key, notes.claims(key))))
            if not ahead:
                return
            for blob in await ahead.popleft():
                await blob.add_to(archive)
            done += 1
            progress(Progress("blobs", done, total))
    finally:
        for task in ahead:
            task.cancel()
        await asyncio.gather(*ahead, return_exceptions=True)


@dataclass(frozen=True, slots=True)
class _Blob:
    """Bytes that are, or will be, read and proved."""

    digest: bytes
    length: int
    chunks: AsyncIterator[bytes]

    async def add_to(self, archive: ArchiveWriter) -> None:
        start = 0
        async for chunk in self.chunks:
            archive.add_piece(BlobPiece(self.digest, self.length, start, chunk))
            start += len(chunk)
        if not self.length:
            archive.add_piece(BlobPiece(self.digest, 0, 0, b""))


class _Reads:
    def __init__(self, blobs: BlobStore, *, objects: bool) -> None:
        self._blobs = blobs
        self._objects = objects
        self._sound = SoundReads(blobs)

    async def of_key(self, key: str, claims: Sequence[Claim]) -> list[_Blob]:
        """The blobs that events claim in the object of this key: the whole object, or otherwise the bytes of each
        file."""
        if self._objects and (found := await self._object(key)) is not None:
            return [found]
        return [await self._file(claim) for claim in _distinct(claims)]

    async def _object(self, key: str) -> _Blob | None:
        """A complete content-addressed object that fits into memory and is intact."""
        digest = digest_of_key(key)
        size = await self._blobs.size(key) if digest is not None else None
        if digest is None or size is None or size > PACK_BYTES:
            return None
        with suppress(CorruptError):
            data = await joined(self._blobs.read(key, 0, size))
            if (await asyncio.to_thread(blake3, data)).digest() == digest:
                return _Blob(digest, size, _once(data))
        return None

    async def _file(self, claim: Claim) -> _Blob:
        length = claim.length
        if length < 0:  # a manifest, whose length the event does not state
            length = await self._blobs.size(claim.key) or 0
        chunks = self._bytes(claim, length)
        if length <= PACK_BYTES:
            chunks = _once(await joined(chunks))
        return _Blob(claim.blake3, length, chunks)

    async def _bytes(self, claim: Claim, length: int) -> AsyncIterator[bytes]:
        places = [(claim.key, claim.start), (content_key(claim.blake3), 0)]
        try:
            async with aclosing(await self._sound.whole(places, claim.blake3, length)) as chunks:
                async for chunk in chunks:
                    yield chunk
        except CorruptError as error:
            raise CorruptError(
                f"{claim.place}: {claim.what} cannot be exported: {error.detail}. `artifact-store verify --bytes` "
                "names all such files; without --blobs the events can be exported"
            ) from None


def _distinct(claims: Sequence[Claim]) -> Iterator[Claim]:
    yield from {claim.blake3: claim for claim in claims}.values()


async def _once(data: bytes) -> AsyncIterator[bytes]:
    if data:
        yield data
