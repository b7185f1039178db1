"""Two chains of digests: of the events of each package, and of the records of each partition.

The first proves that an archive has every event of its packages. The second shows whether one log begins with the
records of another, in memory that does not depend on the number of packages or records.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field

from blake3 import blake3

from artifact_store.canonical import ordered_cbor
from artifact_store.errors import CorruptError
from artifact_store.events import Event, PackageCreated
from schemas.digests import event_digest, payload_digest_holds, record_digest
from schemas.identifiers import event_id
from services.log.port import Log, Record
from services.verify.notes import Notes

DigestOf = Callable[[Record], bytes]
"""The digest by which records of two logs are compared."""

_MARK_EVERY = 1_000
"""After this many records the chain's digest is kept as a mark: a difference is located between two marks."""

_MOST_MARKS = 4_096
"""Once a partition has this many marks, every other one is dropped, and marks are kept half as often from then on."""


class PackageChains:
    """Follows the events of every package. Chains that do not fit into memory lie in the notes."""

    def __init__(self, notes: Notes) -> None:
        self._notes = notes
        self.packages = 0

    def follow(self, event: Event, where: str) -> bool:
        """Whether this is the next event of its package; False if the package already has its sequence.

        Raises CorruptError, which names `where` the event is, if it does not continue the package's history.
        """
        head, is_new = self._notes.head(event.package_id)
        if 1 <= event.sequence <= head.sequence:
            return False
        self.packages += is_new
        wrong = None
        if event.sequence != head.sequence + 1:
            wrong = f"is event {event.sequence} of its package and follows event {head.sequence}"
        elif event.previous_digest != head.digest:
            wrong = "does not have the digest of the event before it"
        elif (event.sequence == 1) != isinstance(event.payload, PackageCreated):
            wrong = "creates a package that is there, or belongs to one that was never created"
        elif event.event_id != event_id(event.package_id, event.sequence):
            wrong = "has an id that is not derived from package and sequence"
        elif payload_digest_holds(event) is False:
            wrong = "does not have the digest of its payload"
        if wrong is not None:
            raise CorruptError(f"the event {where}, of package {event.package_id}, {wrong}")
        head.sequence, head.digest = event.sequence, event_digest(event)
        return True


def came_again(notes: Notes, event: Event) -> bool:
    """Whether the package, or partition, already had an event of this sequence, which readers skip. Notes the event."""
    head, _ = notes.head(event.package_id)
    if 1 <= event.sequence <= head.sequence:
        return True
    head.sequence = event.sequence
    return False


@dataclass(frozen=True, slots=True)
class _Mark:
    digest: bytes
    next_offset: int


@dataclass(slots=True)
class PartitionChain:
    """The records of one partition so far: their number, and a digest over the digests of all of them."""

    count: int = 0
    digest: bytes = b""
    next_offset: int = 0
    """The offset after the last of them."""
    marks: list[_Mark] = field(default_factory=list)
    every: int = _MARK_EVERY
    """How many records lie between two marks."""

    def has_same(self, other: PartitionChain) -> bool:
        """Whether both have the same records in the same order."""
        return (self.count, self.digest) == (other.count, other.digest)

    def add(self, digest: bytes, offset: int) -> None:
        """Add the next record."""
        self.count, self.next_offset = self.count + 1, offset + 1
        self.digest = blake3(self.digest + digest).digest()
        if self.count % self.every == 0:
            self.marks.append(_Mark(self.digest, self.next_offset))
            if len(self.marks) == _MOST_MARKS:
                self.marks, self.every = self.marks[1::2], self.every * 2


class Follower:
    """Checks that a log, of which the chains are known, holds the first of the given records, and no others."""

    def __init__(self, copy: Mapping[int, PartitionChain], name: str) -> None:
        """`copy` has the chains of the log to check; its `name` is for messages."""
        self._copy = copy
        self._name = name
        self.seen = {partition: PartitionChain() for partition in copy}
        """The chains of what the log should hold."""

    def covers(self, partition: int, digest: bytes, offset: int) -> bool:
        """Whether the copy has this record of the original, the next one of its partition.

        Raises CorruptError if the copy differs, at the next mark or at its end.
        """
        copy, seen = self._copy[partition], self.seen[partition]
        seen.add(digest, offset)
        if seen.count == copy.count:
            self._require(partition, copy.digest, copy.next_offset)
        elif seen.count < copy.count and seen.count % copy.every == 0:
            mark = copy.marks[seen.count // copy.every - 1]
            self._require(partition, mark.digest, mark.next_offset)
        return seen.count <= copy.count

    def finish(self) -> None:
        """The original has ended. Raises CorruptError if the copy holds more."""
        for partition, copy in self._copy.items():
            if (more := copy.count - self.seen[partition].count) > 0:
                raise CorruptError(
                    f"partition {partition} of {self._name} holds {more:,} records more than it should hold"
                )

    def _require(self, partition: int, digest: bytes, until: int) -> None:
        seen, copy = self.seen[partition], self._copy[partition]
        if seen.digest == digest:
            return
        number = (seen.count - 1) // copy.every
        since = copy.marks[number - 1].next_offset if number else 0
        raise CorruptError(
            f"partition {partition} of {self._name} holds other records than it should, between offset {since} and "
            f"{until - 1}"
        )


async def partition_chains(log: Log, digest_of: DigestOf, *, headers: bool = False) -> dict[int, PartitionChain]:
    """The chains of all partitions of a log up to its end. Raises as `Log.scan`."""
    end = (await log.end()).offsets
    found = {partition: PartitionChain() for partition in range(await log.partitions())}
    async for record in scanned(log, end, headers=headers):
        found[record.partition].add(digest_of(record), record.offset)
    return found


async def scanned(
    log: Log, ends: Mapping[int, int], *, starts: Mapping[int, int] | None = None, headers: bool = False
) -> AsyncGenerator[Record]:
    """The records of `Log.scan`, one by one, of the partitions in `ends`. Raises as it does."""
    begin = {partition: (starts or {}).get(partition, 0) for partition in ends}
    async with aclosing(log.scan(begin, ends, headers=headers)) as batches:
        async for batch in batches:
            for record in batch.records:
                yield record


def by_content(record: Record) -> bytes:
    """The digest of key and value, which every log keeps."""
    return record_digest(record.key, record.value)


def by_all(record: Record) -> bytes:
    """The digest of key, value, time and headers, which a copy of a topic keeps."""
    about = [record.key, record.value, record.timestamp, [list(header) for header in record.headers]]
    return blake3(ordered_cbor(about)).digest()
