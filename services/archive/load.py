"""Imports: proves an archive, fills an empty log with it, and translates positions of the old log to the new one.

The records of an archive have one order, by their events' times, whatever partitions they were in. Each goes to the
partition of its package in the new log. So the archive alone determines the content of each partition: an interrupted
import continues after the existing records, and a log with any other content is refused.
"""

from __future__ import annotations

import asyncio
import heapq
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass
from operator import attrgetter
from uuid import UUID

from blake3 import blake3

from artifact_store.byte_streams import from_any
from artifact_store.errors import ConfigurationError, CorruptError
from artifact_store.events import Event
from artifact_store.models import Declared
from artifact_store.position import Position
from schemas.codec import EVENT_TYPES, UndecodableEventError, decode, fingerprint_of, schema_fingerprint
from schemas.digests import record_digest
from services.archive.archive_file import Archive, ArchivedRecord, BlobPiece
from services.archive.chains import (
    Follower,
    PackageChains,
    PartitionChain,
    by_content,
    came_again,
    partition_chains,
    scanned,
)
from services.archive.export import Progress, Tell
from services.blobs.port import BlobStore
from services.log.port import Log, LogFiller, Record
from services.log.records import is_administrative, read_record
from services.verify.notes import Notes

BATCH_RECORDS = 1_000
"""Maximum number of records in a transaction."""

_HELD_RECORDS = 6_000
_HELD_BYTES = 16 << 20
"""When this many bytes wait for all partitions together, all of them are appended."""

_BLOBS_AT_ONCE = 8
_LET_OTHERS_RUN = 1_000


@dataclass(frozen=True, slots=True)
class Loaded:
    """The result of an import. `resumed` is how many events existed before; `end` is where the new log ends."""

    log: UUID
    partitions: int
    events: int
    resumed: int
    blobs: int
    end: Position


async def check_archive(archive: Archive, progress: Tell = lambda _: None) -> None:
    """Prove every byte of the archive, every event in it and the chain of every package. Changes nothing.

    Raises CorruptError, which says what is wrong and where.
    """
    contents = archive.contents
    known = {schema_fingerprint(event_type) for event_type in EVENT_TYPES}
    for mark, (event_type, count) in contents.schemas.items():
        if mark not in known:
            raise CorruptError(
                f"{archive.path} holds {count:,} events of {event_type} by the schema {mark.hex()}, which this release "
                "does not know: use a newer release"
            )
    with Notes() as notes:
        check = _Check(archive, PackageChains(notes))
        for block in archive.prove():
            for item in block:
                check.take(item)
            progress(Progress("checking", check.events, contents.events))
            await asyncio.sleep(0)
        check.finish()


class _Check:
    """Compares the content of an archive's blocks with its footer."""

    def __init__(self, archive: Archive, chains: PackageChains) -> None:
        self._path = archive.path
        self._contents = archive.contents
        self._chains = chains
        self._types: dict[bytes, tuple[str, int]] = {}
        self._wanted = None if archive.contents.packages is None else frozenset(archive.contents.packages)
        self._last = (-1, -1)
        self._blob: tuple[bytes, int, int] | None = None
        """Of the blob that is being read: digest, length, and how many bytes were read."""
        self._hash = blake3()
        self._blobs = self._blob_bytes = 0
        self.events = 0

    def take(self, item: ArchivedRecord | BlobPiece) -> None:
        if isinstance(item, ArchivedRecord):
            self._take_record(item)
        else:
            self._take_piece(item)

    def _take_record(self, record: ArchivedRecord) -> None:
        where = f"at offset {record.offset} of partition {record.partition} in {self._path}"
        try:
            event = decode(record.value)
        except UndecodableEventError as error:
            raise CorruptError(f"the record {where} is no event: {error}") from None
        place = record.partition, record.offset
        if place <= self._last or record.partition >= self._contents.partitions or self._blobs:
            raise CorruptError(f"the record {where} is out of order")
        if record.key != str(event.package_id).encode() or is_administrative(event):
            raise CorruptError(f"the record {where} is not an event of the package that its key names")
        if record.time != event.created_at:
            raise CorruptError(f"the record {where} has another time than its event")
        if self._wanted is not None and event.package_id not in self._wanted:
            raise CorruptError(f"the record {where} is of a package that was not to be exported")
        if not self._chains.follow(event, where):
            raise CorruptError(f"the event {where} is repeated")
        self._last = place
        mark = fingerprint_of(record.value)
        _, count = self._types.get(mark, ("", 0))
        self._types[mark] = event.event_type, count + 1
        self.events += 1

    def _take_piece(self, piece: BlobPiece) -> None:
        if piece.start == 0 and self._blob is None:
            self._blob, self._hash = (piece.digest, piece.length, 0), blake3()
        if self._blob != (piece.digest, piece.length, piece.start):
            raise CorruptError(f"a piece of blob {piece.digest.hex()} in {self._path} is out of order")
        self._hash.update(piece.data)
        done = piece.start + len(piece.data)
        if done < piece.length:
            self._blob = piece.digest, piece.length, done
            return
        if done > piece.length or self._hash.digest() != piece.digest:
            raise CorruptError(f"blob {piece.digest.hex()} in {self._path} does not hold its own bytes")
        self._blob = None
        self._blobs, self._blob_bytes = self._blobs + 1, self._blob_bytes + piece.length

    def finish(self) -> None:
        contents = self._contents
        found = (self.events, self._chains.packages, self._types, self._blobs, self._blob_bytes, self._blob)
        said = (contents.events, contents.package_count, contents.schemas, contents.blob_count, contents.blob_bytes)
        if found != (*said, None):
            raise CorruptError(f"{self._path} is damaged: its footer contradicts what it holds")


async def import_archive(
    archive: Archive,
    log: Log,
    filler: LogFiller,
    *,
    blobs: BlobStore | None = None,
    progress: Tell = lambda _: None,
) -> Loaded:
    """Fill the log, which `filler` fills, with the events of the archive, and `blobs` with its blobs.

    Log and store are created if they are missing, after the whole archive was proved. The log must be empty, or hold
    the beginning of this very import. Blobs are durable before the first event is appended. In the end everything is
    read back. Takes time in proportion to the archive. Memory is bounded by a block of each archived partition.

    Raises:
        CorruptError: the archive is damaged, or the log holds something else; nothing was changed.
        ConfigurationError: the blobs belong in another kind of store, or the log is unfit; nothing was appended.
        ConflictError: somebody writes to the log.
        UnavailableError: call again with the same arguments to continue.
    """
    if blobs is not None and archive.contents.backend != blobs.backend_id:
        raise ConfigurationError(
            f"{archive.path} has no blobs: leave --blobs out"
            if archive.contents.backend is None
            else f"the events of {archive.path} name blobs in a store of {archive.contents.backend}, and "
            f"ARTIFACT_STORE_BLOBS_URL names one of {blobs.backend_id}"
        )
    await check_archive(archive, progress)
    await log.migrate()
    await filler.begin()
    there = await partition_chains(log, by_content)
    follower = Follower(there, "the log")
    async for partition, record in _placed(archive, log, progress, "comparing"):
        follower.covers(partition, record_digest(record.key, record.value), record.offset)
    follower.finish()
    stored = 0
    if blobs is not None:
        await blobs.migrate()
        stored = await _store_blobs(archive, blobs, progress)
    waiting = Batches(filler)
    left = {partition: chain.count for partition, chain in there.items()}
    async for partition, record in _placed(archive, log, progress, "importing"):
        if left[partition]:
            left[partition] -= 1
        else:
            headers, time_ms = record.headers, record.time // 1000
            await waiting.add(
                partition, Record(partition, record.offset, record.key, record.value, None, time_ms, headers)
            )
    await waiting.flush()
    await filler.settle()
    progress(Progress("reading back", 0))
    for partition, chain in (await partition_chains(log, by_content)).items():
        if not chain.has_same(follower.seen[partition]):
            raise CorruptError(f"partition {partition} of the log does not hold what was imported: somebody else wrote")
    end = await log.end()
    resumed = sum(chain.count for chain in there.values())
    return Loaded(end.log, len(there), archive.contents.events, resumed, stored, end)


async def _placed(archive: Archive, log: Log, progress: Tell, doing: str) -> AsyncIterator[tuple[int, ArchivedRecord]]:
    """All records by time, each with its partition in the log. Raises CorruptError if one would change partitions in a
    log with as many partitions."""
    same = archive.contents.partitions == await log.partitions()
    for number, record in enumerate(_merged(archive)):
        partition = log.partition_of(UUID(record.key.decode()))
        if same and partition != record.partition:
            raise CorruptError(
                f"package {record.key.decode()} lies in partition {record.partition} of the archive, and belongs into "
                f"partition {partition} of a log of as many partitions"
            )
        yield partition, record
        if number % _LET_OTHERS_RUN == 0:
            progress(Progress(doing, number, archive.contents.events))
            await asyncio.sleep(0)


def _merged(archive: Archive) -> Iterator[ArchivedRecord]:
    """All records by time. Of equal times, the lower partition comes first; each partition keeps its order."""
    sections = [archive.records(partition) for partition in sorted(archive.contents.sections)]
    return heapq.merge(*sections, key=attrgetter("time"))


class Batches:
    """Records to append to a log, gathered by partition into transactions."""

    def __init__(self, filler: LogFiller) -> None:
        self._filler = filler
        self._waiting: defaultdict[int, list[Record]] = defaultdict(list)
        self._records = self._bytes = 0

    async def add(self, partition: int, record: Record) -> None:
        """Add the next record of its partition. Raises as `LogFiller.append`."""
        self._waiting[partition].append(record)
        self._records += 1
        self._bytes += len(record.value)
        if self._records >= _HELD_RECORDS or self._bytes >= _HELD_BYTES:
            await self.flush()

    async def flush(self) -> None:
        """Append the waiting records. Partitions are independent of each other. Raises as `LogFiller.append`."""
        waiting, self._waiting = self._waiting, defaultdict(list)
        self._records = self._bytes = 0
        results = await asyncio.gather(
            *(self._append(partition, records) for partition, records in waiting.items()), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    async def _append(self, partition: int, records: Sequence[Record]) -> None:
        for start in range(0, len(records), BATCH_RECORDS):
            await self._filler.append(partition, records[start : start + BATCH_RECORDS])


async def _store_blobs(archive: Archive, blobs: BlobStore, progress: Tell) -> int:
    """Store every blob of the archive at its content-addressed key. Returns their number. Raises as
    `BlobStore.store`."""
    pieces = archive.pieces()
    storing: set[asyncio.Task[None]] = set()
    done = 0

    async def store(body: AsyncIterator[bytes], piece: BlobPiece) -> None:
        declared = Declared(size_bytes=piece.length, blake3=piece.digest)
        await blobs.store(body, declared=declared, max_bytes=piece.length)

    async def reap(most: int) -> None:
        nonlocal storing
        while len(storing) > most:
            finished, storing = await asyncio.wait(storing, return_when=asyncio.FIRST_COMPLETED)
            for task in finished:
                task.result()

    try:
        for piece in pieces:
            if len(piece.data) == piece.length:
                storing.add(asyncio.create_task(store(from_any(piece.data), piece)))
                await reap(_BLOBS_AT_ONCE - 1)
            else:
                await store(_whole(piece, pieces), piece)
            done += 1
            progress(Progress("blobs", done, archive.contents.blob_count))
        await reap(0)
    finally:
        for task in storing:
            task.cancel()
        await asyncio.gather(*storing, return_exceptions=True)
    return done


async def _whole(first: BlobPiece, pieces: Iterator[BlobPiece]) -> AsyncIterator[bytes]:
    """The bytes of the blob that begins with this piece."""
    yield first.data
    done = len(first.data)
    while done < first.length:
        piece = next(pieces)
        done += len(piece.data)
        yield piece.data


async def translate(archive: Archive, log: Log, positions: Sequence[Position]) -> list[Position]:
    """For each position of the archived log, the position in this log from which a reader misses nothing.

    In a log with as many partitions, a reader gets nothing twice either. Otherwise partitions were merged or split, and
    a reader may get events again that it has seen, with the same ids and sequences.

    Raises LogIdentityError if a position is of another log, CorruptError if the log does not begin with this archive.
    """
    for position in positions:
        position.require(archive.contents.log)
    partitions = await log.partitions()
    chains = {partition: PartitionChain() for partition in range(partitions)}
    seen: list[dict[int, int]] = [{} for _ in positions]
    """For each position, by partition: how many records lie before the first that its reader has not seen."""
    async for partition, record in _placed(archive, log, lambda _: None, "reading"):
        chain = chains[partition]
        for position, before in zip(positions, seen, strict=True):
            if record.offset >= position.offsets.get(record.partition, 0):
                before.setdefault(partition, chain.count)
        chain.add(record_digest(record.key, record.value), record.offset)
    wanted = {p: {before.get(p, chain.count) for before in seen} for p, chain in chains.items()}
    found = await _offsets_after(log, archive.contents.packages, chains, wanted)
    identity = await log.identity()
    return [
        Position(identity, {p: found[p][before.get(p, chain.count)] for p, chain in chains.items()}) for before in seen
    ]


async def _offsets_after(
    log: Log, packages: Sequence[UUID] | None, chains: dict[int, PartitionChain], wanted: dict[int, set[int]]
) -> dict[int, dict[int, int]]:
    """By partition, the offset after each `wanted` number of events. Raises CorruptError if the log does not begin with
    the chains.

    Records that an archive leaves out are skipped, because copies of a topic have them.
    """
    there = {partition: PartitionChain() for partition in chains}
    found: dict[int, dict[int, int]] = {partition: {0: 0} for partition in chains}
    keys = None if packages is None else {str(package).encode() for package in packages}
    end = (await log.end()).offsets
    with Notes() as notes:
        async for record in scanned(log, end):
            p, chain = record.partition, there[record.partition]
            if chain.count == chains[p].count or (keys is not None and record.key not in keys):
                continue
            event = read_record(record, log.partition_of)
            if not isinstance(event, Event) or is_administrative(event) or came_again(notes, event):
                continue
            chain.add(by_content(record), record.offset)
            if chain.count in wanted[p]:
                found[p][chain.count] = chain.next_offset
    for p, chain in chains.items():
        if not there[p].has_same(chain):
            raise CorruptError(f"partition {p} of the log does not begin with the events of the archive")
    return found
