"""Sources: the engine reads a range of the log, one package of it, or the partitions that a group assigns.

Each source gives `EventBatch`es: the events that were read, where reading began, and the offsets that it reached.
`read_range` reads up to given offsets, all packages or some. `Assignment` is one membership in a projection's consumer
group: it begins reading at the view's own checkpoint. The offsets that it commits to the group only show progress to
people. If an operator resets all of them to the log's start, the view is emptied and folded again. Any other change
stops the projector.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from typing import Self
from uuid import UUID

from artifact_store.errors import CorruptError, PushBackError, UnavailableError
from artifact_store.events import AdministrativePayload, Event, LogSkipped
from artifact_store.position import Position
from schemas.codec import UndecodableEventError
from schemas.runs import Entry, read_entry
from services.log.port import Batch, Log, Record, Subscription
from services.log.records import BadRecord, BatchSize, PartitionOf, Skips, misplacement
from services.views.database import Views
from services.views.engine.checkpoints import (
    Checkpoint,
    StaleCheckpointError,
    check_continues,
    folds_again,
    live_row,
    load_checkpoint,
    require_same_log,
)
from services.views.engine.generations import reset
from services.views.projections import Projection

logger = logging.getLogger(__name__)

_FEW = 20
"""Up to this many records are decoded on the event loop: handing them to a thread would take longer."""


@dataclass(frozen=True, slots=True)
class EventBatch:
    """What a source has read: events, in log order per partition, and the offset reached in each partition.

    `since` is where reading began. `ends` has the offset to continue from for each partition that the batch moves, even
    if the batch has no record of that partition. `records` and `events` are parallel. `unreadable` are records that are
    not valid events, each with the reason. Administrative records are left out, and so are records that an operator
    has confirmed not to be events. `confirmed` are the partitions in which such a confirmation was read.
    """

    since: Checkpoint
    ends: Mapping[int, int]
    records: Sequence[Record] = ()
    events: Sequence[Entry] = ()
    unreadable: Sequence[tuple[Record, str]] = ()
    confirmed: frozenset[int] = frozenset()

    @classmethod
    def of(
        cls, records: Sequence[Record], partition_of: PartitionOf, *, since: Checkpoint, ends: Mapping[int, int]
    ) -> Self:
        """Decode the records. Blocks for as long as that takes.

        An event under a key that is not its package's id, or in another partition than its package's, is unreadable.
        """
        packages: dict[bytes, UUID] = {}
        kept: list[Record] = []
        events: list[Entry] = []
        unreadable: list[tuple[Record, str]] = []
        confirmed: set[int] = set()
        belongs: set[tuple[int, bytes]] = set()  # by key, which is quicker to hash than the id that it is
        for record in records:
            try:
                entry = read_entry(record.value, record.key, packages)
            except UndecodableEventError as error:
                unreadable.append((record, f"it cannot be read: {error}"))
                continue
            place = record.partition, record.key
            payload = entry.payload if isinstance(entry, Event) else None
            administrative = payload is not None and isinstance(payload, AdministrativePayload)
            if administrative or place not in belongs:
                cause = misplacement(record, entry.package_id, payload, partition_of)
                if cause is not None:
                    unreadable.append((record, cause))
                    continue
                belongs.add(place)
            if administrative:
                if isinstance(payload, LogSkipped):
                    confirmed.add(record.partition)
                continue
            kept.append(record)
            events.append(entry)
        return cls(since, ends, kept, events, unreadable, frozenset(confirmed))

    def __len__(self) -> int:
        return len(self.records) + len(self.unreadable)

    @property
    def after(self) -> Checkpoint:
        """Where a view stands once the batch is applied."""
        log, offsets = self.since.position.log, self.since.position.offsets
        return Checkpoint(self.since.generation, Position(log, {**offsets, **self.ends}))

    def last_times(self) -> Mapping[int, int]:
        """The time of each partition's last event, in µs since 1970."""
        times: dict[int, int] = {}
        for record, event in zip(reversed(self.records), reversed(self.events), strict=True):
            times.setdefault(record.partition, event.created_at)
            if len(times) == len(self.ends):
                break
        return times

    def last_records(self) -> Mapping[int, Record]:
        """The last record of each partition."""
        last = {record.partition: record for record in self.records}
        for record, _ in self.unreadable:
            if record.partition not in last or last[record.partition].offset < record.offset:
                last[record.partition] = record
        return last


async def decode(
    log: Log, records: Sequence[Record], skips: Skips, *, since: Checkpoint, ends: Mapping[int, int]
) -> EventBatch:
    """Decode the records, in a thread if they are many. Leaves out those that an operator confirmed not to be events.

    Raises as `Skips.covers`.
    """

    def work() -> EventBatch:
        return EventBatch.of(records, log.partition_of, since=since, ends=ends)

    batch = work() if len(records) <= _FEW else await asyncio.to_thread(work)
    bad = [(r, cause) for r, cause in batch.unreadable if not await skips.covers(BadRecord.of(r, cause))]
    return replace(batch, unreadable=bad) if batch.unreadable else batch


BATCH_EVENTS = 2000

BATCH_BYTES = 8 << 20
"""A batch ends early once its records have this many bytes. Manifests are large, and this bounds memory."""


async def read_range(
    log: Log,
    since: Checkpoint,
    ends: Mapping[int, int],
    *,
    batch_events: int = BATCH_EVENTS,
    only: Callable[[Record], bool] | None = None,
    skips: Skips | None = None,
) -> AsyncGenerator[EventBatch]:
    """Read from `since` exactly to `ends`, in the partitions of `ends`. There need not be an event at these offsets.

    A batch has at most `batch_events` records and BATCH_BYTES, but at least one record. With `only`, the other records
    are passed over. Decoding takes place in a thread. `skips` are those of an earlier reading of the same log.

    Raises as `Log.scan`.
    """
    skips = skips or Skips(log)
    offsets = since.position.offsets
    starts = {p: offsets.get(p, 0) for p, end in ends.items() if offsets.get(p, 0) < end}
    records: list[Record] = []
    reached: dict[int, int] = {}
    size = 0
    async with aclosing(log.scan(starts, ends)) as batches:
        async for batch in batches:
            more = sum(len(record.value) for record in batch.records)
            if only is None and len(records) + len(batch.records) <= batch_events and size + more <= BATCH_BYTES:
                records += batch.records
                reached.update(batch.next_offsets)
                size += more
                continue
            for record in batch.records:
                if only is not None and not only(record):
                    continue
                if records and (len(records) >= batch_events or size + len(record.value) > BATCH_BYTES):
                    full = {**reached, record.partition: record.offset}
                    found = await decode(log, records, skips, since=since, ends=full)
                    yield found
                    since, records, reached, size = found.after, [], {}, 0
                records.append(record)
                reached[record.partition] = record.offset + 1
                size += len(record.value)
            reached.update(batch.next_offsets)
    if reached:
        yield await decode(log, records, skips, since=since, ends=reached)


async def read_ahead(batches: AsyncGenerator[EventBatch]) -> AsyncGenerator[EventBatch]:
    """The same batches, but the next one is read and decoded while the caller works on the previous one.

    A failure to read is raised when the caller asks for the batch that it concerns; if the caller fails first, its own
    failure counts.
    """
    async with aclosing(batches):
        reading = asyncio.create_task(_next(batches))
        try:
            while (batch := await reading) is not None:
                reading = asyncio.create_task(_next(batches))
                yield batch
        finally:
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)


async def _next(batches: AsyncGenerator[EventBatch]) -> EventBatch | None:
    return await anext(batches, None)


_ASSIGNED_RECORDS = 10_000
_ASSIGNED_BYTES = 4 << 20
"""A batch ends once it has this many records or bytes. Its last poll may exceed them by what that poll returns."""

_POLL_SECONDS = 0.25
_POLL_RECORDS = 2_500
"""A poll asks for this many records at most."""

IDENTITY_SECONDS = 5.0
"""How often the log's identity and the view's generation are checked while no records arrive."""

_RESET_SECONDS = 10.0
"""How long an assignment may wait for readers of a view that must be emptied. The next assignment tries again."""


class Assignment:
    """One membership in a projection's group: reads the partitions assigned to it. Used by one task at a time."""

    def __init__(
        self,
        views: Views,
        log: Log,
        projection: Projection,
        settled: Callable[[], Awaitable[None]],
    ) -> None:
        """Before an assignment begins or ends, `settled` is awaited. It returns when no batch is being applied."""
        self._views = views
        self._log = log
        self._projection = projection
        self._settled = settled
        self._identity: UUID | None = None
        """The log's identity when this member joined."""
        self._generation: UUID | None = None
        """The view's live generation when this member joined."""
        self._reset = False
        """Whether the view has another generation by now, so that this member must join again."""
        self._next: dict[int, int] = {}
        """The offset to read next, by partition."""
        self._unproven: set[int] = set()
        """Assigned partitions from which nothing has been read yet: see `_prove`."""
        self._began: Checkpoint | None = None
        """The view's checkpoint at the last assignment."""
        self._unclaimed: dict[int, int] = {}
        """Where reading begins in partitions whose committed offset another tool has set: see `_claim`."""
        self._subscription: Subscription | None = None
        self._skips = Skips(log)
        self._unshown: dict[int, int] = {}
        """Offsets that the view has reached and that are not committed to the group yet."""
        self._size = BatchSize(_ASSIGNED_BYTES, _POLL_RECORDS)
        self._looked = time.monotonic()
        """When the log's identity was last checked, on the monotonic clock (s)."""
        self._quiet_since: float | None = None
        """When records or an assignment last arrived, on the monotonic clock (s); None before the first."""

    @property
    def idle(self) -> bool:
        """Whether there was an assignment, even an empty one, and no record has arrived for IDENTITY_SECONDS.

        False until then: the records of assigned partitions may not have arrived yet.
        """
        return self._quiet_since is not None and time.monotonic() > self._quiet_since + IDENTITY_SECONDS

    async def join(self) -> None:
        """Join the group; partitions are assigned while polling.

        Raises LogIdentityError, UnavailableError, ConfigurationError.
        """
        self._identity = await self._log.identity()
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        self._generation = checkpoint.generation
        self._subscription = await self._log.subscribe(self._projection.name, self._start_offsets, self._settled)

    async def batches(self, stop: asyncio.Event) -> AsyncGenerator[EventBatch]:
        """Read batches until `stop` is set, and show the progress noted by `applied`. Raises as `next_batch`."""
        while not stop.is_set():
            await self.show()
            yield await self.next_batch(_POLL_SECONDS)

    async def next_batch(self, timeout_seconds: float) -> EventBatch:
        """Wait until there is something to apply. After `timeout_seconds`, return an empty batch, which moves nothing.

        Raises:
            StaleCheckpointError: the assigned partitions do not continue from here, or the view has a new generation:
                join again.
            CorruptError: the log does not continue from what the view has folded.
            LogIdentityError: the log was created again since the membership began.
            UnavailableError: the log or the database cannot be reached.
        """
        records: list[Record] = []
        starts: dict[int, int] = {}
        ends: dict[int, int] = {}
        size = 0
        while True:
            async with self._of_one_log():
                polled = await self._joined().poll(self._size.most(size), 0.0 if ends else timeout_seconds)
            self._check(polled, ends)
            if gone := ends.keys() - self._joined().assigned:  # their new owners read these records
                records = [record for record in records if record.partition not in gone]
                for partition in gone:
                    del starts[partition], ends[partition]
            if self._unclaimed:
                await self._claim()
            for partition, offset in polled.next_offsets.items():
                starts.setdefault(partition, self._next[partition])
                ends[partition] = self._next[partition] = offset
            records += polled.records
            size += self._size.took(polled.records)
            if not polled.next_offsets or len(records) >= _ASSIGNED_RECORDS or size >= _ASSIGNED_BYTES:
                break
        if not ends:
            # A client may not notice for minutes that its topic was deleted and created again.
            if time.monotonic() > self._looked + IDENTITY_SECONDS:
                await self._require_same_log()
                await self._require_same_generation()
            return EventBatch(self._checkpoint({}), {})
        self._quiet_since = time.monotonic()
        batch = await decode(self._log, records, self._skips, since=self._checkpoint(starts), ends=ends)
        await self._prove(ends.keys())
        await self._require_same_log()
        return batch

    def applied(self, batch: EventBatch) -> None:
        """Note that the view holds the batch, for the next `show`. May be called while another task reads or shows."""
        self._unshown.update(batch.ends)

    async def show(self) -> None:
        """Commit the view's progress to the group, with the view's generation, so that the log's own tools show it.

        This includes the offset at which an assignment began, if its previous owner did not show it. If the commit
        fails, the next call tries again.
        """
        assigned = self._joined().assigned
        self._unshown = {p: offset for p, offset in self._unshown.items() if p in assigned}
        shown = dict(self._unshown)
        if not shown:
            return
        try:
            await self._joined().commit(shown, str(self._generation))
        except (UnavailableError, PushBackError) as error:  # the view itself has the progress; showing is tried again
            logger.info("%s: progress was not shown: %s", self._projection.name, error.detail)
        else:  # batches applied meanwhile have yet to be shown
            self._unshown = {p: offset for p, offset in self._unshown.items() if shown.get(p) != offset}

    async def leave(self) -> None:
        """Leave the group at once."""
        subscription, self._subscription = self._subscription, None
        if subscription is not None:
            await subscription.close()

    async def _start_offsets(self, partitions: Sequence[int]) -> Mapping[int, int]:
        """Where to begin reading newly assigned partitions: at the view's checkpoint. Also notices an operator's reset.

        Raises StaleCheckpointError: the view was emptied just now, so join again. CorruptError as `next_batch`.
        """
        await self._settled()
        if self._identity is None:
            raise StaleCheckpointError("asked for offsets before joining")
        checkpoint = await load_checkpoint(self._views, self._projection, self._identity)
        if checkpoint.generation != self._generation:
            self._reset = True  # partitions that this member already has belong to the older generation: join again
        name = self._projection.name
        if partitions:
            await check_continues(self._log, name, checkpoint, partitions)
            self._unproven.update(partitions)
            self._began = checkpoint
        # Read after the checkpoint: what another member claims and folds meanwhile must not look like a reset.
        committed = await self._log.committed(name)
        if not self._reset and folds_again(name, committed, checkpoint.position, range(await self._log.partitions())):
            await self._begin_anew(checkpoint.generation)
        starts = {p: checkpoint.position.offsets.get(p, 0) for p in partitions}
        self._unclaimed.update({p: offset for p, offset in starts.items() if p in committed and not committed[p][1]})
        self._next.update(starts)
        self._unshown.update({p: offset for p, offset in starts.items() if committed.get(p, (0, ""))[0] != offset})
        self._quiet_since = time.monotonic()
        if starts:
            logger.info("%s: assigned partitions %s", self._projection.name, starts)
        return starts

    async def _begin_anew(self, generation: UUID) -> None:
        """Empty the view, because an operator has reset the whole group to the log's start.

        If several members see the reset, one of them empties the view: only for that one, the view still has the
        expected generation. The others find it empty at their next assignment. Always raises StaleCheckpointError.
        """
        name = self._projection.name
        logger.warning(
            "%s: the group was reset to the log's start with other tools: the view is emptied and folded again", name
        )
        await reset(self._views, self._projection, expected=generation, patience_seconds=_RESET_SECONDS)
        raise StaleCheckpointError(f"the view {name} begins again")

    async def _prove(self, partitions: Iterable[int]) -> None:
        """Check once more, after the first batch of a partition, that the log continues what the view has folded.

        The log may lose its newest events after the assignment's own check, and grow beyond where reading begins.
        From the first batch on, the client notices that: it then knows the leader epoch of its place (KIP-320).
        """
        read_first = self._unproven.intersection(partitions)
        if read_first and self._began is not None:
            async with self._of_one_log():
                await check_continues(self._log, self._projection.name, self._began, read_first)
            self._unproven -= read_first

    async def _claim(self) -> None:
        """Commit where reading begins, with the view's generation, in partitions whose offset another tool has set.

        This happens before anything is folded there. Otherwise the next owner would take that offset for a new reset.
        """
        assigned = self._joined().assigned
        claimed = {p: offset for p, offset in self._unclaimed.items() if p in assigned}
        self._unclaimed.clear()
        if claimed:
            await self._joined().commit(claimed, str(self._generation))

    def _check(self, batch: Batch, ends: Mapping[int, int]) -> None:
        """Refuse records that do not continue from the last offsets, because of a rebalance in between."""
        moved = any(self._next[p] != offset for p, offset in ends.items())
        firsts = {record.partition: record.offset for record in reversed(batch.records)}
        early = any(offset < self._next.get(p, 0) for p, offset in firsts.items())
        if self._reset or moved or early:
            raise StaleCheckpointError(f"the partitions of {self._projection.name} were assigned again")

    @asynccontextmanager
    async def _of_one_log(self) -> AsyncIterator[None]:
        """Raise LogIdentityError instead of CorruptError if the log that looks truncated is in fact another log."""
        try:
            yield
        except CorruptError:
            await self._require_same_log()
            raise

    async def _require_same_log(self) -> None:
        """Check the log's identity after reading. Identities never return, so the log was the same while it was read.

        A Kafka client notices nothing when its topic is deleted and created again: it continues at its offset.
        """
        if self._identity is None:
            raise StaleCheckpointError("read before joining")
        require_same_log(self._projection, self._identity, await self._log.identity())
        self._looked = time.monotonic()

    async def _require_same_generation(self) -> None:
        """Check the view's generation. Without batches nothing else checks it, and a reset view would stay empty."""
        async with self._views.reading() as connection:
            live = await live_row(connection, self._projection)
        if live.generation != self._generation:
            raise StaleCheckpointError(f"the view {self._projection.name} has a new generation")

    def _checkpoint(self, starts: Mapping[int, int]) -> Checkpoint:
        if self._generation is None or self._identity is None:
            raise StaleCheckpointError("read before joining")
        return Checkpoint(self._generation, Position(self._identity, starts))

    def _joined(self) -> Subscription:
        if self._subscription is None:
            raise StaleCheckpointError("read before joining")
        return self._subscription
