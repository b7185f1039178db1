"""The ports to the log of record: `Log` reads it, `CommandWriter` is the only thing that appends to it.

Two adapters implement each (`kafka`, `sqlite`) and pass one contract suite (`tests/contract/test_log.py`).
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple, Protocol
from uuid import UUID

from artifact_store.errors import PushBackError, UnavailableError
from artifact_store.events import RecordedEvent
from artifact_store.models import Acknowledgement
from artifact_store.position import Position
from services.core.decide import Command, IngestCheck
from services.runtime.clock import StoreClock


class Record(NamedTuple):
    """One undecoded record. `offset` counts within `partition`; offsets grow but need not be contiguous."""

    partition: int
    offset: int
    key: bytes
    value: bytes
    sequence: int | None = None
    """The sequence under which the log lists the record in its package; None for a log without such a list."""
    timestamp: int = 0
    """When the record was made (ms since 1970). Set whenever `headers` are."""
    headers: Sequence[tuple[str, str | bytes | None]] = ()
    """The record's Kafka headers in their order, if the scan was asked for them, or while this process makes spans. A
    log that keeps no headers derives them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """The result of one poll: records in log order per partition, and per partition the offset to continue from.

    `next_offsets` may move past the last record (transaction markers take offsets too), and may be present for a
    partition without records.
    """

    records: Sequence[Record]
    next_offsets: Mapping[int, int]


class Subscription(Protocol):
    """One member of a projection's consumer group; used by one task at a time.

    The group spreads the partitions over its members. On every assignment, even an empty one, `start_offsets` is asked
    where to begin; the group's committed offsets are ignored.
    """

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        """Wait for records. Returns an empty batch if there are none in time.

        Raises UnavailableError; CorruptError if a starting offset lies outside the log: there is no automatic reset.
        """

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions that are assigned to this member now."""

    async def commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        """Show progress in the log's own tools, after the view has it. It has no effect on a restart."""

    async def close(self) -> None:
        """Leave the group at once, so that others take over without waiting for a time-out."""


StartOffsets = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]
"""Returns the offset at which to begin each of the assigned partitions."""

Settled = Callable[[], Awaitable[None]]
"""Returns when no batch that was read is being applied to the view any more."""


@dataclass(frozen=True, slots=True)
class PackageExtent:
    """Where a package's events lie: when it was created (µs since 1970), and the sequence of its last known event.

    There may be later events by now. The sequence is None if it is not known.
    """

    created_at: int
    last_sequence: int | None = None


class Log(Protocol):
    """Reading the log of record. Only committed events are seen, in order per partition."""

    @property
    def topic(self) -> str | None:
        """The name of the Kafka topic; None for a log that is not in Kafka."""

    async def identity(self) -> UUID:
        """The log's own id: Kafka's topic id, or the id inside the SQLite file. Raises UnavailableError."""

    async def partitions(self) -> int:
        """The number of partitions, which never changes."""

    def partition_of(self, package_id: UUID) -> int:
        """The partition with the package's events. Raises UnavailableError if the log was never reached yet."""

    async def end(self, covering: Position | None = None) -> Position:
        """The position after the last committed event of every partition. Raises UnavailableError.

        A broker that is cut off from the others may answer with an older end. If an end does not cover `covering`, a
        position that the caller has seen, other brokers are asked before it is believed.
        """

    async def at_time(self, created_at: int) -> Position:
        """The position from which events of this time (µs since 1970) and later ones are read.

        Exact to the millisecond: earlier events of the same millisecond may follow it. Raises UnavailableError.
        """

    def read(
        self,
        since: Position | None = None,
        *,
        package_id: UUID | None = None,
        extent: PackageExtent | None = None,
        until: Position | None = None,
        follow: bool = False,
        poll_seconds: float = 0.1,
    ) -> AsyncGenerator[RecordedEvent]:
        """Read events after `since` (None: from the start), of one package or of all.

        Ends at `until` (None: the log's end when reading began), or never with `follow`, which looks for new events at
        least every `poll_seconds`. With the package's `extent`, reading begins at its creation and, without `follow`,
        ends at its last event, however much the partition holds. Memory is bounded by a batch.

        Raises (on iteration): LogIdentityError (also if the log is created again meanwhile), InvalidPositionError
            (beyond the end), UnavailableError (within a bound), CorruptError (a record cannot be decoded).
        """

    def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        """Read undecoded records of some partitions: of each one in `starts`, from that offset to its offset in `ends`.

        For callers that read a lot and decode it elsewhere. `ends` must not lie beyond the log's end; the last
        `next_offsets` of every partition is its end. Memory is bounded by a batch. Records have their time and headers
        only with `headers`.

        Raises (on iteration): UnavailableError (within a bound), LogIdentityError (the log is created again meanwhile),
            CorruptError (records before a start, or after it, are gone).
        """

    async def subscribe(
        self, projection: str, start_offsets: StartOffsets, settled: Settled | None = None
    ) -> Subscription:
        """Join the projection's consumer group. Raises UnavailableError.

        Before partitions go to another member, `settled` is awaited, within a bound. That member then begins after what
        this one has folded; otherwise it would read the same records, and its folds would be refused.
        """

    async def damage(self) -> Sequence[str]:
        """Damage to the log's storage that its records do not show, in words. Blocks no writer.

        Always empty for a log whose servers check that themselves. Raises UnavailableError; CorruptError if the damage
        cannot be determined.
        """

    async def committed(self, projection: str) -> Mapping[int, tuple[int, str]]:
        """The projection's committed offsets, by partition: the offset to read next, and the metadata.

        A partition without a commit is absent. The log's own tools write offsets without metadata. Raises
        UnavailableError.
        """

    async def show(self, projection: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        """Commit offsets for the projection's group from outside it. Returns whether that was done.

        It is not done while the group has members, which commit themselves. Raises UnavailableError.
        """

    async def lag(self, projection: str) -> Mapping[int, int]:
        """Per partition, how many offsets the projection's committed offset is behind the end."""

    async def migrate(self) -> None:
        """Create the topic or file, or check the existing one. Safe to repeat.

        Raises ConfigurationError, with the command that mends it, if the log could lose events.
        """

    async def check(self) -> None:
        """Return if the log can be reached and may be used. Raises UnavailableError, ConfigurationError."""

    async def close(self) -> None:
        """Release connections and threads; blocks until done."""


def partition_read(log: Log, event: RecordedEvent, before: Mapping[int, int]) -> int:
    """The partition in which a reader found the event. `before` is how far it had read before, by partition."""
    offsets = event.position.offsets
    partition = log.partition_of(event.package_id)
    if offsets.get(partition) != before.get(partition):
        return partition
    # A record with a wrong key is in another partition than its package.
    return next(p for p, offset in offsets.items() if offset != before.get(p))


_HELD_SECONDS = 10.0

EXTENT_SECONDS = 1.0
"""How long finding a package's extent may take; without it, more of the log is read."""


class CommandWriter(Protocol):
    """Appending to the log: commands in, events appended exactly once, acknowledgements out."""

    async def start(self) -> None:
        """Begin to serve: join the group of writers, or open the file. Returns before partitions are owned."""

    async def submit(self, command: Command) -> Acknowledgement:
        """Decide the command and append its events. Returns when they are durable in the log and can be read.

        A repeat of a command id gets the first answer. If the package's writer is elsewhere, the caller only notices a
        delay.

        Raises:
            RejectedError: the command is refused; nothing is recorded.
            AnswerExpiredError, PackageAbandonedError: an earlier attempt may be recorded, and its answer is not kept.
            PushBackError: nothing is recorded; retry after a while.
            UnavailableError: the outcome is unknown; retry with the same command id.
        """

    async def check_ingest(self, asked: IngestCheck) -> str | None:
        """Ask the package's writer. Returns the package's retention class; None if the writer's release tells none.

        Raises as `submit`: PackageNotFoundError, IllegalPackageStateError, DuplicateRelativePathError, TooLargeError.
        """

    def announce(self, package_id: UUID) -> None:
        """Announce a command that adds a file to the package, which follows when the bytes are stored.

        Commands in the queue may wait a moment for it, to share a transaction. Does not block. The command need not
        come.
        """

    async def end(self, partitions: Collection[int]) -> Position:
        """A position after every event of these partitions that was acknowledged before the call.

        Their writers prove it, whereas `Log.end` may ask a broker that is cut off from the others. Raises
        UnavailableError and PushBackError if a partition has no writer that can prove it.
        """

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, as far as its writer knows; None if that cannot be found out quickly.

        Waits for at most EXTENT_SECONDS. Never raises because something cannot be reached.
        """

    async def ready(self) -> str | None:
        """None if every partition can be written to through this process; else what is missing."""

    async def status(self) -> Sequence[PartitionStatus]:
        """The status of all partitions, for operators."""

    async def close(self) -> None:
        """Finish accepted commands, hand partitions over, release everything; blocks until done."""


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One partition's writer. `owner` is a URL or `this process`; None if nobody owns the partition."""

    partition: int
    owner: str | None
    since: int | None = None
    """When this process took it over (µs since 1970); None if another process owns it."""
    takeover_seconds: float | None = None
    restored_from: str | None = None
    """What the writer's state was restored from then: its `file`, a `snapshot`, or the whole `log`."""
    trouble: str | None = None
    """Why the partition cannot be written to now, as far as its owner knows."""
    waiting: int = 0
    """How many requests wait for the writer's next turn."""
    memory_only: str | None = None
    """Why the newest part of the writer's state is only in memory; writing continues, but a take-over takes longer."""
    skipped: int = 0
    """Records that are not events and were passed over, as an operator confirmed."""
    repeated: int = 0
    """Repeated events of packages, which were passed over."""
    quarantined: int = 0
    """Packages whose history the log contradicts: nothing is added to them."""
    bad_offset: int | None = None
    """Offset of the record that is not an event and not confirmed yet: the partition has stopped before it."""
    bad_digest: str | None = None
    """Digest of that record (64 hex digits), by which `artifact-store log skip` confirms it."""
    lost_offset: int | None = None
    """Offset of an acknowledged record that the partition lacks: nothing is appended until an operator accepts that."""
    lost_digest: str | None = None
    """Digest of that record (64 hex digits), by which `artifact-store log accept-loss` accepts it."""


PutManifest = Callable[[bytes], Awaitable[None]]
"""Makes a claim-checked manifest durable under its content-addressed key before its event is appended."""


class SnapshotStore(Protocol):
    """The store for copies of writers' states, for writers on an empty disk: named objects, as in a blob store."""

    async def put_object(self, key: str, data: bytes) -> None:
        """Write an object, durably and as a whole. Raises UnavailableError."""

    async def get_object(self, key: str) -> bytes | None:
        """Read an object; None if there is none. Raises UnavailableError."""

    async def list_objects(self, prefix: str) -> list[str]:
        """Keys of all objects below `prefix`, sorted. Raises UnavailableError."""

    async def delete_object(self, key: str) -> None:
        """Remove an object, if it exists. Raises UnavailableError."""


class TimedStore(Protocol):
    """A store whose clock a writer compares with its own."""

    @property
    def clock(self) -> StoreClock:
        """The store's clock, known from its last answers."""

    async def now(self) -> datetime:
        """Ask for the store's time, so that `clock` is up to date. Raises UnavailableError."""


class PartitionNotOwnedError(UnavailableError, problem="partition-not-owned"):
    """This process is not the writer of the package's partition, and has appended nothing; ask the writer."""


class NotAppendedError(UnavailableError, problem="not-appended"):
    """The command's events could not be appended, and the writer has made sure that the log does not have them."""


class HeldError(PushBackError):
    """Nothing is appended to a partition until an operator has mended the cause; the text says what it is and how.

    With `own_clock`, this machine's clock is wrong: other gateways may still be able to write.
    """

    def __init__(self, detail: str, *, own_clock: bool = False) -> None:
        super().__init__(detail, _HELD_SECONDS)
        self.own_clock = own_clock


class LogFiller(Protocol):
    """Fills a log that has no writer with records that were made elsewhere, in transactions. For one task."""

    async def begin(self) -> None:
        """Fence off every earlier filler and writer of the log.

        Raises ConflictError: a process writes to the log now. ConfigurationError: the log could lose events.
        UnavailableError.
        """

    async def append(self, partition: int, records: Sequence[Record]) -> None:
        """Append these records' keys, values, times and headers to the partition in one transaction.

        Records' own partitions and offsets are ignored. May be called for several partitions at a time. Raises
        UnavailableError: it is unknown whether they were appended. ConflictError: somebody else has appended.
        """

    async def settle(self) -> None:
        """Wait until everything that was appended can be read. Raises UnavailableError (within a bound)."""

    async def close(self) -> None:
        """Release connections."""


class Forwarder(Protocol):
    """Sends small commands to the process that owns their partition; bytes of files are never sent this way."""

    async def submit(self, owner_url: str, command: Command) -> Acknowledgement:
        """As `CommandWriter.submit`, at the owner. Raises PartitionNotOwnedError if it is no longer the owner."""

    async def end(self, owner_url: str, partition: int) -> int | None:
        """The offset of `CommandWriter.end`, from the owner. Raises PartitionNotOwnedError if it is not the owner.

        None if the owner's release cannot prove it.
        """

    async def extent(self, owner_url: str, package_id: UUID) -> PackageExtent | None:
        """As `CommandWriter.extent`, at the owner. Raises UnavailableError if that does not answer or is no owner."""

    async def check_ingest(self, owner_url: str, asked: IngestCheck) -> str | None:
        """As `CommandWriter.check_ingest`, at the owner. Raises PartitionNotOwnedError if it is no longer the owner."""
