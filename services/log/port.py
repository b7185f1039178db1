"""The ports to the log of record: `Log` reads it, `CommandWriter` is the only thing that appends to it.

Two adapters fulfil each (`kafka`, `sqlite`) and pass one contract suite (`tests/contract/test_log.py`).
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
from services.core.access import EVERYTHING, Grants
from services.core.decide import Command
from services.runtime.clock import StoreClock


class Record(NamedTuple):
    """One undecoded record. `offset` counts within `partition`; offsets grow but need not be contiguous."""

    partition: int
    offset: int
    key: bytes
    value: bytes
    sequence: int | None = None
    """The number under which the log keeps the record in its package; None for a log that keeps no such numbers."""
    timestamp: int = 0
    """When the record was made (ms since 1970). Set whenever `headers` are."""
    headers: Sequence[tuple[str, str | bytes | None]] = ()
    """The record's Kafka headers in their order, if the scan was asked for them, or while this process makes spans. A
    log that keeps no headers derives them."""


@dataclass(frozen=True, slots=True)
class Batch:
    """What one poll found: records in log order per partition, and per partition the offset to go on from.

    `next_offsets` may move past the last record (transaction markers take offsets too), and may be present for a
    partition without records.
    """

    records: Sequence[Record]
    next_offsets: Mapping[int, int]


class Subscription(Protocol):
    """One member of a projection's consumer group; used by one task at a time.

    The group spreads the partitions over its members. On every assignment, be it of none, `start_offsets` is asked
    where to begin; what the group has committed decides nothing.
    """

    async def poll(self, max_records: int, timeout_seconds: float) -> Batch:
        """Wait until there is something or the time is over (then an empty batch).

        Raises UnavailableError; CorruptError when a starting offset lies outside the log: nothing resets by itself.
        """

    @property
    def assigned(self) -> frozenset[int]:
        """The partitions that are this member's now."""

    async def commit(self, next_offsets: Mapping[int, int], metadata: str) -> None:
        """Show the progress in the log's own tools, once the view holds it. A restart does not go by it."""

    async def close(self) -> None:
        """Leave the group at once, so that others take over without waiting for a time-out."""


StartOffsets = Callable[[Sequence[int]], Awaitable[Mapping[int, int]]]
"""From the assigned partitions to the offset to begin each at."""

Settled = Callable[[], Awaitable[None]]
"""Returns when nothing that was read is on its way into the view any more."""


@dataclass(frozen=True, slots=True)
class PackageExtent:
    """What is known of where a package's events lie: when it was created (µs since 1970), and its last event's number.

    The last event may be a later one by now; None when nothing is known of it.
    """

    created_at: int
    last_sequence: int | None = None


class Log(Protocol):
    """Reading the log of record. Only committed events are seen, in order per partition."""

    @property
    def topic(self) -> str | None:
        """What Kafka calls the log; None for a log that is not in Kafka."""

    async def identity(self) -> UUID:
        """The log's own id: Kafka's topic id, or the id inside the SQLite file. Raises UnavailableError."""

    async def partitions(self) -> int:
        """How many partitions there are; fixed for good."""

    def partition_of(self, package_id: UUID) -> int:
        """The partition that holds the package's events. Raises UnavailableError before the log was reached once."""

    async def end(self, covering: Position | None = None) -> Position:
        """The position after the last committed event of every partition. Raises UnavailableError.

        A broker that is cut off from the others may answer with an older end. If an end does not cover `covering`, a
        position that the caller has seen, other brokers are asked before it is believed.
        """

    async def at_time(self, created_at: int) -> Position:
        """The position from which events of this time (µs since 1970) and later ones are read.

        To the millisecond: earlier events of the same millisecond may follow it. Raises UnavailableError.
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
        """Read on from `since` (None: the start), of one package or of all.

        Ends at `until` (None: what was the end when reading began), or never when `follow` is set: then new events are
        looked for at least every `poll_seconds`. With the package's `extent`, reading begins at its creation; without
        `follow` it ends at its last event, however much the partition holds. Memory is bounded by a batch.

        Raises (on iteration): LogIdentityError (also when the log is made anew meanwhile), InvalidPositionError (beyond
            the end), UnavailableError (within a bound), CorruptError (a record cannot be decoded).
        """

    def scan(
        self, starts: Mapping[int, int], ends: Mapping[int, int], *, headers: bool = False
    ) -> AsyncGenerator[Batch]:
        """Read the records of some partitions, undecoded: of each in `starts` from there to its offset in `ends`.

        For callers that read much and decode it elsewhere. `ends` must not lie beyond the log's end; the last
        `next_offsets` of every partition is its end. Memory is bounded by a batch. Only with `headers` do the records
        have their time and headers.

        Raises (on iteration): UnavailableError (within a bound), LogIdentityError (the log is made anew meanwhile),
            CorruptError (records before a start, or behind it, are gone).
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

        Always empty for a log whose servers look after that. Raises UnavailableError; CorruptError when it cannot be
        told.
        """

    async def committed(self, projection: str) -> Mapping[int, tuple[int, str]]:
        """What the projection's group has committed, by partition: the offset to read next, and the metadata.

        A partition without a commit is absent. Tools of the log's own write offsets without metadata. Raises
        UnavailableError.
        """

    async def show(self, projection: str, next_offsets: Mapping[int, int], metadata: str) -> bool:
        """Commit offsets for the projection's group from outside it; whether that was done.

        Nothing is committed while the group has members: they commit themselves. Raises UnavailableError.
        """

    async def lag(self, projection: str) -> Mapping[int, int]:
        """Per partition, how many offsets the projection's committed offset is behind the end."""

    async def migrate(self) -> None:
        """Create the topic or file, or check the one that is there. Safe to repeat.

        Raises ConfigurationError, with the command that mends it, when the log could lose events.
        """

    async def check(self) -> None:
        """Return if the log can be reached and may be used. Raises UnavailableError, ConfigurationError."""

    async def close(self) -> None:
        """Release connections and threads; blocks until done."""


def partition_read(log: Log, event: RecordedEvent, before: Mapping[int, int]) -> int:
    """The partition in which a reader found the event. `before` is how far it had read until then, by partition."""
    offsets = event.position.offsets
    partition = log.partition_of(event.package_id)
    if offsets.get(partition) != before.get(partition):
        return partition
    # A record with a wrong key is in another partition than its package.
    return next(p for p, offset in offsets.items() if offset != before.get(p))


_HELD_SECONDS = 10.0

EXTENT_SECONDS = 1.0
"""How long it may take to learn where a package's events lie; without it more of the log is read."""


class CommandWriter(Protocol):
    """Appending to the log: commands in, events appended exactly once, acknowledgements out."""

    async def start(self) -> None:
        """Begin to serve: join the group of writers, or open the file. Returns before partitions are owned."""

    async def submit(self, command: Command) -> Acknowledgement:
        """Decide the command and append its events; answer when they are in the log for good and readable.

        A repeat of a command id gets the first answer. Wherever the package's writer is, the caller sees only delay.

        Raises:
            RejectedError: refused for good; it records nothing.
            AnswerExpiredError, PackageAbandonedError: an earlier try may be recorded, and its answer is not kept.
            PushBackError: nothing recorded, retry after a while.
            UnavailableError: the outcome is unknown; retry with the same command id.
        """

    async def check_ingest(
        self,
        package_id: UUID,
        relative_paths: Sequence[str],
        command_id: UUID | None,
        grants: Grants = EVERYTHING,
        principal: str | None = None,
    ) -> str | None:
        """Ask the package's writer whether files of these paths could be ingested now.

        `grants` and `principal` are those that the command would have. Returns the package's retention class; None if
        its writer is of a release that does not tell it.

        Raises as `submit`: PackageNotFoundError, IllegalPackageStateError, DuplicateRelativePathError, TooLargeError.
        """

    def announce(self, package_id: UUID) -> None:
        """Say that a command that adds a file to the package will come as soon as the bytes are stored.

        Commands in the queue may wait a moment for it, to share a transaction. Does not block, and promises nothing.
        """

    async def end(self, partitions: Collection[int]) -> Position:
        """A position after every event of these partitions that was acknowledged before the call.

        Their writers prove it: `Log.end` may ask a broker that is cut off from the others. Raises UnavailableError and
        PushBackError when a partition has no writer that can.
        """

    async def extent(self, package_id: UUID) -> PackageExtent | None:
        """Where the package's events lie, as its writer knows; None when that cannot be learned at once.

        Waits for EXTENT_SECONDS at most. Never raises because something cannot be reached.
        """

    async def ready(self) -> str | None:
        """None when every partition can be written to through this process; else what is missing."""

    async def status(self) -> Sequence[PartitionStatus]:
        """Who owns which partition, for operators."""

    async def close(self) -> None:
        """Finish what was accepted, hand partitions over, release everything; blocks until done."""


@dataclass(frozen=True, slots=True)
class PartitionStatus:
    """One partition's writer. `owner` is a URL or `this process`; None when nobody owns it."""

    partition: int
    owner: str | None
    since: int | None = None
    """When this process took it over (µs since 1970); None when another owns it."""
    takeover_seconds: float | None = None
    restored_from: str | None = None
    """What the writer's state was made of at that time: its `file`, a `snapshot`, or the whole `log`."""
    trouble: str | None = None
    """Why the partition cannot be written to now, as far as its owner knows."""
    waiting: int = 0
    """How many requests wait for the writer's next turn."""
    memory_only: str | None = None
    """Why the newest part of the writer's state is in memory alone; writing goes on, a take-over takes longer."""
    skipped: int = 0
    """Records that are no events and were passed over, as an operator confirmed."""
    repeated: int = 0
    """Events that their packages had already, and that were passed over."""
    quarantined: int = 0
    """Packages whose history is contradicted: nothing is added to them."""
    bad_offset: int | None = None
    """Offset of the record that is no event and that nobody has confirmed yet: the partition stands before it."""
    bad_digest: str | None = None
    """Digest of that record (64 hex digits), by which `artifact-store log skip` confirms it."""
    lost_offset: int | None = None
    """Offset of an acknowledged record that the partition lacks: nothing is appended until an operator accepts that."""
    lost_digest: str | None = None
    """Digest of that record (64 hex digits), by which `artifact-store log accept-loss` accepts it."""


PutManifest = Callable[[bytes], Awaitable[None]]
"""Makes a claim-checked manifest durable under its content-addressed key before its event is appended."""


class SnapshotStore(Protocol):
    """Where writers leave copies of their state for one that begins on an empty disk: named objects, as blobs have."""

    async def put_object(self, key: str, data: bytes) -> None:
        """Write an object, durably and as a whole. Raises UnavailableError."""

    async def get_object(self, key: str) -> bytes | None:
        """Read an object, None if there is none. Raises UnavailableError."""

    async def list_objects(self, prefix: str) -> list[str]:
        """Keys of all objects below `prefix`, sorted. Raises UnavailableError."""

    async def delete_object(self, key: str) -> None:
        """Remove an object, if it is there. Raises UnavailableError."""


class TimedStore(Protocol):
    """A store whose clock a writer compares with its own."""

    @property
    def clock(self) -> StoreClock:
        """The store's clock, as its last answers tell it."""

    async def now(self) -> datetime:
        """Ask for the store's time, so that `clock` is up to date. Raises UnavailableError."""


class PartitionNotOwnedError(UnavailableError, problem="partition-not-owned"):
    """This process is not the writer of the package's partition now, and has appended nothing; ask the writer."""


class NotAppendedError(UnavailableError, problem="not-appended"):
    """The command's events could not be appended, and the writer has made sure that the log does not hold them."""


class HeldError(PushBackError):
    """Nothing is appended to a partition until an operator has mended something; the text says what and how.

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

        Of a record only these count, not its own partition and offset. May be called for several partitions at a time.
        Raises UnavailableError: whether they were appended is unknown. ConflictError: somebody else has appended.
        """

    async def settle(self) -> None:
        """Wait until everything that was appended can be read. Raises UnavailableError (within a bound)."""

    async def close(self) -> None:
        """Release connections."""


class Forwarder(Protocol):
    """How a small command reaches the process that owns its partition; bytes of files never travel this way."""

    async def submit(self, owner_url: str, command: Command) -> Acknowledgement:
        """As `CommandWriter.submit`, at the owner; PartitionNotOwnedError when it is not the owner any more."""

    async def end(self, owner_url: str, partition: int) -> int | None:
        """The offset of `CommandWriter.end`, from the owner; PartitionNotOwnedError when it is not the owner any more.

        None if the owner is of a release that cannot prove it.
        """

    async def extent(self, owner_url: str, package_id: UUID) -> PackageExtent | None:
        """As `CommandWriter.extent`, at the owner; UnavailableError when it does not answer or is not the owner."""

    async def check_ingest(
        self,
        owner_url: str,
        package_id: UUID,
        relative_paths: Sequence[str],
        command_id: UUID | None,
        grants: Grants = EVERYTHING,
        principal: str | None = None,
    ) -> str | None:
        """As `CommandWriter.check_ingest`, at the owner; PartitionNotOwnedError when it is not the owner any more."""
